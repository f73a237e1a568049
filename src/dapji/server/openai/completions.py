"""POST /v1/completions: texts and tokens continued as they are, without a chat template; and scored (`echo`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from dapji.chat.formats import Content
from dapji.engine import Scores
from dapji.errors import DapjiError
from dapji.model import AsyncReply, Model
from dapji.server.answering import (
    JsonObject,
    answered_in_parts,
    answered_whole,
    identifier,
    ignored_fields,
    key_of,
)
from dapji.server.openai.common import (
    Drawn,
    StreamOptions,
    Texts,
    problem_body,
    sampling_of,
    texts_of,
    usage_of,
)
from dapji.server.problem import Problem
from dapji.server.service import Answers, Service
from dapji.server.wire import Reads, event, event_stream, json_response, merged, read, while_connected
from dapji.tokenizer import Detokenizer, Tokenizer


class Asked(Drawn, kw_only=True):
    """What may stand in a request; see `chat.Asked`."""

    prompt: Texts
    model: str | None = None
    max_tokens: int | None = 16
    n: int = 1
    logprobs: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    user: str | None = None  # changes no answer


@dataclass(frozen=True, kw_only=True, eq=False)
class Echo:
    """A prompt, as the answer repeats it."""

    tokens: list[int]
    text: str
    scores: Scores | None
    """Where log-probabilities were asked for; of all tokens but the first."""


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Continues texts or tokens as they are, without a chat template; with `echo` it scores them."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    headers = ignored_fields(left_out)
    prompts, options = texts_of("prompt", asked.prompt), _options(asked)
    key = key_of(request)
    echoes = None
    if asked.echo:
        echoes = await while_connected(request, asyncio.ensure_future(_echoes(service, key, asked, prompts)))
    if asked.max_tokens == 0:
        return await _scored(service, asked, echoes, headers)
    answers = service.complete(key, asked.model, *prompts, n=asked.n, **options)
    if asked.stream:
        return await answered_in_parts(request, answers, partial(_streamed, asked, echoes), event_stream, headers)
    return await answered_whole(request, answers, partial(_whole, asked, echoes), headers)


def _options(asked: Asked) -> JsonObject:
    if asked.logprobs is not None and asked.logprobs < 0:
        raise Problem("invalid_request", f"logprobs ({asked.logprobs}) must be at least 0", "logprobs")
    if asked.max_tokens == 0 and (not asked.echo or asked.stream):
        raise Problem("invalid_request", "max_tokens 0 needs echo, and no stream: there is nothing else", "max_tokens")
    return sampling_of(asked) | {"max_tokens": asked.max_tokens, "logprobs": asked.logprobs}


async def _echoes(service: Service, key: str, asked: Asked, prompts: Sequence[str | list[int]]) -> list[Echo]:
    """Of each prompt. Scores come before the answers, which then find the prompt in the cache."""
    async with service.opened(asked.model) as (_, model):

        def read() -> list[tuple[list[int], str]]:
            return [
                (model.encode(prompt), prompt)
                if isinstance(prompt, str)
                else (prompt, model.tokenizer.decode(prompt, skip_control=False))
                for prompt in prompts
            ]

        read_prompts = await asyncio.to_thread(read)
    scored: list[Scores] = []
    if asked.logprobs is not None:
        long = [tokens for tokens, _ in read_prompts if len(tokens) > 1]
        scored = await service.score(key, asked.model, *long, n_top=asked.logprobs) if long else []
    scores = iter(scored)
    return [
        Echo(
            tokens=tokens,
            text=text,
            scores=next(scores) if asked.logprobs is not None and len(tokens) > 1 else None,
        )
        for tokens, text in read_prompts
    ]


class _Choice:
    """One choice so far: its echo first, then the answer; log-probabilities in the form of this endpoint."""

    def __init__(self, asked: Asked, model: Model, echo: Echo | None) -> None:
        self._wanted = asked.logprobs is not None
        self._tokenizer = model.tokenizer
        self._offset = 0
        self._told = 0
        self._text = Detokenizer(model.tokenizer, continuation=True)
        self.text = "" if echo is None else echo.text
        self.logprobs = self._of_echo(echo) if echo is not None and self._wanted else None

    def answer(self, reply: AsyncReply) -> JsonObject | None:
        """Of the answer's tokens that have not been told; an end token is one of them."""
        if not self._wanted:
            return None
        tokens, logprobs = reply.tokens[self._told :], reply.logprobs[self._told :]
        self._told = len(reply.tokens)
        top = [_top(self._tokenizer, t, each.chosen, each.top) for t, each in zip(tokens, logprobs, strict=True)]
        return self._lists(self._text, tokens, [each.chosen for each in logprobs], top)

    def _of_echo(self, echo: Echo) -> JsonObject:
        chosen: list[float] = [] if echo.scores is None else echo.scores.chosen.tolist()
        tops = [] if echo.scores is None else echo.scores.top
        named = [
            _top(self._tokenizer, token, value, top)
            for token, value, top in zip(echo.tokens[1:], chosen, tops, strict=True)
        ]
        lists = self._lists(
            Detokenizer(self._tokenizer, skip_control=False), echo.tokens, [None, *chosen], [None, *named]
        )
        self._offset = len(echo.text)
        return lists

    def _lists(
        self, text: Detokenizer, tokens: Sequence[int], chosen: Sequence[float | None], top: Sequence[JsonObject | None]
    ) -> JsonObject:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(text.push(token))
        return {
            "tokens": [_name(self._tokenizer, token) for token in tokens],
            "token_logprobs": list(chosen),
            "top_logprobs": list(top),
            "text_offset": offsets,
        }


