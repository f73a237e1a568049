"""GET /v1/models and /v1/models/NAME, with every limit that a client meets."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dapji.errors import RequestError
from dapji.model import Model
from dapji.server.registry import Served
from dapji.server.service import Service
from dapji.server.wire import NoQuery, json_response, read_query


async def index(request: Request) -> Response:
    read_query(request, NoQuery)
    service: Service = request.app.state.service
    served = [await _described(each, service) for each in service.registry.models.values()]
    return json_response({"object": "list", "data": served})


async def show(request: Request) -> Response:
    read_query(request, NoQuery)
    service: Service = request.app.state.service
    return json_response(await _described(service.registry.find(request.path_params["name"]), service))


async def _described(served: Served, service: Service) -> dict[str, Any]:
    settings = service.settings
    limits: dict[str, Any] = {
        "max_body_bytes": settings.max_body,
        "max_file_bytes": settings.max_file,
        "max_batch_requests": settings.max_batch,
        "max_choices": settings.max_choices,
        "max_inputs": settings.max_inputs,
        "max_top_logprobs": settings.max_top,
        "max_running": settings.max_running,
        "max_waiting": settings.max_waiting,
        "receive_timeout_seconds": settings.receive_timeout,
        "timeout_seconds": settings.timeout,
        "context": await service.registry.context_of(served),
    }
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "local",
        "parent": None if served.parent is None else served.parent.name,
        "size_bytes": served.size,
        "open": served.model is not None,
        "limits": limits,
        "embedding": None if served.model is None else _embedding(served.model),
    }


def _embedding(model: Model) -> dict[str, Any] | None:
    """How its texts become vectors; None where they do not."""
    try:
        config = model.embedding
    except RequestError:
        return None
    return {
        "size": model.config.dim,
        "pooling": config.pooling,
        "declared": config.declared,
        "dimensions": list(config.dimensions),
    }
