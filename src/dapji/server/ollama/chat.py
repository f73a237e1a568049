"""POST /api/chat and /api/generate: lines of JSON, or one object with `"stream": false`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dapji.chat.formats import Content, Reasoning, ToolCall
from dapji.errors import DapjiError
from dapji.model import AsyncReply
from dapji.server.answering import (
    JsonObject,
    answered_in_parts,
    answered_whole,
    arguments_of,
    identifier,
    ignored_fields,
    key_of,
    logprobs_of,
)
from dapji.server.ollama import problem_body
from dapji.server.ollama.asked import (
    Asked,
    AskedChat,
    AskedText,
    chat_options,
    check_context,
    ignored_of,
    keep_open,
    messages_of,
    options_of,
    refuse_images,
)
from dapji.server.problem import Problem
from dapji.server.service import Answers, Service
from dapji.server.wire import Reads, json_response, line_stream, read

Piece = Callable[[str, str, Sequence[ToolCall]], JsonObject]
"""Content, reasoning and tool calls in the form of an endpoint."""


@Reads(body=AskedChat)
async def chat(request: Request) -> Response:
    """Answers a conversation: lines of JSON, or one object where `stream` is false."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, AskedChat, limit=service.settings.max_body)
    answers = None
    if asked.messages:
        answers = service.chat(key_of(request), asked.model, messages_of(asked), **chat_options(asked))
    return await _answer(request, asked, answers, _message, left_out)


@Reads(body=AskedText)
async def generate(request: Request) -> Response:
    """Answers a prompt: lines of JSON, or one object where `stream` is false."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, AskedText, limit=service.settings.max_body)
    refuse_images(asked.images, "images")
    key, answers = key_of(request), None
    if asked.prompt and asked.raw:
        for name in ("system", "think"):
            if getattr(asked, name):
                raise Problem("invalid_request", f"{name} is the chat template's, which raw leaves out", name)
        answers = service.complete(key, asked.model, asked.prompt, **options_of(asked))
    elif asked.prompt:
        messages = [{"role": "system", "content": asked.system}] if asked.system else []
        messages.append({"role": "user", "content": asked.prompt})
        answers = service.chat(key, asked.model, messages, thinking=asked.think, **options_of(asked))
    return await _answer(request, asked, answers, _text, left_out)


async def _answer(
    request: Request,
    asked: Asked,
    answers: AbstractAsyncContextManager[Answers] | None,
    piece: Piece,
    left_out: list[str],
) -> Response:
    """answers None: nothing is asked, but that the model be open."""
    started = time.perf_counter_ns()
    service: Service = request.app.state.service
    served = service.registry.find(asked.model)
    left_out += keep_open(service.registry, served.name, asked.keep_alive)
    headers = ignored_fields(left_out + ignored_of(asked.options))
    if answers is None:
        unload = asked.keep_alive is not None and served.keep == 0
        if unload:
            service.registry.rest(served)
        else:
            async with service.opened(served.name):
                pass
        told = _head(served.name) | piece("", "", [])
        return json_response(told | {"done": True, "done_reason": "unload" if unload else "load"}, headers=headers)
    checked = _with_context(answers, (asked.options and asked.options.num_ctx) or 0)
    if asked.stream:
        sign = _line(_head(served.name) | piece("", "", []) | {"done": False})
        stream = partial(line_stream, sign=sign)
        return await answered_in_parts(request, checked, partial(_streamed, asked, piece, started), stream, headers)
    return await answered_whole(request, checked, partial(_whole, asked, piece, started), headers)


@asynccontextmanager
async def _with_context(answers: AbstractAsyncContextManager[Answers], n: int) -> AsyncIterator[Answers]:
    """Raises Problem; see `check_context`."""
    async with answers as opened:
        check_context(n, opened.model)
        yield opened


async def _whole(asked: Asked, piece: Piece, started: int, opened: Answers) -> JsonObject:
    loaded = time.perf_counter_ns()
    await opened.end()
    (reply,) = opened.replies
    told = piece(reply.text, reply.reasoning, reply.tool_calls)
    return _head(opened.name) | told | _logprobs(asked, opened, 0) | _end(reply, started, loaded)


async def _streamed(asked: Asked, piece: Piece, started: int, opened: Answers) -> AsyncIterator[bytes]:
    loaded = time.perf_counter_ns()
    (reply,) = opened.replies
    n_told = 0  # tokens whose log-probabilities have been
    try:
        async for part in reply.events():
            told = None
            if isinstance(part, ToolCall):
                told = piece("", "", [part])
            elif isinstance(part, Reasoning) and part.text:
                told = piece("", part.text, [])
            elif isinstance(part, Content) and part.text:
                told = piece(part.text, "", [])
            if told is not None:
                yield _line(_head(opened.name) | told | _logprobs(asked, opened, n_told) | {"done": False})
                n_told = len(reply.tokens)
        last = piece("", "", []) | _logprobs(asked, opened, n_told)
        yield _line(_head(opened.name) | last | _end(reply, started, loaded))
    except DapjiError as error:
        yield _line(problem_body(Problem.of(error)))


def _logprobs(asked: Asked, opened: Answers, start: int) -> JsonObject:
    """Of the tokens from `start` on."""
    told = logprobs_of(opened.model.tokenizer, opened.replies[0], start) if asked.logprobs else []
    return {"logprobs": told} if told else {}


def _line(value: JsonObject) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def _head(name: str) -> JsonObject:
    return {"model": name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def _message(content: str, thinking: str, calls: Sequence[ToolCall]) -> JsonObject:
    message: JsonObject = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return {"message": message}


def _text(content: str, thinking: str, calls: Sequence[ToolCall]) -> JsonObject:
    """Without tools, there are no calls."""
    return {"response": content} | ({"thinking": thinking} if thinking else {})


def _call(call: ToolCall) -> JsonObject:
    function = {"name": call.name, "arguments": arguments_of(call.arguments)}
    return {"id": call.id or identifier("call"), "function": function}


def _end(reply: AsyncReply, started: int, loaded: int) -> JsonObject:
    """Durations are nanoseconds. Loading includes the wait for a turn."""
    assert reply.finish is not None
    usage, timings = reply.finish.usage, reply.finish.timings
    return {
        "done": True,
        "done_reason": reply.finish.reason,
        "total_duration": time.perf_counter_ns() - started,
        "load_duration": loaded - started,
        "prompt_eval_count": usage.prompt,
        "prompt_eval_duration": round(timings.first_token * 1e9),
        "eval_count": usage.generated,
        "eval_duration": round(timings.decode * 1e9),
    }
