"""`BatchRunner`: sends the lines of batches through the application's own routes, when others leave room."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Scope

from dapji.errors import DapjiError
from dapji.server.answering import JsonObject, identifier
from dapji.server.batches.lines import Line, check, parse, read_lines
from dapji.server.batches.store import Batch, BatchStore, begin
from dapji.server.keys import Keys
from dapji.server.registry import Registry
from dapji.server.settings import Settings
from dapji.weights.store_lock import try_lock

log = logging.getLogger("dapji.server")

LOOK = 5.0
"""Seconds after which the runner sees what another process has changed."""
_SWEEP = 600.0
"""Seconds between two looks for files that have expired."""
_LATER = (429, 503)
"""Statuses that say: not now."""
_PATIENCE = 300.0
"""Longest wait before a line that was told so is tried again, whatever it was told."""
_EXPIRED = {"code": "batch_expired", "message": "This request was not answered within the batch's completion window."}
_CANCELLED = {"code": "batch_cancelled", "message": "This request was not answered before the batch was cancelled."}


@dataclass(frozen=True, eq=False)
class _Running:
    task: asyncio.Task[None]
    stop: asyncio.Event


class BatchRunner:
    """Of several servers with one store, one runs the batches; when it ends, another goes on."""

    def __init__(
        self, store: BatchStore, routes: ASGIApp, registry: Registry, settings: Settings, keys: Keys | None
    ) -> None:
        """routes: the application behind its guard; a request's state tells whose it is."""
        self._store = store
        self._routes = routes
        self._registry = registry
        self._settings = settings
        self._keys = keys
        self._running: dict[str, _Running] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._news = asyncio.Event()

    def look(self) -> None:
        """There is something new."""
        self._news.set()

    async def run(self) -> NoReturn:
        """Until it is cancelled."""
        lock = None
        swept = -_SWEEP
        try:
            while True:
                try:
                    if lock is None and self._store.path.exists():
                        lock = try_lock(self._store.lock)
                    if lock is not None:
                        await self._tend()
                        if time.monotonic() >= swept + _SWEEP:
                            await self._store.sweep()
                            swept = time.monotonic()
                except (DapjiError, OSError):
                    log.exception("batches cannot go on")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), LOOK)
                self._news.clear()
        finally:
            tasks = [running.task for running in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if lock is not None:
                os.close(lock)

    async def _tend(self) -> None:
        """Begins what is new, and stops what is to end."""
        self._running = {name: each for name, each in self._running.items() if not each.task.done()}
        for batch in await self._store.active():
            if self._keys is not None and batch.key and not self._keys.opens(batch.key):
                batch = await self._store.cancel(batch.id)
            if batch.id not in self._running:
                stop = asyncio.Event()
                self._running[batch.id] = _Running(asyncio.create_task(self._work(batch, stop)), stop)
            if batch.status == "cancelling":
                self._running[batch.id].stop.set()

    async def _work(self, batch: Batch, stop: asyncio.Event) -> None:
        try:
            if batch.status == "validating":
                batch = await self._validated(batch)
            if batch.status == "cancelling" and batch.errors:
                await self._store.finish(batch, "cancelled", unanswered=None, most_bytes=self._settings.max_body)
            elif batch.status != "failed":
                await self._answered(batch, stop)
        except Exception:
            log.exception("batch %s cannot go on; it is tried again in %d seconds", batch.id, _PATIENCE)
            await asyncio.sleep(_PATIENCE)

    async def _validated(self, batch: Batch) -> Batch:
        total, errors = await asyncio.to_thread(
            partial(
                check,
                self._store.body(batch.input_file_id),
                endpoint=batch.endpoint,
                most_bytes=self._settings.max_body,
                most_lines=self._settings.max_batch,
                find_model=self._registry.find,
            )
        )

        def change(batch: Batch) -> None:
            batch.total, batch.errors = total, errors
            if batch.status == "validating":
                begin(batch, "failed" if errors else "in_progress")

        return await self._store.change(batch.id, change)

    async def _answered(self, batch: Batch, stop: asyncio.Event) -> None:
        """All lines, or those that were before the batch's end."""
        lines, stopped = asyncio.ensure_future(self._lines(batch)), asyncio.ensure_future(stop.wait())
        try:
            left = max(0.0, batch.expires_at - time.time())
            await asyncio.wait({lines, stopped}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finished, cancelled = lines.done(), stopped.done()
        finally:
            for task in (lines, stopped):
                task.cancel()
            await asyncio.gather(lines, stopped, return_exceptions=True)
        finish = partial(self._store.finish, batch, most_bytes=self._settings.max_body)
        if cancelled:
            await finish("cancelled", unanswered=_CANCELLED)
        elif finished:
            lines.result()
            await self._store.change(batch.id, lambda batch: begin(batch, "finalizing"))
            await finish("completed", unanswered=None)
        else:
            await finish("expired", unanswered=_EXPIRED)

    async def _lines(self, batch: Batch) -> None:
        async with self._turns[batch.key]:  # one batch of a key after the other
            done = await self._store.answered(batch.id)
            found = read_lines(self._store.body(batch.input_file_id), self._settings.max_body)
            lines = ((number, line) for number, line in found if number not in done)
            async with asyncio.TaskGroup() as group:
                for _ in range(max(1, self._settings.max_running // 2)):
                    group.create_task(self._some(batch, lines))

    async def _some(self, batch: Batch, lines: Iterator[tuple[int, bytes]]) -> None:
        """Answers lines until there are no more; several share the iterator."""
        for number, line in lines:
            asked = parse(line)
            while True:
                status, headers, body = await self._ask(batch.key, asked)
                if status not in _LATER:
                    break
                await asyncio.sleep(min(float(headers.get("retry-after", LOOK)), _PATIENCE))
            response = {"status_code": status, "request_id": identifier("req", "_"), "body": body}
            told: JsonObject = {"id": identifier("batch_req", "_"), "custom_id": asked.custom_id, "response": response}
            told["error"] = None
            written = asyncio.ensure_future(self._store.answer(batch.id, number, told, ok=status < 400))
            try:
                await asyncio.shield(written)
            except asyncio.CancelledError:
                await written  # so that nothing is written once the batch ends
                raise

    async def _ask(self, key: str, line: Line) -> tuple[int, dict[str, str], JsonObject]:
        """Status, headers and body of the answer."""
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": line.method,
            "scheme": "http",
            "path": line.url,
            "raw_path": line.url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
            "state": {"key": key, "background": True},
        }
        sent: list[Message] = [{"type": "http.request", "body": msgspec.json.encode(line.body), "more_body": False}]
        answer: dict[str, str] = {}
        status, body = 500, bytearray()

        async def receive() -> Message:
            return sent.pop() if sent else await asyncio.Future()  # who asks never goes away

        async def send(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
                answer.update((name.decode(), value.decode()) for name, value in message["headers"])
            else:
                body += message.get("body", b"")

        # What fails has been logged, and is answered with 500, before it comes here.
        with suppress(Exception):
            await self._routes(scope, receive, send)
        return status, answer, msgspec.json.decode(bytes(body))


def runner_of(request: Request) -> BatchRunner:
    """The server's."""
    runner: BatchRunner = request.app.state.runner
    return runner
