"""What the operator's page shows: models, memory, the queue, and what the last hour was like."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import asdict
from functools import cache

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dapji import __version__
from dapji.evaluation.machine import describe_machine, resident_memory
from dapji.server.answering import JsonObject
from dapji.server.metrics import Totals
from dapji.server.registry import Served
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read_query

INTERVAL = 5.0
"""Seconds between samples."""
KEPT = 720
"""Samples: an hour."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Of the INTERVAL before `time`."""

    time: float
    """Seconds since 1970."""
    prompt: float
    """Tokens per second that were asked to be read."""
    generated: float
    """Tokens per second of answers."""
    first_token: float | None
    """Seconds to the first token, on average; None: no answer began."""
    running: int
    waiting: int
    memory: int | None
    """Bytes of this process that are resident."""


class History:
    """The last hour, for one asyncio loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self.started = time.time()

    async def run(self) -> None:
        """Until it is cancelled."""
        before, at = Totals(), time.monotonic()
        while True:
            await asyncio.sleep(INTERVAL)
            totals, now = Totals(**asdict(self._service.metrics.totals)), time.monotonic()
            self._samples.append(self._sample(before, totals, now - at))
            before, at = totals, now

    def _sample(self, before: Totals, after: Totals, seconds: float) -> Sample:
        begun = after.first_tokens - before.first_tokens
        waited = after.first_token_seconds - before.first_token_seconds
        return Sample(
            time=time.time(),
            prompt=(after.prompt_tokens - before.prompt_tokens) / seconds,
            generated=(after.generated_tokens - before.generated_tokens) / seconds,
            first_token=waited / begun if begun else None,
            running=self._service.gate.running,
            waiting=self._service.gate.waiting,
            memory=resident_memory(),
        )

    def since(self, moment: float) -> list[Sample]:
        return [sample for sample in self._samples if sample.time > moment]


_machine = cache(describe_machine)
"""Asked by every look at the page; what is shown of it does not change."""


class Since(Strict):
    since: float = 0.0
    """Samples after this time, in seconds since 1970."""


@Reads(query=Since)
async def show(request: Request) -> Response:
    """The server as it is, and samples of the last hour."""
    asked = read_query(request, Since)
    service: Service = request.app.state.service
    history: History = request.app.state.history
    machine = await asyncio.to_thread(_machine)
    totals: JsonObject = asdict(service.metrics.totals)
    return json_response(
        {
            "version": __version__,
            "started": history.started,
            "now": time.time(),
            "machine": {"processor": machine.processor, "processors": machine.processors, "memory": machine.memory},
            "memory": {"resident": resident_memory(), "limit": service.registry.memory},
            "queue": {
                "running": service.gate.running,
                "max_running": service.settings.max_running,
                "waiting": service.gate.waiting,
                "max_waiting": service.settings.max_waiting,
            },
            "totals": totals,
            "models": [_described(served) for served in service.registry.models.values()],
            "interval": INTERVAL,
            "samples": history.since(asked.since),
        }
    )


def _described(served: Served) -> JsonObject:
    return {
        "id": served.name,
        "open": served.model is not None,
        "size": served.size,
        "memory": 0 if served.model is None else served.memory,
        "users": served.users,
        "idle": None if served.used == 0 or served.users else time.monotonic() - served.used,
    }
