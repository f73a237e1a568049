"""GET /v1/models and /v1/models/NAME in Anthropic's form."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dapji.server.registry import Served
from dapji.server.service import Service
from dapji.server.wire import json_response


async def index(request: Request) -> Response:
    """All of them on one page."""
    service: Service = request.app.state.service
    served = [await _described(each, service) for each in service.registry.models.values()]
    pages = {"has_more": False, "first_id": served[0]["id"], "last_id": served[-1]["id"]}
    return json_response({"data": served} | pages)


async def show(request: Request) -> Response:
    service: Service = request.app.state.service
    return json_response(await _described(service.registry.find(request.path_params["name"]), service))


async def _described(served: Served, service: Service) -> dict[str, Any]:
    return {
        "type": "model",
        "id": served.name,
        "display_name": served.name,
        "created_at": datetime.fromtimestamp(served.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": await service.registry.context_of(served),
    }
