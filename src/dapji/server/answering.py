"""What every protocol does alike between a request and its answer; only the forms of both are its own."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dapji.chat.formats import ToolChoice
from dapji.model import AsyncReply
from dapji.server.service import Answers
from dapji.server.wire import Streamed, json_response, while_connected
from dapji.tokenizer import Tokenizer

JsonObject = dict[str, Any]


def key_of(request: Request) -> str:
    """Whose turn it is."""
    key: str = getattr(request.state, "key", "")
    return key


def identifier(kind: str, separator: str = "-") -> str:
    return f"{kind}{separator}{secrets.token_hex(12)}"


def ignored_fields(names: list[str]) -> dict[str, str]:
    """The header that tells what of a request was left out, if anything was; percent-encoded what no header holds."""
    return {"Dapji-Ignored-Fields": ", ".join(quote(name, safe="[]") for name in names)} if names else {}


def template_call(name: str, arguments: Mapping[str, Any], id: str | None = None) -> JsonObject:
    """A call of a tool in an assistant's message, as templates read it."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id is None else {"id": id} | call


def template_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> JsonObject:
    """A tool that may be called, as templates read it."""
    described: JsonObject = {"name": name}
    if description is not None:
        described["description"] = description
    if parameters is not None:
        described["parameters"] = parameters
    return {"type": "function", "function": described}


def tool_options(
    tools: Iterable[JsonObject],
    choice: Literal["auto", "none", "required"],
    *,
    names: Iterable[str] | None = None,
    parallel: bool | None = None,
) -> JsonObject:
    """Options of `Model.chat`. tools: as templates read them; names: of those that may be called, None: all."""
    if choice == "none":
        return {}
    chosen = None if names is None else frozenset(names)
    given: JsonObject = {
        "tool_choice": ToolChoice(required=choice == "required", names=chosen, parallel=parallel is not False)
    }
    return given | ({"tools": described} if (described := list(tools)) else {})


def arguments_of(written: str) -> JsonObject:
    """The object that a model wrote as a call's arguments, for templates and for protocols whose calls hold an object.
    Where it wrote none, what it wrote as a text under the key INVALID_JSON, as Anthropic's documentation of tools'
    inputs advises: a conversation goes on after a call that failed."""
    with suppress(msgspec.DecodeError, RecursionError):
        arguments = msgspec.json.decode(written or "{}")
        if isinstance(arguments, dict):
            return arguments
    return {"INVALID_JSON": written}


def logprobs_of(tokenizer: Tokenizer, reply: AsyncReply, start: int = 0) -> list[JsonObject]:
    """The log-probabilities that were asked for, of the tokens from `start` on that have text."""
    tokens, logprobs = reply.tokens[start:], reply.logprobs[start:]
    if reply.finish is not None and reply.finish.stop_token is not None:
        tokens, logprobs = tokens[:-1], logprobs[:-1]
    return [
        _token(tokenizer, token, each.chosen)
        | {"top_logprobs": [_token(tokenizer, other, value) for other, value in each.top]}
        for token, each in zip(tokens, logprobs, strict=True)
    ]


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> JsonObject:
    """A token need not be whole characters: its bytes say what its text cannot."""
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}


async def answered_whole(
    request: Request,
    answers: AbstractAsyncContextManager[Answers],
    body: Callable[[Answers], Awaitable[object]],
    headers: dict[str, str],
) -> Response:
    """Ends the answers when the client goes away. body: waits for their ends."""

    async def answer() -> Response:
        async with answers as opened:
            return json_response(await body(opened), headers=headers)

    return await while_connected(request, asyncio.ensure_future(answer()))


async def answered_in_parts(
    request: Request,
    answers: AbstractAsyncContextManager[Answers],
    parts: Callable[[Answers], AsyncIterator[bytes]],
    stream: Callable[[AsyncIterator[bytes], AsyncExitStack, dict[str, str]], Streamed],
    headers: dict[str, str],
) -> Response:
    """stream: `event_stream` or `line_stream`. What is wrong with the request is raised before the first byte, and a
    client that goes away before its turn gives up its place."""
    async with AsyncExitStack() as stack:
        opened = await while_connected(request, asyncio.ensure_future(stack.enter_async_context(answers)))
        return stream(parts(opened), stack.pop_all(), headers)
    raise AssertionError("the stack lets every exception pass")
