"""`Guard`: who may ask at all. Before any route: the host that is named, the page that asks, the key."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dapji.server.keys import Keys
from dapji.server.problem import Problem
from dapji.server.protocols import problem_response
from dapji.server.settings import Settings

OPEN_PATHS = ("/health", "/", "/status", "/docs")
"""Answered to anybody who may address the server: the pages ask their readers for a key."""
OPEN_FOLDER = "/static/"
"""As these paths, all in it."""

_FOREIGN = ("cross-site", "same-site")
"""What browsers say of a request that another page makes (W3C, Fetch Metadata)."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, settings: Settings, keys: Keys | None) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys

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
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy before us may believe the other one, and see other requests than we do (RFC 9112, 6.1).
            raise Problem(
                "invalid_request", "both Transfer-Encoding and Content-Length: where the body ends is not certain"
            )
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in self._settings.hosts:
            raise Problem(
                "forbidden",
                f"this server does not answer under the name {name!r}. Hint: dapji serve --allow-host NAME",
                code="host",
            )
        origin = headers.get("origin")
        own = f"{Request(scope).url.scheme}://{host}"
        if origin is not None and origin != own and origin not in self._settings.origins:
            raise Problem(
                "forbidden",
                f"pages of {origin} may not ask this server. Hint: dapji serve --allow-origin URL",
                code="origin",
            )
        if origin is None and headers.get("sec-fetch-site") in _FOREIGN and not _is_open(scope["path"]):
            # What a foreign page loads as an image or a script has no Origin, and could make us open a model.
            raise Problem("forbidden", "other pages may not ask this server", code="origin")
        if self._keys is None or _is_open(scope["path"]) or not self._keys.asked:
            return ""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        key = value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        known = self._keys.name_of(key) if key else None
        if known is None:
            told = "this key is not known here" if key else "this server wants a key: Authorization: Bearer KEY"
            raise Problem("unauthorized", told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return known


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
