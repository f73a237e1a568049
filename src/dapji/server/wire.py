"""Bodies of requests and answers: strict JSON in, JSON and event streams out. Knows no protocol and no model."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dapji.server.problem import Problem

T = TypeVar("T")
E = TypeVar("E")
R = TypeVar("R", bound=Callable[..., Any])

KEEP_ALIVE = 10.0
"""Seconds without an event after which a stream says that it lives, so that no proxy ends it."""
MOST_IGNORED = 100
"""Unknown fields that are left out of one request: each is found by reading the request again."""
_LONGEST_IGNORED = 200
"""Characters of such a field's path, since a header tells it."""
_READS = "_reads"
_UNKNOWN = re.compile(r"(?s)unknown field `(?P<field>.*?)`(?: - at `\$\.?(?P<where>.*)`)?\Z")
_PLACE = re.compile(r" - at `\$\.?(?P<where>.*)`$")


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of what clients send: a field that we do not know is refused."""


class NoQuery(Strict):
    """No parameters."""


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What a route takes, as a decorator of its function: `/openapi.json` tells it."""

    body: type | None = None
    query: type | None = None
    form: type | None = None
    """A body that is a form with a file."""

    def __call__(self, endpoint: R) -> R:
        setattr(endpoint, _READS, self)
        return endpoint

    @staticmethod
    def of(endpoint: object) -> Reads:
        reads: Reads = getattr(endpoint, _READS, Reads())
        return reads


async def read(
    request: Request, type: type[T], *, limit: int, prepare: Callable[[Any], None] | None = None
) -> tuple[T, list[str]]:
    """The body as `type`, and the names of unknown fields that were left out, where the request asks for that by the
    header `Dapji-Unknown-Fields: ignore`. prepare: writes into the parsed body what its protocol lets clients omit.

    Raises Problem: too_large beyond `limit` bytes, invalid_request for what is no JSON, an unknown field, a missing or
    wrong value.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise Problem("too_large", f"the body is larger than this server's limit of {limit} bytes")
    try:
        value = msgspec.json.decode(bytes(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("invalid_request", f"the body is not JSON: {error}") from None
    if prepare is not None:
        prepare(value)
    if request.headers.get("dapji-unknown-fields") == "ignore":
        return await asyncio.to_thread(convert, value, type, lenient=True)  # reads it as often as there are such fields
    return convert(value, type)


def read_query(request: Request, type: type[T]) -> T:
    """The query as `type`, as strictly as a body. Raises Problem."""
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if times > 1:
            raise Problem("invalid_request", f"{name} is given {times} times", name)
    return convert(dict(request.query_params), type, strict=False)[0]


def convert(value: Any, type: type[T], *, lenient: bool = False, strict: bool = True) -> tuple[T, list[str]]:
    """A parsed JSON value as `type`; see `read`. strict: no numbers written as text."""
    left_out: list[str] = []
    while True:
        try:
            return msgspec.convert(value, type, strict=strict), left_out
        except msgspec.ValidationError as error:
            unknown = _UNKNOWN.search(str(error))
            if unknown is None:
                place = _PLACE.search(str(error))
                where = place["where"] if place else None
                message = _PLACE.sub("", str(error))
                raise Problem("invalid_request", f"{where}: {message}" if where else message, where) from None
            path = ".".join(filter(None, (unknown["where"], unknown["field"])))
            if not lenient:
                raise Problem(
                    "invalid_request",
                    f"unknown field {path!r}: it might change the answer, so it is not ignored. Hint: leave it out, or "
                    "send the header Dapji-Unknown-Fields: ignore",
                    path,
                    code="unknown_field",
                ) from None
            if len(left_out) == MOST_IGNORED or len(path) > _LONGEST_IGNORED:
                told = f"more than {MOST_IGNORED} unknown fields, or one of more than {_LONGEST_IGNORED} characters"
                raise Problem("invalid_request", f"{told}, are not ignored: leave them out") from None
            _drop(value, unknown["where"] or "", unknown["field"])
            left_out.append(path)


def _drop(value: Any, where: str, field: str) -> None:
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", where):
        value = value[int(index)] if index else value[name]
    del value[field]


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def event(value: object, name: str | None = None) -> bytes:
    """A server-sent event (WHATWG HTML, "Server-sent events")."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


class Streamed(StreamingResponse):
    """An answer in parts. Owns what it needs (`stack`), also where the client is gone before the first part."""

    def __init__(self, parts: AsyncIterator[bytes], stack: AsyncExitStack, **options: Any) -> None:
        super().__init__(parts, **options)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


def event_stream(
    parts: AsyncIterator[bytes], stack: AsyncExitStack, headers: dict[str, str], sign: bytes = b": still here\n\n"
) -> Streamed:
    """Server-sent events. sign: what says that the stream lives; by default a comment, which clients skip."""
    kept = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
    return Streamed(_alive(parts, sign), stack, media_type="text/event-stream", headers=kept)


def line_stream(parts: AsyncIterator[bytes], stack: AsyncExitStack, headers: dict[str, str], sign: bytes) -> Streamed:
    """Lines of JSON. sign: what says that the stream lives, a line that adds nothing."""
    return Streamed(_alive(parts, sign), stack, media_type="application/x-ndjson", headers=headers)


async def merged(parts: Sequence[AsyncIterator[E]]) -> AsyncIterator[tuple[int, E]]:
    """What several iterators give, as it comes, with the iterator's number."""
    queue: asyncio.Queue[tuple[int, E] | BaseException | None] = asyncio.Queue()

    async def read_all(index: int) -> None:
        try:
            async for part in parts[index]:
                queue.put_nowait((index, part))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(read_all(i)) for i in range(len(parts))]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _alive(parts: AsyncIterator[bytes], sign: bytes) -> AsyncIterator[bytes]:
    """`parts`, and `sign` whenever the next one takes long."""
    pending: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(parts, None))
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE)
            if not done:
                yield sign
                continue
            part = pending.result()
            pending = None
            if part is None:
                return
            yield part
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        close: Callable[[], Any] | None = getattr(parts, "aclose", None)
        if close is not None:
            await close()


async def while_connected(request: Request, answer: asyncio.Task[E]) -> E:
    """What `answer` gives; it is cancelled when the client goes away before."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise asyncio.CancelledError
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
