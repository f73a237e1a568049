"""POST /page/conversations/ID/answers: an answer as it is written, which is kept however it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dapji.chat.formats import Content, Reasoning, ToolCall
from dapji.errors import DapjiError
from dapji.model import AsyncReply
from dapji.server.answering import JsonObject, answered_in_parts, ignored_fields, key_of, template_tool
from dapji.server.page.conversations import (
    Call,
    Conversation,
    ConversationStore,
    Number,
    Settings,
    Turn,
    Usage,
)
from dapji.server.page.exported import template_messages
from dapji.server.page.markdown import GrowingMarkdown, render
from dapji.server.problem import Problem
from dapji.server.service import Answers, Service
from dapji.server.wire import Reads, Strict, event, event_stream, read

SHORTEST = 0.05
"""Seconds between two looks at a growing answer."""
SHARE = 0.1
"""Of the time, which an answer's rendering takes at most."""


class Asked(Strict):
    parent: Number
    """The user's turn to answer."""


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Answers a turn, with the conversation's model and settings, as a stream of events."""
    service: Service = request.app.state.service
    store: ConversationStore = request.app.state.conversations
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    key, name = key_of(request), request.path_params["id"]
    conversation = await store.get(key, name)
    branch = conversation.branch(asked.parent)
    if branch[-1].role != "user":
        raise Problem("invalid_request", f"turn {asked.parent} is an answer, which is not answered", "parent")
    answers = service.chat(
        key,
        conversation.settings.model,
        template_messages(conversation.settings, branch),
        **_options(conversation.settings),
    )
    writing = _Writing(store, key, conversation, asked.parent)
    kept = _kept(answers, writing, request.app.state.writing)
    return await answered_in_parts(request, kept, writing.events, event_stream, ignored_fields(left_out))


def _options(settings: Settings) -> JsonObject:
    """Of `Model.chat`, those that are set."""
    names = ("temperature", "top_p", "max_tokens", "seed", "thinking")
    options = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if settings.tools:
        functions = [tool.function for tool in settings.tools]
        options["tools"] = [template_tool(each.name, each.description, each.parameters) for each in functions]
    return options


def under_way(request: Request, name: str) -> list[int]:
    """The turns of a conversation that are being answered."""
    return [writing.parent for writing in request.app.state.writing if writing.name == name]


def told(turn: Turn) -> JsonObject:
    """A turn as the page gets it."""
    described: JsonObject = msgspec.to_builtins(turn)
    return described | ({"html": render(turn.content)} if turn.role == "assistant" else {})


@asynccontextmanager
async def _kept(
    answers: AbstractAsyncContextManager[Answers], writing: _Writing, all: set[_Writing]
) -> AsyncIterator[Answers]:
    all.add(writing)
    try:
        async with answers as opened:
            try:
                yield opened
            finally:
                with suppress(Problem):  # of a conversation that was deleted meanwhile
                    await writing.keep("stopped")  # where it had no other end, its reader is gone
    finally:
        all.remove(writing)


class _Writing:
    """An answer to one turn, from its beginning until it is kept."""

    def __init__(self, store: ConversationStore, key: str, conversation: Conversation, parent: int) -> None:
        self._store = store
        self._key = key
        self.name = conversation.id
        self.parent = parent
        self._growing = GrowingMarkdown()
        self._looked = 0.0
        self._pause = SHORTEST
        self._opened: Answers | None = None
        self._began = time.monotonic()
        self._first = self._last = self._began
        self._ended = False

    async def events(self, opened: Answers) -> AsyncIterator[bytes]:
        self._opened = opened
        (reply,) = opened.replies
        beginning = {"model": opened.name, "prompt": reply.prompt_length, "context": opened.model.engine.context}
        yield event(beginning, "start")
        end: Literal["stop", "length", "failed"]
        error = None
        try:
            async for part in reply.events():
                self._last = time.monotonic()
                self._first = self._last if len(reply.tokens) <= 1 else self._first
                if isinstance(part, Reasoning) and part.text:
                    yield event({"text": part.text} | self._progress(reply), "reasoning")
                elif isinstance(part, ToolCall):
                    yield event({"name": part.name, "arguments": part.arguments}, "call")
                elif isinstance(part, Content):
                    self._growing.text += part.text
                    if self._last >= self._looked + self._pause:
                        yield await self._blocks(reply)
            assert reply.finish is not None
            end = "length" if reply.finish.reason == "length" else "stop"
        except DapjiError as raised:
            end, error = "failed", Problem.of(raised).message
        try:
            turn = await self.keep(end, error)
        except (DapjiError, Problem) as raised:
            problem = raised if isinstance(raised, Problem) else Problem.of(raised)
            yield event({"message": problem.message}, "error")
            return
        if turn is None:
            yield event({"message": error or "the answer is empty"}, "error")
            return
        yield event(told(turn), "done")

    async def keep(self, end: Literal["stop", "length", "stopped", "failed"], error: str | None = None) -> Turn | None:
        """Adds the answer to the conversation, this once. None: nothing was written."""
        if self._ended or self._opened is None:
            return None
        self._ended = True
        opened, (reply,) = self._opened, self._opened.replies
        calls = [Call(name=call.name, arguments=call.arguments) for call in reply.tool_calls]
        if end in ("stopped", "failed") and not (reply.text or reply.reasoning or calls):
            return None
        usage = Usage(
            prompt=reply.prompt_length,
            cached=0 if reply.finish is None else reply.finish.usage.cached,
            generated=len(reply.tokens),
            context=opened.model.engine.context,
            waited=round(self._first - self._began, 3),
            seconds=round(self._last - self._first, 3),
        )
        values: dict[str, Any] = {"content": reply.text, "reasoning": reply.reasoning, "calls": calls, "usage": usage}
        values |= {"model": opened.name, "finish": end, "error": error, "created": time.time()}
        # Whoever goes away at this moment does not take it along.
        return await asyncio.shield(
            self._store.add(self._key, self.name, partial(Turn, parent=self.parent, role="assistant", **values))
        )

    async def _blocks(self, reply: AsyncReply) -> bytes:
        began = time.monotonic()
        update = await asyncio.to_thread(self._growing.update)
        self._looked = time.monotonic()
        self._pause = max(SHORTEST, (self._looked - began) / SHARE)
        return event({"finished": update.finished, "open": update.open} | self._progress(reply), "content")

    def _progress(self, reply: AsyncReply) -> JsonObject:
        return {"generated": len(reply.tokens), "seconds": round(self._last - self._first, 3)}
