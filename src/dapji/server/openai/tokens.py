"""POST /tokenize and /detokenize: what a text is to a model. Not OpenAI's, but named as other local servers name it."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dapji.server.answering import ignored_fields
from dapji.server.openai.chat import Message, message_of
from dapji.server.problem import Problem
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read


class Text(Strict):
    """Either a text, in which control tokens are plain characters, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    """Whether a text begins with the model's BOS, if it wants one."""


class Tokens(Strict):
    tokens: list[int]
    model: str | None = None


@Reads(body=Text)
async def tokenize(request: Request) -> Response:
    """The tokens that a text or a conversation is to a model."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Text, limit=service.settings.max_body)
    if (asked.prompt is None) == (asked.messages is None):
        raise Problem("invalid_request", "give either prompt or messages", "prompt")
    async with service.opened(asked.model) as (name, model):

        def encode() -> list[int]:
            if asked.messages is not None:
                messages = [message_of(i, message) for i, message in enumerate(asked.messages)]
                return model.template.prompt(messages)
            assert asked.prompt is not None
            return model.encode(asked.prompt) if asked.add_special_tokens else model.tokenizer.encode(asked.prompt)

        tokens = await asyncio.to_thread(encode)
        body: dict[str, Any] = {"model": name, "tokens": tokens, "count": len(tokens)}
        return json_response(body | {"max_model_len": model.engine.context}, headers=ignored_fields(left_out))


@Reads(body=Tokens)
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Tokens, limit=service.settings.max_body)
    async with service.opened(asked.model) as (name, model):

        def decode() -> str:
            return b"".join(map(model.tokenizer.token_bytes, asked.tokens)).decode("utf-8", errors="replace")

        body = {"model": name, "prompt": await asyncio.to_thread(decode)}
        return json_response(body, headers=ignored_fields(left_out))
