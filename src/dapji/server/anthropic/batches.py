"""/v1/messages/batches: many requests for messages, answered when nobody else asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dapji.server.answering import JsonObject, identifier, ignored_fields, key_of
from dapji.server.anthropic.asked import Beta, Page, check_page
from dapji.server.batches.runner import runner_of
from dapji.server.batches.store import ACTIVE, Batch, store_of
from dapji.server.problem import Problem
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read, read_query

ENDPOINT = "/v1/messages"
_UNANSWERED = {"batch_expired": "expired", "batch_cancelled": "canceled"}


class OneAsked(Strict):
    custom_id: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    params: JsonObject
    """Of a message; what is wrong with them is the request's result."""


class Asked(Strict):
    requests: Annotated[list[OneAsked], msgspec.Meta(min_length=1)]


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Takes requests, to answer them when others leave room."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    if len(asked.requests) > service.settings.max_batch:
        told = f"{len(asked.requests)} requests are more than this server's limit of {service.settings.max_batch}"
        raise Problem("invalid_request", told, "requests")
    key, store = key_of(request), store_of(request)
    async with store.writing() as (name, body):
        for line in _lines(asked.requests, service.settings.max_body):
            body.write(line)
    await store.add(key, name, "messages", "requests.jsonl", None)
    batch = Batch(
        id=identifier("msgbatch", "_"),
        key=key,
        endpoint=ENDPOINT,
        input_file_id=name,
        created_at=int(time.time()),
        status="in_progress",
        total=len(asked.requests),
    )
    await store.create(batch, "messages")
    runner_of(request).look()
    return json_response(_told(request, batch), headers=ignored_fields(left_out))


@Reads(query=Page)
async def index(request: Request) -> Response:
    """The batches of whoever asks, the newest first."""
    asked = read_query(request, Page)
    check_page(asked)
    found = await store_of(request).batches(
        key_of(request), [ENDPOINT], after=asked.after_id, before=asked.before_id, limit=asked.limit + 1
    )
    more = len(found) > asked.limit
    page = found[-asked.limit :] if asked.before_id is not None else found[: asked.limit]
    told = [_told(request, batch) for batch in page]
    first, last = (told[0]["id"], told[-1]["id"]) if told else (None, None)
    return json_response({"data": told, "has_more": more, "first_id": first, "last_id": last})


@Reads(query=Beta)
async def show(request: Request) -> Response:
    """How far a batch is."""
    read_query(request, Beta)
    return json_response(_told(request, await _batch(request)))


@Reads(query=Beta)
async def cancel(request: Request) -> Response:
    """Ends a batch; the answers that it has are kept."""
    read_query(request, Beta)
    batch = await store_of(request).cancel((await _batch(request)).id)
    runner_of(request).look()
    return json_response(_told(request, batch))


@Reads(query=Beta)
async def delete(request: Request) -> Response:
    """Deletes a batch that has ended, with its requests and answers."""
    read_query(request, Beta)
    batch = await _batch(request)
    await store_of(request).remove(batch)
    return json_response({"id": batch.id, "type": "message_batch_deleted"})


@Reads(query=Beta)
async def results(request: Request) -> Response:
    """A line for each request, when the batch has ended."""
    read_query(request, Beta)
    batch = await _batch(request)
    if batch.status in ACTIVE:
        raise Problem("invalid_request", f"batch {batch.id!r} has not ended yet: there are no results")
    names = [name for name in (batch.output_file_id, batch.error_file_id) if name is not None]
    paths = [store_of(request).body(name) for name in names]
    return StreamingResponse(_results(paths), media_type="application/x-jsonl")


async def _batch(request: Request) -> Batch:
    return await store_of(request).batch(key_of(request), request.path_params["id"], [ENDPOINT])


def _lines(requests: list[OneAsked], most_bytes: int) -> Iterator[bytes]:
    """As the runner reads them. Raises Problem."""
    seen: set[str] = set()
    for i, each in enumerate(requests):
        where = f"requests[{i}]"
        if each.custom_id in seen:
            told = f"{where}.custom_id {each.custom_id!r} is that of another request"
            raise Problem("invalid_request", told, f"{where}.custom_id")
        seen.add(each.custom_id)
        if each.params.get("stream"):
            told = f"{where}.params.stream: nobody is there to whom the answer of a batch could be streamed"
            raise Problem("invalid_request", told, f"{where}.params.stream")
        line = {"custom_id": each.custom_id, "method": "POST", "url": ENDPOINT, "body": each.params}
        written = msgspec.json.encode(line) + b"\n"
        if len(written) > most_bytes:
            raise Problem("too_large", f"{where} is larger than this server's limit of {most_bytes} bytes", where)
        yield written


def _results(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                answer = msgspec.json.decode(line)
                response, error = answer["response"], answer["error"]
                if error is not None:
                    result = {"type": _UNANSWERED[error["code"]]}
                elif response["status_code"] < 400:
                    result = {"type": "succeeded", "message": response["body"]}
                else:
                    result = {"type": "errored", "error": response["body"]}
                yield msgspec.json.encode({"custom_id": answer["custom_id"], "result": result}) + b"\n"


def _told(request: Request, batch: Batch) -> JsonObject:
    ended = batch.status not in ACTIVE
    counts = {"processing": batch.total, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    if ended:
        counts |= {"processing": 0, "succeeded": batch.completed, "errored": batch.failed}
        counts["expired" if batch.status == "expired" else "canceled"] = batch.unanswered
    status = "ended" if ended else "canceling" if batch.status == "cancelling" else "in_progress"
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": counts,
        "created_at": _time(batch.created_at),
        "expires_at": _time(batch.expires_at),
        "ended_at": _time(batch.times[batch.status]) if ended else None,
        "cancel_initiated_at": _time(batch.times["cancelling"]) if "cancelling" in batch.times else None,
        "archived_at": None,
        "results_url": f"{request.base_url}v1/messages/batches/{batch.id}/results" if ended else None,
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
