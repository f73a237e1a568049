"""GET /v1/models and /v1/models/NAME in Anthropic's form."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dapji.server.anthropic.asked import Beta, Page, check_page
from dapji.server.problem import Problem
from dapji.server.registry import Served
from dapji.server.service import Service
from dapji.server.wire import json_response, read_query


async def index(request: Request) -> Response:
    """A page of them: behind `after_id`, or the last before `before_id`."""
    asked = read_query(request, Page)
    check_page(asked)
    service: Service = request.app.state.service
    names = list(service.registry.models)
    for field, name in (("after_id", asked.after_id), ("before_id", asked.before_id)):
        if name is not None and name not in names:
            raise Problem("invalid_request", f"{field}: there is no model {name!r} here", field)
    behind = names[0 if asked.after_id is None else names.index(asked.after_id) + 1 :]
    found = behind if asked.before_id is None else names[: names.index(asked.before_id)]
    page = found[: asked.limit] if asked.before_id is None else found[-asked.limit :]
    served = [await _described(service.registry.models[name], service) for name in page]
    first, last = (page[0], page[-1]) if page else (None, None)
    return json_response({"data": served, "has_more": len(page) < len(found), "first_id": first, "last_id": last})


async def show(request: Request) -> Response:
    read_query(request, Beta)
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
