"""GET /openapi.json: every route, described from the types that it reads (OpenAPI 3.1)."""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dapji import __version__
from dapji.server.answering import JsonObject
from dapji.server.wire import Reads, json_response

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_FIRST_SENTENCE = re.compile(r"(?<=[.])\s")
_REFERENCES = "#/components/schemas/{name}"


async def show(request: Request) -> Response:
    """This description."""
    return json_response(document(request.app))


def document(app: Starlette) -> JsonObject:
    routes = [route for route in app.routes if isinstance(route, Route)]
    read = [Reads.of(route.endpoint) for route in routes]
    types = list(
        dict.fromkeys(type for each in read for type in (each.body, each.query, each.form) if type is not None)
    )
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCES)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: JsonObject = {}
    for route, each in zip(routes, read, strict=True):
        operation = _operation(route.endpoint)
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _PARAMETER.findall(route.path)
        ]
        if each.query is not None:
            described = components[schema_of[each.query]["$ref"].rpartition("/")[2]]
            parameters += [
                {"name": name, "in": "query", "schema": schema} for name, schema in described["properties"].items()
            ]
        if parameters:
            operation["parameters"] = parameters
        if each.body is not None:
            content = {"application/json": {"schema": schema_of[each.body]}}
            operation["requestBody"] = {"required": True, "content": content}
        if each.form is not None:
            content = {"multipart/form-data": {"schema": schema_of[each.form]}}
            operation["requestBody"] = {"required": True, "content": content}
        path = paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            name = "_".join(re.findall(r"\w+", f"{method.lower()} {route.path}"))
            path[method.lower()] = {"operationId": name} | operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Dapji", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],  # not every server asks for a key
    }


def _operation(endpoint: Any) -> JsonObject:
    module, told = inspect.getmodule(endpoint), inspect.getdoc(endpoint)
    assert module is not None
    assert told is not None
    return {
        "tags": [module.__name__.split(".")[2]],  # the protocol
        "summary": _FIRST_SENTENCE.split(told, maxsplit=1)[0].replace("\n", " ").rstrip("."),
        "responses": {
            "200": {"description": "the answer; a stream of events where the request asks for one"},
            "default": {"description": "a problem, in the form of this route's protocol"},
        },
    }
