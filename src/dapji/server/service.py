"""`Service`: the way from a checked request to a model's answer that all protocols share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dapji.chat.formats import Event
from dapji.engine import Scores
from dapji.errors import DapjiError, DeadlineError
from dapji.model import AsyncReply, Embeddings, Model, Prepared, Reranking
from dapji.server.gate import Gate
from dapji.server.keys import Keys
from dapji.server.metrics import Metrics
from dapji.server.problem import Problem
from dapji.server.record import Record, current
from dapji.server.registry import Registry
from dapji.server.settings import Settings

P = TypeVar("P", Embeddings, Reranking)


@dataclass(frozen=True, eq=False)
class Answers:
    """To one prompt."""

    name: str
    """Of the model."""
    model: Model
    replies: Sequence[AsyncReply]

    async def end(self) -> None:
        """Waits until all have ended. Raises what ended one, if it was an error."""
        await asyncio.gather(*(reply.whole() for reply in self.replies))


@dataclass(frozen=True, eq=False)
class Vectors:
    pooled: NDArray[np.float32]
    """[n, D]"""
    n_tokens: int
    """Of all texts."""


class Service:
    """For one asyncio loop."""

    def __init__(self, registry: Registry, settings: Settings, keys: Keys | None = None) -> None:
        self.registry = registry
        self.settings = settings
        self.gate = Gate(running=settings.max_running, waiting=settings.max_waiting)
        self.metrics = Metrics(registry, self.gate)
        self.active = 0
        """Requests of every kind that somebody waits for."""
        self.stopping = False
        """Whether new ones are refused."""
        self._keys = keys

    def chat(
        self, key: str, model: str | None, messages: Sequence[Mapping[str, Any]], *, n: int = 1, **options: Any
    ) -> AbstractAsyncContextManager[Answers]:
        """n answers to a conversation, which run until the context ends; options of `Model.chat`. Raises Problem."""
        return self._answers(key, model, lambda opened: [partial(opened.prepare_chat, messages)], 1, n, options)

    def complete(
        self, key: str, model: str | None, *prompts: str | Sequence[int], n: int = 1, **options: Any
    ) -> AbstractAsyncContextManager[Answers]:
        """n continuations of each text or sequence of tokens, those of one prompt after those of another; as `chat`."""

        def prepare(opened: Model) -> list[Callable[..., Prepared]]:
            return [partial(opened.prepare_completion, prompt) for prompt in prompts]

        return self._answers(key, model, prepare, len(prompts), n, options)

    async def score(self, key: str, model: str | None, *texts: Sequence[int], n_top: int) -> list[Scores]:
        """Of all tokens of each text but its first; see `Engine.score`. Raises Problem."""
        self._check_top(n_top)
        async with self._turn(key, model, len(texts)) as (_, opened), _until(self._deadline()):
            self._charge_prompts(key, sum(map(len, texts)))
            adapter = self._adapter(model, opened)
            scores = (opened.engine.ascore(text, n_top=n_top, adapter=adapter) for text in texts)
            return list(await asyncio.gather(*scores))

    async def pool(self, key: str, model: str | None, n: int, prepare: Callable[[Model], P]) -> tuple[str, P, Vectors]:
        """The model's name, what it prepared of n texts, and a vector of each; see `Engine.embed`. Raises Problem."""
        if not 1 <= n <= self.settings.max_inputs:
            raise Problem("invalid_request", f"{n} texts: a request may have 1 to {self.settings.max_inputs}")
        places = min(n, self.settings.max_choices, self.settings.max_running)  # so many are computed at once
        async with self._turn(key, model, places) as (name, opened), _until(self._deadline()):
            prepared = await asyncio.to_thread(prepare, opened)
            n_tokens = sum(map(len, prepared.texts))
            self._charge_prompts(key, n_tokens)
            room = asyncio.Semaphore(places)
            adapter = self._adapter(model, opened)

            async def vector(text: Sequence[int]) -> NDArray[np.float32]:
                async with room:
                    return await opened.engine.aembed(text, pooling=prepared.pooling, adapter=adapter)

            try:
                async with asyncio.TaskGroup() as group:  # ends the others where one fails
                    tasks = [group.create_task(vector(text)) for text in prepared.texts]
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            return name, prepared, Vectors(np.array([task.result() for task in tasks]), n_tokens)

    @asynccontextmanager
    async def opened(self, model: str | None) -> AsyncIterator[tuple[str, Model]]:
        """A model's name and the model, for what computes nothing. Raises Problem."""
        async with self.registry.use(model) as (name, opened):
            current.get().model = name
            try:
                yield name, opened
            except DapjiError as error:
                raise Problem.of(error) from error

    @asynccontextmanager
    async def _turn(self, key: str, model: str | None, n: int) -> AsyncIterator[tuple[str, Model]]:
        """A model's name and the model, when it is the turn of n requests to it."""
        if not 1 <= n <= self.settings.max_choices:
            raise Problem("invalid_request", f"n ({n}) must be from 1 to {self.settings.max_choices}", "n")
        self.registry.find(model)  # what is wrong shows before the wait for a turn
        async with AsyncExitStack() as held:
            try:
                async with _until(self._deadline()):
                    background = current.get().background
                    await held.enter_async_context(self.gate.enter(key, n, background=background))
                    opened = await held.enter_async_context(self.opened(model))
            except DeadlineError as error:
                raise Problem.of(error) from error
            yield opened

    @asynccontextmanager
    async def _answers(
        self,
        key: str,
        model: str | None,
        prepare: Callable[[Model], list[Callable[..., Prepared]]],
        n_prompts: int,
        n: int,
        options: Mapping[str, Any],
    ) -> AsyncIterator[Answers]:
        """prepare: one for each of n_prompts prompts."""
        self._check_top(options.get("logprobs") or 0)
        async with self._turn(key, model, n_prompts * n) as (name, opened):
            replies: list[_Timed] = []
            record, deadline = current.get(), self._deadline()
            try:
                async with _until(deadline):
                    # In a thread: templates and tokenizers take their time.
                    own = {**options, "adapter": self.registry.find(name).adapter}
                    prepared = await asyncio.to_thread(_prepared, prepare(opened), n, own)
                self._charge_prompts(key, sum(len(each.request.prompt) for each in prepared[::n]))
                for each in prepared:
                    if record.background:
                        each = replace(each, request=replace(each.request, background=True))
                    replies.append(_Timed(opened, each, record, self.metrics, deadline))
                yield Answers(name, opened, replies)
            finally:
                for reply in replies:
                    await reply.aclose()
                record.generated += (generated := sum(len(reply.tokens) for reply in replies))
                record.cached += sum(reply.finish.usage.cached for reply in replies[::n] if reply.finish is not None)
                if self._keys is not None and key and generated:
                    self._keys.charge(key, generated)

    def _charge_prompts(self, key: str, tokens: int) -> None:
        """Raises Problem where the key's quota does not hold them."""
        if self._keys is not None and key:
            self._keys.charge_prompt(key, tokens)
        current.get().prompt += tokens
        self.metrics.read(tokens)

    def _adapter(self, model: str | None, opened: Model) -> int:
        """The number of the one that a served name stands for."""
        return opened.adapter_number(self.registry.find(model).adapter)

    def _deadline(self) -> float | None:
        """Of the request that is being answered, on the loop's clock."""
        limit, record = self.settings.timeout, current.get()
        return None if limit is None or record.background else record.started + limit

    def _check_top(self, n: int) -> None:
        if n > self.settings.max_top:
            raise Problem(
                "invalid_request", f"{n} likeliest tokens are more than the {self.settings.max_top} told here"
            )


