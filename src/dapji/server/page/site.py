"""The files of the page. They are read once, so that no path of a request ever reaches the file system."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do (W3C, Content Security Policy 3): run and load our files, ask this server, nothing else."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # keep it, but ask whether it is still the same: the server may be a newer one
}


@dataclass(frozen=True, kw_only=True)
class StaticFile:
    data: bytes
    type: str
    tag: str
    """ETag."""


@cache
def static_files() -> dict[str, StaticFile]:
    """By name."""
    found = {}
    for path in files("dapji.server.page").joinpath("static").iterdir():
        data = path.read_bytes()
        tag = f'"{urlsafe_b64encode(sha256(data).digest()[:12]).decode()}"'
        found[path.name] = StaticFile(data=data, type=TYPES[PurePath(path.name).suffix], tag=tag)
    return found


async def chat(request: Request) -> Response:
    """The chat."""
    return _answer(request, "chat.html")


async def status(request: Request) -> Response:
    """The operator's page."""
    return _answer(request, "status.html")


async def docs(request: Request) -> Response:
    """The description of every route, for people."""
    return _answer(request, "docs.html")


async def static(request: Request) -> Response:
    """A file of the page."""
    return _answer(request, request.path_params["name"])


def _answer(request: Request, name: str) -> Response:
    file = static_files().get(name)
    if file is None:
        raise HTTPException(404, "there is no such file")
    headers = _HEADERS | {"ETag": file.tag}
    known = request.headers.get("if-none-match", "")
    if file.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.data, headers=headers, media_type=file.type)
