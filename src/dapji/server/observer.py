"""`Observer`: around every request, also those that are refused: records it, bounds its time, stops when told to."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dapji.server import log
from dapji.server.problem import Problem
from dapji.server.protocols import problem_response
from dapji.server.record import Record, current
from dapji.server.service import Service
from dapji.server.settings import Settings

CLIENT_GONE = 499
"""As nginx calls it; nobody receives it."""
UNREAD = 5.0
"""Seconds over its time after which an answer is cut off: its client does not read that its time is over."""


class Observer:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        background = scope.get("state", {}).get("background", False)
        record = Record(method=scope["method"], route=_route(scope), background=background)
        current.set(record)
        request = _Watched(record, self._service.settings, receive, send)
        limit = None if background else self._service.settings.timeout
        self._service.active += not background
        try:
            async with asyncio.timeout_at(None if limit is None else record.started + limit + UNREAD):
                await (_stopping if self._service.stopping else self._app)(scope, request.receive, request.send)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not request.gone:
                raise
        finally:
            if request.gone:
                record.status = CLIENT_GONE
            record.key = scope.get("state", {}).get("key", "")
            record.seconds = asyncio.get_running_loop().time() - record.started
            self._service.metrics.count(record)
            log.tell(record)
            self._service.active -= not background  # last, so that a server that stops has told of all


class _Watched:
    """A request's way in and out."""

    def __init__(self, record: Record, settings: Settings, receive: Receive, send: Send) -> None:
        self._record = record
        self._settings = settings
        self._receive = receive
        self._send = send
        self._arriving = True
        self._received = 0
        self._answered = False
        self.gone = False

    async def receive(self) -> Message:
        """Raises Problem where the body takes too long."""
        if not self._arriving:
            return self._seen(await self._receive())
        # What may be larger than a body, a file, has that time for each body's worth of it.
        limit = self._settings.receive_timeout * (1 + self._received // self._settings.max_body)
        try:
            async with asyncio.timeout_at(self._record.started + limit):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                "slow",
                f"the body has not arrived within this server's limit of {limit:g} seconds",
                headers={"Connection": "close"},
            ) from None
        self._arriving = message.get("more_body", False)
        self._received += len(message.get("body", b""))
        return self._seen(message)

    def _seen(self, message: Message) -> Message:
        self.gone = self.gone or (message["type"] == "http.disconnect" and not self._answered)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
        elif not message.get("more_body", False):
            self._answered = True
        await self._send(message)


def _route(scope: Scope) -> str:
    for route in scope["app"].routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            return route.path
    return "other"


async def _stopping(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Retry-After": "5", "Connection": "close"}
    await problem_response(scope, Problem("unavailable", "this server is stopping", headers=headers))(
        scope, receive, send
    )