class _Timed(AsyncReply):
    """Its tokens' times are recorded, and it may not take longer than `deadline`, on the loop's clock."""

    def __init__(
        self, model: Model, prepared: Prepared, record: Record, metrics: Metrics, deadline: float | None
    ) -> None:
        super().__init__(model.engine, prepared)
        self._record = record
        self._metrics = metrics
        self._deadline = deadline
        self._told_tokens = 0
        self._last: float | None = None

    async def events(self) -> AsyncIterator[Event]:
        parts = super().events()
        while True:
            async with _until(self._deadline):
                part = await anext(parts, None)
            self._time()
            if part is None:
                return
            yield part

    def _time(self) -> None:
        """Tokens that came together, for a character or by speculation, share the time that they took."""
        new, now = len(self.tokens) - self._told_tokens, asyncio.get_running_loop().time()
        if new == 0:
            return
        self._told_tokens += new
        if self._last is None:
            first = now - self._record.started
            self._record.first_token = self._record.first_token or first
            self._metrics.begun(None if self._record.background else first)
            self._last, new = now, new - 1
        if new:
            self._metrics.went_on(new, (now - self._last) / new)
        self._last = now


@asynccontextmanager
async def _until(deadline: float | None) -> AsyncIterator[None]:
    """Raises DeadlineError when that time of the loop's clock is over."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        assert deadline is not None
        raise DeadlineError("the answer was not whole within this server's time for a request") from None


def _prepared(prepares: list[Callable[..., Prepared]], n: int, options: dict[str, Any]) -> list[Prepared]:
    """Each request n times; the seeds of those n count up."""
    seed = options.pop("seed", None)
    seeds = [None] * n if seed is None else [(seed + i) % 2**64 for i in range(n)]
    return [prepare(**options, seed=each) for prepare in prepares for each in seeds]
