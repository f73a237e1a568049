"""`Service`: the way from a checked request to a model's answer that all protocols share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

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
        return self._answers(key, model, lambda opened: partial(opened.prepare_chat, messages), n, options)

    def complete(
        self, key: str, model: str | None, prompt: str | Sequence[int], *, n: int = 1, **options: Any
    ) -> AbstractAsyncContextManager[Answers]:
        """n continuations of a text or of tokens, as `chat`."""
        return self._answers(key, model, lambda opened: partial(opened.prepare_completion, prompt), n, options)

    @asynccontextmanager
    async def opened(self, model: str | None) -> AsyncIterator[tuple[str, Model]]:
        """A model's name and the model, for what computes nothing. Raises Problem."""
        async with self.registry.use(model) as (name, opened):
            try:
                yield name, opened
            except DapjiError as error:
                raise Problem.of(error) from error

    @asynccontextmanager
    async def _answers(
        self,
        key: str,
        model: str | None,
        prepare: Callable[[Model], Callable[..., Prepared]],
        n: int,
        options: Mapping[str, Any],
    ) -> AsyncIterator[Answers]:
        if not 1 <= n <= self.settings.max_choices:
            raise Problem("invalid_request", f"n ({n}) must be from 1 to {self.settings.max_choices}", "n")
        self.registry.find(model)  # what is wrong shows before the wait for a turn
        async with self.gate.enter(key, n), self.registry.use(model) as (name, opened):
            replies: list[AsyncReply] = []
            try:
                # In a thread: templates and tokenizers take their time.
                for prepared in await asyncio.to_thread(_prepared, prepare(opened), n, dict(options)):
                    replies.append(AsyncReply(opened.engine, prepared))
                yield Answers(name, opened, replies)
            except DapjiError as error:
                raise Problem.of(error) from error
            finally:
                for reply in replies:
                    await reply.aclose()


def _prepared(prepare: Callable[..., Prepared], n: int, options: dict[str, Any]) -> list[Prepared]:
    """n times the same request; their seeds count up."""
    seed = options.pop("seed", None)
    seeds = [None] * n if seed is None else [(seed + i) % 2**64 for i in range(n)]
    return [prepare(**options, seed=each) for each in seeds]