def _name(tokenizer: Tokenizer, token: int) -> str:
    """Its text; of a part of a character the bytes, so that no two tokens of other bytes are called alike."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(tokenizer: Tokenizer, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> JsonObject:
    """The likeliest tokens, and the one that stands there in any case."""
    named: JsonObject = {}
    for other, value in (*top, (token, logprob)):
        named.setdefault(_name(tokenizer, other), value)
    return named


def _joined(first: JsonObject | None, second: JsonObject | None) -> JsonObject | None:
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}


def _head(name: str) -> JsonObject:
    return {"id": identifier("cmpl"), "object": "text_completion", "created": int(time.time()), "model": name}


def _choices(asked: Asked, model: Model, echoes: Sequence[Echo] | None, n: int) -> list[_Choice]:
    return [_Choice(asked, model, None if echoes is None else echoes[i // asked.n]) for i in range(n)]


async def _scored(service: Service, asked: Asked, echoes: Sequence[Echo] | None, headers: dict[str, str]) -> Response:
    assert echoes is not None
    async with service.opened(asked.model) as (name, model):
        choices = _choices(asked, model, echoes, len(echoes) * asked.n)
    told = [
        {"index": i, "text": choice.text, "finish_reason": "length", "logprobs": choice.logprobs}
        for i, choice in enumerate(choices)
    ]
    n_tokens = sum(len(echo.tokens) for echo in echoes)
    usage = {"prompt_tokens": n_tokens, "completion_tokens": 0, "total_tokens": n_tokens}
    return json_response(_head(name) | {"choices": told, "usage": usage}, headers=headers)


async def _whole(asked: Asked, echoes: Sequence[Echo] | None, opened: Answers) -> JsonObject:
    await opened.end()
    told = []
    choices = _choices(asked, opened.model, echoes, len(opened.replies))
    for i, (choice, reply) in enumerate(zip(choices, opened.replies, strict=True)):
        assert reply.finish is not None
        logprobs = _joined(choice.logprobs, choice.answer(reply))
        told.append(
            {"index": i, "text": choice.text + reply.text, "finish_reason": reply.finish.reason, "logprobs": logprobs}
        )
    return _head(opened.name) | {"choices": told, "usage": usage_of(opened.replies, n=asked.n)}


async def _streamed(asked: Asked, echoes: Sequence[Echo] | None, opened: Answers) -> AsyncIterator[bytes]:
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    head = _head(opened.name) | ({"usage": None} if usage else {})

    def chunk(index: int, text: str, logprobs: JsonObject | None, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return event(head | {"choices": [choice]})

    choices = _choices(asked, opened.model, echoes, len(opened.replies))
    try:
        if echoes is not None:
            for i, choice in enumerate(choices):
                yield chunk(i, choice.text, choice.logprobs)
        async for i, part in merged([reply.events() for reply in opened.replies]):
            if isinstance(part, Content) and part.text:
                yield chunk(i, part.text, choices[i].answer(opened.replies[i]))
        for i, reply in enumerate(opened.replies):
            assert reply.finish is not None
            yield chunk(i, "", choices[i].answer(reply), reply.finish.reason)
        if usage:
            yield event(head | {"choices": [], "usage": usage_of(opened.replies, n=asked.n)})
    except DapjiError as error:
        yield event(problem_body(Problem.of(error)))
    yield b"data: [DONE]\n\n"
