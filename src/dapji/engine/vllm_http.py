"""`ask`: one request over HTTP to a vLLM server, at an address of TCP or at a socket of this machine.

A connection for each request: closing it is how vLLM learns that nobody wants the answer any more. Knows nothing of
what is asked.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import h11

from dapji.errors import UnavailableError, UsageError

_CHUNK = 1 << 16
_CONNECT = 10.0
"""Seconds in which a connection must be there."""
_SILENCE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""A machine that is gone says nothing, as one that computes does: the kernel asks it, and after a minute gives up."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a vLLM server listens."""

    socket: Path | None = None
    """Of this machine; then host and port are not used."""
    host: str = "localhost"
    port: int = 8000
    tls: bool = False
    key: str | None = None
    """What the server was given as --api-key."""

    @staticmethod
    def of_url(url: str, *, key: str | None = None) -> Address:
        """http://HOST:PORT or https://HOST:PORT. Raises UsageError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise UsageError(f"{url!r} is no address of a vLLM server", hint="http://HOST:PORT, without a path")
        tls = parts.scheme == "https"
        return Address(host=parts.hostname, port=port or (443 if tls else 80), tls=tls, key=key)

    def __str__(self) -> str:
        if self.socket is not None:
            return "a socket of this machine"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


class Answer:
    """One that has begun."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, connection: h11.Connection) -> None:
        self.status = 0
        self._address = address
        self._reader = reader
        self._connection = connection

    async def begin(self) -> None:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                self.status = event.status_code
                return

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises UnavailableError where the connection ends before the body does."""
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines, without their ends."""
        rest = b""
        async for part in self.parts():
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r")
        if rest:
            yield rest

    async def read(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def _next(self) -> object:
        try:
            while (event := self._connection.next_event()) is h11.NEED_DATA:
                self._connection.receive_data(await self._reader.read(_CHUNK))
        except (OSError, h11.RemoteProtocolError) as error:
            raise UnavailableError(f"vLLM at {self._address} broke off its answer: {error}") from error
        if isinstance(event, h11.ConnectionClosed):
            raise UnavailableError(f"vLLM at {self._address} closed the connection without an answer")
        return event


@asynccontextmanager
async def ask(address: Address, path: str, body: bytes | None = None) -> AsyncIterator[Answer]:
    """GET, or POST of JSON where there is a body. Raises UnavailableError where nobody answers."""
    try:
        async with asyncio.timeout(_CONNECT):
            reader, writer = await _connect(address)
    except TimeoutError:
        raise UnavailableError(f"vLLM at {address} cannot be reached: no answer in {_CONNECT:.0f} s") from None
    except OSError as error:
        raise UnavailableError(f"vLLM at {address} cannot be reached: {error.strerror or error}") from error
    try:
        connection = h11.Connection(h11.CLIENT)
        host = "localhost" if address.socket is not None else str(address).partition("://")[2]
        headers = [("Host", host), ("User-Agent", "dapji"), ("Connection", "close")]
        if address.key is not None:
            headers.append(("Authorization", f"Bearer {address.key}"))
        if body is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        request = h11.Request(method="GET" if body is None else "POST", target=path, headers=headers)
        sent = connection.send(request) or b""
        if body is not None:
            sent += connection.send(h11.Data(body)) or b""
        writer.write(sent + (connection.send(h11.EndOfMessage()) or b""))
        answer = Answer(address, reader, connection)
        await answer.begin()
        yield answer
    finally:
        writer.transport.abort()


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.socket is not None:
        return await asyncio.open_unix_connection(str(address.socket))
    tls = ssl.create_default_context() if address.tls else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls)
    opened = writer.get_extra_info("socket")
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SILENCE.items():
        if hasattr(socket, name):  # as the system has them
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return reader, writer
