"""`Listener`: the server on its socket. Ends connections that send too slowly, and lets answers finish when told to
stop."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from dapji.errors import UsageError
from dapji.server.service import Service

log = logging.getLogger("dapji.server")

TICKS = 36_000
"""Of uvicorn's main loop, ten a second, between two looks at the certificate."""


class Connection(H11Protocol):
    """Its requests must arrive in time, head and body, so that slow senders do not hold it."""

    def __init__(self, *, limit: float, **options: Any) -> None:
        super().__init__(**options)
        self._limit = limit
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self._limit)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._disarm()
        elif self._timer is None:
            self._arm(self._limit)

    def _arm(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._arm(1.0)  # a slow body: the application says so, in its client's protocol
            return
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            answer = h11.Response(status_code=408, headers=[("Connection", "close"), ("Content-Length", "0")])
            self.transport.write((self.conn.send(answer) or b"") + (self.conn.send(h11.EndOfMessage()) or b""))
        self.transport.close()


class Listener(uvicorn.Server):
    """Serves `app` until SIGINT or SIGTERM; then refuses what is new and lets answers end, for `Settings.grace` seconds
    at most or until a second signal."""

    def __init__(
        self, app: Starlette, *, tls: tuple[Path, Path] | None = None, renew: Callable[[], bool] | None = None
    ) -> None:
        """tls: certificate and key, in PEM. renew: called once an hour; whether those files are new."""
        self._tls = tls
        self._renew = renew
        self._service: Service = app.state.service
        self._deadline: float | None = None
        connection: Any = partial(Connection, limit=self._service.settings.receive_timeout)
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,  # for what is left when the grace is over
                ssl_certfile=None if tls is None else tls[0],
                ssl_keyfile=None if tls is None else tls[1],
            )
        )

    def stop(self) -> None:
        """What the first signal does, and a second. From any thread."""
        if self._service.stopping:
            self._deadline = 0.0
        else:
            self._deadline = time.monotonic() + self._service.settings.grace
            self._service.stopping = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and (self._service.active == 0 or time.monotonic() >= self._deadline):
            self.should_exit = True
        if self._renew is not None and counter % TICKS == 0:
            await self._reload(self._renew)
        return await super().on_tick(counter)

    async def _reload(self, renew: Callable[[], bool]) -> None:
        """A certificate that was renewed is that of the next connections."""
        try:
            if await asyncio.to_thread(renew):
                assert self.config.ssl is not None
                assert self._tls is not None
                self.config.ssl.load_cert_chain(*self._tls)
        except OSError:
            log.exception("the certificate cannot be renewed")


def bind(host: str, port: int) -> socket.socket:
    """Raises UsageError where nothing can listen there."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror or error}", hint="--port 0") from error
