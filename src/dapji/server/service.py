"""`Service`: the way from a checked request to a model's answer that all protocols share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from dapji.engine import Scores
from dapji.errors import DapjiError
from dapji.model import AsyncReply, Model, Prepared
from dapji.server.gate import Gate
from dapji.server.problem import Problem
from dapji.server.registry import Registry
from dapji.server.settings import Settings


@dataclass(frozen=True, eq=False)
class Answers:
    """To one prompt."""

    name: str
    """Of the model."""
    model: Model
    replies: Sequence[AsyncReply]

    async def end(self) -> None:
        """Waits until all have ended. Raises what ended one, if it was an error."""
        await asyncio.gather(*map(_read, self.replies))


async def _read(reply: AsyncReply) -> None:
    async for _ in reply.events():
        pass


class Service:
    """For one asyncio loop."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry = registry
        self.settings = settings
        self.gate = Gate(running=settings.max_running, waiting=settings.max_waiting)

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
        async with self._turn(key, model, len(texts)) as (_, opened):
            return list(await asyncio.gather(*(opened.engine.ascore(text, n_top=n_top) for text in texts)))

    @asynccontextmanager
    async def opened(self, model: str | None) -> AsyncIterator[tuple[str, Model]]:
        """A model's name and the model, for what computes nothing. Raises Problem."""
        async with self.registry.use(model) as (name, opened):
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
        async with self.gate.enter(key, n), self.opened(model) as opened:
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
            replies: list[AsyncReply] = []
            try:
                # In a thread: templates and tokenizers take their time.
                for prepared in await asyncio.to_thread(_prepared, prepare(opened), n, dict(options)):
                    replies.append(AsyncReply(opened.engine, prepared))
                yield Answers(name, opened, replies)
            finally:
                for reply in replies:
                    await reply.aclose()

    def _check_top(self, n: int) -> None:
        if n > self.settings.max_top:
            raise Problem(
                "invalid_request", f"{n} likeliest tokens are more than the {self.settings.max_top} told here"
            )


def _prepared(prepares: list[Callable[..., Prepared]], n: int, options: dict[str, Any]) -> list[Prepared]:
    """Each request n times; the seeds of those n count up."""
    seed = options.pop("seed", None)
    seeds = [None] * n if seed is None else [(seed + i) % 2**64 for i in range(n)]
    return [prepare(**options, seed=each) for prepare in prepares for each in seeds]
