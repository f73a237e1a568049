"""/v1/batches: the requests of a file, answered into files."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dapji.server.answering import JsonObject, identifier, ignored_fields, key_of
from dapji.server.batches.runner import runner_of
from dapji.server.batches.store import Batch, Status, store_of
from dapji.server.openai.files import ExpiresAfter, page_of
from dapji.server.problem import Problem
from dapji.server.service import Service
from dapji.server.wire import NoQuery, Reads, Strict, json_response, read, read_query

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_TIMES: tuple[Status, ...] = (
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)


class Asked(Strict):
    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class Page(Strict):
    """Which batches are told, the newest first."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    after: str | None = None
    """The last batch of the page before."""


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Takes the requests of a file, to answer them when others leave room."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    served = {route.path for route in request.app.routes if isinstance(route, Route)}
    endpoints = [endpoint for endpoint in ENDPOINTS if endpoint in served]
    if asked.endpoint not in endpoints:
        told = f"endpoint {asked.endpoint!r} takes no batches; those are {', '.join(endpoints)}"
        raise Problem("invalid_request", told, "endpoint", code="invalid_endpoint")
    batch = Batch(
        id=identifier("batch", "_"),
        key=key_of(request),
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        created_at=int(time.time()),
        metadata=asked.metadata,
        output_seconds=None if asked.output_expires_after is None else asked.output_expires_after.seconds,
    )
    await store_of(request).create(batch, "batch")
    runner_of(request).look()
    return json_response(_told(batch), headers=ignored_fields(left_out))


@Reads(query=Page)
async def index(request: Request) -> Response:
    """The batches of whoever asks."""
    asked = read_query(request, Page)
    found = await store_of(request).batches(key_of(request), ENDPOINTS, after=asked.after, limit=asked.limit + 1)
    return json_response(page_of([_told(batch) for batch in found], asked.limit))


@Reads(query=NoQuery)
async def show(request: Request) -> Response:
    """How far a batch is."""
    read_query(request, NoQuery)
    return json_response(_told(await _batch(request)))


@Reads(query=NoQuery)
async def cancel(request: Request) -> Response:
    """Ends a batch; the answers that it has are kept."""
    read_query(request, NoQuery)
    batch = await store_of(request).cancel((await _batch(request)).id)
    if batch.status != "cancelling":
        told = f"batch {batch.id!r} is {batch.status} and cannot be cancelled any more"
        raise Problem("invalid_request", told, "batch_id")
    runner_of(request).look()
    return json_response(_told(batch))


async def _batch(request: Request) -> Batch:
    return await store_of(request).batch(key_of(request), request.path_params["id"], ENDPOINTS)


def _told(batch: Batch) -> JsonObject:
    errors = {"object": "list", "data": msgspec.to_builtins(batch.errors)} if batch.errors else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{status}_at": batch.times.get(status) for status in _TIMES},
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed + batch.unanswered,
        },
        "metadata": batch.metadata,
    }
