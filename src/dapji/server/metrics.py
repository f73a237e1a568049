"""`Metrics`: what Prometheus may know (https://prometheus.io/docs/practices/naming/), and sums of it as plain numbers.

Labels are routes, statuses and the models that are served: nothing that clients could make ever more of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from dapji.server.gate import Gate
from dapji.server.record import Record
from dapji.server.registry import Registry, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@dataclass(kw_only=True)
class Totals:
    """Since the server was started, of all models, with what is under way."""

    requests: int = 0
    """That have ended."""
    refused: int = 0
    """Of them: because the server was full, or a key's quota."""
    failed: int = 0
    """Of them: by a fault of the server."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_tokens: int = 0
    """Answers that have begun."""
    first_token_seconds: float = 0.0
    """What they took for it, all together."""


class Metrics:
    """Of one server."""

    def __init__(self, registry: Registry, gate: Gate) -> None:
        self.totals = Totals()
        self._all = CollectorRegistry()
        ProcessCollector(registry=self._all)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"dapji_{name}", help, labels, registry=self._all)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"dapji_{name}", help, labels, registry=self._all)

        self._requests = counter("requests", "Requests that have ended.", "route", "status")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._cached = counter("cached_tokens", "Tokens of prompts that the cache held already.", "model")
        self._generated = counter("generated_tokens", "Tokens of answers.", "model")
        gauge("requests_running", "Answers that are computed.").set_function(lambda: gate.running)
        gauge("requests_waiting", "Answers that wait for their turn.").set_function(lambda: gate.waiting)
        memory = gauge("model_memory_bytes", "Weights and cache of a model; 0 while it is not open.", "model")
        for served in registry.models.values():
            memory.labels(served.name).set_function(partial(_taken, served))
        self._first_token = Histogram(
            "dapji_first_token_seconds",
            "From a request's arrival to the first token.",
            buckets=_FIRST,
            registry=self._all,
        )
        self._inter_token = Histogram(
            "dapji_inter_token_seconds", "From one token to the next.", buckets=_BETWEEN, registry=self._all
        )

    def count(self, record: Record) -> None:
        """A request that has ended."""
        self.totals.requests += 1
        self.totals.refused += record.status == 429
        self.totals.failed += record.status >= 500
        self._requests.labels(record.route, str(record.status)).inc()
        if record.model is not None:
            self._prompt.labels(record.model).inc(record.prompt)
            self._cached.labels(record.model).inc(record.cached)
            self._generated.labels(record.model).inc(record.generated)

    def read(self, tokens: int) -> None:
        """A prompt's tokens are about to be."""
        self.totals.prompt_tokens += tokens

    def begun(self, seconds: float | None) -> None:
        """An answer has its first token, so long after its request arrived; None: nobody waited for it."""
        self.totals.generated_tokens += 1
        if seconds is None:
            return
        self.totals.first_tokens += 1
        self.totals.first_token_seconds += seconds
        self._first_token.observe(seconds)

    def went_on(self, tokens: int, seconds: float) -> None:
        """An answer has so many tokens more, each so long after the one before."""
        self.totals.generated_tokens += tokens
        for _ in range(tokens):
            self._inter_token.observe(seconds)

    def written(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._all)


def _taken(served: Served) -> int:
    return 0 if served.model is None else served.memory


async def show(request: Request) -> Response:
    """Figures for Prometheus."""
    metrics: Metrics = request.app.state.service.metrics
    return Response(metrics.written(), headers={"Content-Type": CONTENT_TYPE})
