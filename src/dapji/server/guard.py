"""`Guard`: who may ask at all. Before any route: the host that is named, the page that asks, the key."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dapji.server.problem import Problem
from dapji.server.protocols import problem_response
from dapji.server.settings import Settings

OPEN_PATHS = ("/health",)
"""Answered to anybody who may address the server."""


class Guard:
    """ASGI middleware. `key_name` gives the name of a key that is right, None for any other; where it is None itself,
    no key is asked for."""

    def __init__(self, app: ASGIApp, *, settings: Settings, key_name: Callable[[str], str | None] | None) -> None:
        self._app = app
        self._settings = settings
        self._key_name = key_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["key"] = self._check(scope)
        except Problem as problem:
            await problem_response(scope, problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        """Whose request it is; "" where no keys are asked for. Raises Problem."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in self._settings.hosts:
            raise Problem("forbidden", f"this server does not answer under the name {name!r}", code="host")
        origin = headers.get("origin")
        own = f"{Request(scope).url.scheme}://{host}"
        if origin is not None and origin != own and origin not in self._settings.origins:
            raise Problem("forbidden", f"pages of {origin} may not ask this server", code="origin")
        if self._key_name is None or scope["path"] in OPEN_PATHS:
            return ""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        key = value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        known = self._key_name(key) if key else None
        if known is None:
            told = "this key is not known here" if key else "this server wants a key: Authorization: Bearer KEY"
            raise Problem("unauthorized", told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return known
