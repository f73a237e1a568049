"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dapji.chat.formats import Content, Reasoning, ToolCall
from dapji.engine import Usage
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
)
from dapji.server.anthropic import problem_body
from dapji.server.anthropic.asked import (
    Asked,
    Counted,
    ThinkingEnabled,
    messages_of,
    options_of,
    prompt_options,
)
from dapji.server.problem import Problem
from dapji.server.service import Answers, Service
from dapji.server.wire import Reads, event, event_stream, json_response, read

_PING = event({"type": "ping"}, "ping")


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Answers a conversation."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    if isinstance(asked.thinking, ThinkingEnabled) and asked.thinking.budget_tokens is not None:
        left_out.append("thinking.budget_tokens")
    answers = service.chat(key_of(request), asked.model, messages_of(asked), **options_of(asked))
    headers = ignored_fields(left_out)
    if asked.stream:
        return await answered_in_parts(request, answers, _streamed, partial(event_stream, sign=_PING), headers)
    return await answered_whole(request, answers, _whole, headers)


@Reads(body=Counted)
async def count(request: Request) -> Response:
    """The tokens of the prompt that the same fields make for `create`."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Counted, limit=service.settings.max_body)
    messages = messages_of(asked)
    async with service.opened(asked.model) as (_, model):
        prepared = await asyncio.to_thread(partial(model.prepare_chat, messages, **prompt_options(asked)))
    return json_response({"input_tokens": len(prepared.request.prompt)}, headers=ignored_fields(left_out))


async def _streamed(opened: Answers) -> AsyncIterator[bytes]:
    try:
        async for part in _events(opened):
            yield event(part, part["type"])
    except DapjiError as error:
        body = problem_body(Problem.of(error))
        yield event(body, body["type"])


async def _whole(opened: Answers) -> JsonObject:
    """What a client makes of the stream."""
    message: JsonObject = {}
    blocks: list[JsonObject] = []
    async for part in _events(opened):
        if part["type"] == "message_start":
            message = part["message"]
            blocks = message["content"]
        elif part["type"] == "content_block_start":
            blocks.append(part["content_block"])
        elif part["type"] == "content_block_delta":
            _add(blocks[-1], part["delta"])
        elif part["type"] == "message_delta":
            message |= part["delta"]
            message["usage"] = part["usage"]
    return message


def _add(block: JsonObject, delta: JsonObject) -> None:
    if delta["type"] == "input_json_delta":
        block["input"] = msgspec.json.decode(delta["partial_json"])
    else:
        block[block["type"]] += delta[block["type"]]  # a text block's text, a thinking block's thinking


async def _events(opened: Answers) -> AsyncIterator[JsonObject]:
    """The events of a stream, in the order of Anthropic's "Streaming Messages"."""
    (reply,) = opened.replies
    # What of the prompt was cached is known at the end; until then all of it counts as read.
    message: JsonObject = {
        "id": identifier("msg", "_"),
        "type": "message",
        "role": "assistant",
        "model": opened.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": reply.prompt_length, "output_tokens": 0},
    }
    yield {"type": "message_start", "message": message}
    index, kind = -1, None
    async for part in reply.events():
        if isinstance(part, ToolCall):
            block = {"type": "tool_use", "id": part.id or identifier("toolu", "_"), "name": part.name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": _json(arguments_of(part.arguments))}
        elif isinstance(part, Reasoning) and part.text:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            delta = {"type": "thinking_delta", "thinking": part.text}
        elif isinstance(part, Content) and part.text:
            block = {"type": "text", "text": ""}
            delta = {"type": "text_delta", "text": part.text}
        else:
            continue
        if block["type"] != kind or kind == "tool_use":
            if index >= 0:
                yield {"type": "content_block_stop", "index": index}
            index, kind = index + 1, block["type"]
            yield {"type": "content_block_start", "index": index, "content_block": block}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    if index >= 0:
        yield {"type": "content_block_stop", "index": index}
    assert reply.finish is not None
    ended = {"stop_reason": _stop_reason(reply), "stop_sequence": reply.stop_string}
    yield {"type": "message_delta", "delta": ended, "usage": _usage(reply.finish.usage)}
    yield {"type": "message_stop"}


def _json(value: JsonObject) -> str:
    return msgspec.json.encode(value).decode()


def _stop_reason(reply: AsyncReply) -> str:
    if reply.stop_string is not None:
        return "stop_sequence"
    if reply.finish is not None and reply.finish.reason == "length":
        return "max_tokens"
    return "tool_use" if reply.tool_calls else "end_turn"


def _usage(usage: Usage) -> dict[str, Any]:
    """All prompt tokens are input_tokens and cache_read_input_tokens together."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.generated,
    }
