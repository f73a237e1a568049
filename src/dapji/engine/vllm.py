"""`VllmEngine`: requests that a vLLM server computes, on this machine or on many.

Speaks vLLM's /v1/completions, token ids in and out, on a thread of its own. What vLLM would do otherwise than `Request`
says is refused by name. Knows neither text nor templates; how a server is started is `vllm_process`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from threading import Thread
from time import perf_counter
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from dapji.engine.base import BaseEngine, Deliver, Handle
from dapji.engine.request import Finish, Logprobs, Output, Request, Sampling, Scores, Timings, Usage
from dapji.engine.vllm_http import Address, Answer, ask
from dapji.errors import ContextError, DapjiError, RequestError, UnavailableError, UsageError
from dapji.models.config import Pooling

T = TypeVar("T")

_MIN_TEMPERATURE = 0.01
"""vLLM raises lower ones to it."""
_MAX_SEED = 2**63 - 1


class _Card(msgspec.Struct):
    """Of /v1/models."""

    id: str
    max_model_len: int
    parent: str | None = None
    """Of an adapter: the model that it changes."""


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Tokenized(msgspec.Struct):
    tokens: list[int]


class _Logprob(msgspec.Struct):
    logprob: float


class _Told(msgspec.Struct):
    """Log-probabilities of generated tokens; a token is written "token_id:7"."""

    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Told | None = None
    finish_reason: str | None = None
    prompt_logprobs: list[dict[int, _Logprob] | None] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Used(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Fault(msgspec.Struct):
    message: str
    code: int | str | None = None


class _Completion(msgspec.Struct):
    """An event of a stream, or a whole answer."""

    choices: list[_Choice] = []
    usage: _Used | None = None
    error: _Fault | None = None


class VllmEngine(BaseEngine):
    """Its thread starts at once and ends with `close()`.

    What vLLM does not tell: an answer that `Request.stop` ends counts no prompt tokens as cached, nor does any where
    the server runs without --enable-prompt-tokens-details; `Usage.proposed` is always 0. Whose turn it is vLLM decides:
    `Request.background` changes nothing.
    """

    def __init__(self, address: Address, *, end_tokens: Iterable[int] = (), vocab_size: int) -> None:
        """Of a server that is ready. end_tokens: the ids that end every answer. vocab_size: the tokenizer's; vLLM draws
        beyond it where the weights have more, which ends the request.

        Raises UnavailableError where the server does not answer as one does.
        """
        self._address = address
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="dapji-vllm", daemon=True)
        self._thread.start()
        try:
            cards = self._wait(self._asked("/v1/models", None, _Cards)).data
            card = next((card for card in cards if card.parent is None), None)
            if card is None:
                raise UnavailableError(f"vLLM at {address} serves no model")
            super().__init__(context=card.max_model_len, vocab_size=vocab_size, end_tokens=end_tokens)
        except BaseException:
            self.close()
            raise
        self._model = card.id

    def tokenize(self, text: str) -> list[int]:
        """The ids that vLLM reads a text as: whoever knows the tokenizer can tell whether it serves the same model.
        Raises UnavailableError."""
        body = msgspec.json.encode({"model": self._model, "prompt": text, "add_special_tokens": False})
        return self._wait(self._asked("/tokenize", body, _Tokenized)).tokens

    def close(self) -> None:
        """Ends what still runs with a UsageError, stops the thread. May be repeated."""
        if self._closed:
            return
        self._closed = True
        self._wait(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _submit_generation(
        self, request: Request, prompt: NDArray[np.int32], room: int, stop_tokens: frozenset[int], deliver: Deliver
    ) -> Handle:
        _check_no_adapter(request.adapter)
        body = {
            "model": self._model,
            "prompt": prompt.tolist(),
            "max_tokens": room,
            "min_tokens": request.min_tokens,
            "stop_token_ids": sorted(stop_tokens),
            "ignore_eos": True,  # all that end an answer are in stop_token_ids
            "logprobs": request.logprobs,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **_sampling(request.sampling),
        }
        if request.constraint is not None:
            body["structured_outputs"] = _structured(request.constraint.source)
        return self._submit(self._generate_all(request, msgspec.json.encode(body), room, stop_tokens, deliver), deliver)

    def _submit_scoring(
        self, tokens: NDArray[np.int32], start: int, n_top: int, adapter: int, deliver: Deliver
    ) -> Handle:
        _check_no_adapter(adapter)
        if len(tokens) >= self.context:
            raise ContextError(
                f"the text ({len(tokens)} tokens) and the one that vLLM generates behind it exceed the context "
                f"({self.context} tokens)",
                hint="score it in pieces, or start vLLM with a longer context",
            )
        body = {
            "model": self._model,
            "prompt": tokens.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": n_top,
        }
        return self._submit(self._score_all(tokens, msgspec.json.encode(body), start, n_top, deliver), deliver)

    def _submit_embedding(self, tokens: NDArray[np.int32], pooling: Pooling, adapter: int, deliver: Deliver) -> Handle:
        raise RequestError(
            "this server's model runs on vLLM, which is asked for tokens: it gives no embeddings",
            hint="serve an embedding model with Dapji's own engine",
        )

    def _submit(self, work: Coroutine[Any, Any, None], deliver: Deliver) -> Handle:
        if self._closed:
            work.close()
            raise UsageError("the engine is closed")
        future = asyncio.run_coroutine_threadsafe(self._guarded(work, deliver), self._loop)

        def cancel() -> None:
            future.cancel()
            deliver(None)

        def abandon() -> None:
            future.cancel()

        return Handle(cancel, abandon)

    async def _guarded(self, work: Coroutine[Any, Any, None], deliver: Deliver) -> None:
        try:
            await work
        except asyncio.CancelledError:
            deliver(UsageError("the engine was closed before the request ended") if self._closed else None)
        except Exception as error:
            deliver(error)

    async def _generate_all(
        self, request: Request, body: bytes, room: int, stop_tokens: frozenset[int], deliver: Deliver
    ) -> None:
        answer = _Generation(request, room, stop_tokens, submitted=perf_counter())
        cached, last_reason = 0, None
        async for event in self._events(body):
            if event.usage is not None and event.usage.prompt_tokens_details is not None:
                cached = event.usage.prompt_tokens_details.cached_tokens or 0
            for choice in event.choices:
                last_reason = choice.finish_reason
                for output in answer.read(self._tokens(choice, request.logprobs), choice.finish_reason):
                    deliver(output)
            if answer.cut_off:
                break
        if not answer.ended:
            raise UnavailableError(
                f"vLLM at {self._address} ended the answer after {answer.generated} of {room} tokens "
                f"(finish_reason {last_reason!r})"
            )
        deliver(answer.last(cached))

    def _tokens(self, choice: _Choice, n_logprobs: int | None) -> Iterator[tuple[int, Logprobs | None]]:
        if choice.token_ids is None:
            raise UnavailableError(f"vLLM at {self._address} tells no token ids: it is too old for return_token_ids")
        for i, token in enumerate(choice.token_ids):
            if not 0 <= token < self._vocab_size:
                raise UnavailableError(
                    f"vLLM at {self._address} drew token {token}, and the tokenizer ends at {self._vocab_size - 1}"
                )
            told = choice.logprobs
            if told is None or n_logprobs is None:
                yield token, None
            else:
                yield token, _told_logprobs(told.token_logprobs[i], told.top_logprobs[i], n_logprobs)

    async def _score_all(
        self, tokens: NDArray[np.int32], body: bytes, start: int, n_top: int, deliver: Deliver
    ) -> None:
        whole = await self._asked("/v1/completions", body, _Completion)
        told = whole.choices[0].prompt_logprobs if whole.choices else None
        rows = [row for row in (told or [])[start:] if row is not None]
        if len(rows) != len(tokens) - start:
            raise UnavailableError(
                f"vLLM at {self._address} scored {len(rows)} tokens where {len(tokens) - start} were asked for"
            )
        ids = tokens[start:].tolist()
        chosen = [row[token].logprob for row, token in zip(rows, ids, strict=True)]
        top = [_likeliest(((token, each.logprob) for token, each in row.items()), n_top) for row in rows]
        deliver(Scores(chosen=np.array(chosen, dtype=np.float64), top=top))

    async def _events(self, body: bytes) -> AsyncIterator[_Completion]:
        """Of a stream. Raises RequestError where vLLM refuses the request, UnavailableError where it fails."""
        async with ask(self._address, "/v1/completions", body) as answer:
            await self._check(answer)
            async for line in answer.lines():
                if line == b"data: [DONE]":
                    return
                if not line.startswith(b"data: "):  # an empty line, a comment that keeps the connection alive
                    continue
                event = self._decoded(line[6:], _Completion)
                if event.error is not None:
                    raise self._failure(event.error.message, event.error.code)
                yield event

    async def _asked(self, path: str, body: bytes | None, type: type[T]) -> T:
        async with ask(self._address, path, body) as answer:
            await self._check(answer)
            return self._decoded(await answer.read(), type)

    async def _check(self, answer: Answer) -> None:
        if answer.status == 200:
            return
        told = await answer.read()
        try:
            fault = msgspec.json.decode(told, type=_Completion).error
        except msgspec.DecodeError:
            fault = None
        text = told[:500].decode(errors="replace") if fault is None else fault.message
        raise self._failure(text, answer.status)

    def _failure(self, message: str, code: int | str | None) -> DapjiError:
        if code in (400, 422):
            return RequestError(f"vLLM refuses the request: {message}")
        return UnavailableError(f"vLLM at {self._address} failed ({code}): {message}")

    def _decoded(self, text: bytes, type: type[T]) -> T:
        try:
            return msgspec.json.decode(text, type=type)
        except msgspec.DecodeError as error:
            raise UnavailableError(f"vLLM at {self._address} answers in a form that is not known: {error}") from error


class _Generation:
    """An answer so far."""

    def __init__(self, request: Request, room: int, stop_tokens: frozenset[int], *, submitted: float) -> None:
        self.generated = 0
        self.ended = False
        self.cut_off = False
        """`Request.stop` ended it, which vLLM does not know."""
        self._request = request
        self._room = room
        self._stop_tokens = stop_tokens
        self._submitted = submitted
        self._first = self._latest = submitted
        self._last: tuple[int, Logprobs | None] = (0, None)
        self._stopped_by_token = False

    def read(self, tokens: Iterable[tuple[int, Logprobs | None]], reason: str | None) -> Iterator[Output]:
        """Takes what came together, with vLLM's finish_reason behind it; yields all but the answer's last token."""
        together = list(tokens)
        for i, (token, logprobs) in enumerate(together):
            if self.ended:
                return
            is_final = i == len(together) - 1
            self._latest = perf_counter()
            if self.generated == 0:
                self._first = self._latest
            self.generated += 1
            # vLLM may know more end tokens than we have told it (the model's makers').
            self._stopped_by_token = token in self._stop_tokens or (is_final and reason == "stop")
            if not self._stopped_by_token and self._request.stop is not None:
                self.cut_off = self._request.stop(token)
            length = self.generated == self._room or (is_final and reason == "length")
            self.ended = self._stopped_by_token or self.cut_off or length
            self._last = token, logprobs
            if not self.ended:
                yield Output(token=token, logprobs=logprobs, finish=None)

    def last(self, cached: int) -> Output:
        """The answer's last token."""
        token, logprobs = self._last
        finish = Finish(
            reason="stop" if self._stopped_by_token or self.cut_off else "length",
            stop_token=token if self._stopped_by_token else None,
            usage=Usage(
                prompt=len(self._request.prompt), cached=cached, generated=self.generated, proposed=0, accepted=0
            ),
            timings=Timings(first_token=self._first - self._submitted, decode=self._latest - self._first),
        )
        return Output(token=token, logprobs=logprobs, finish=finish)


def _check_no_adapter(number: int) -> None:
    """As `Engine` refuses those that it does not have."""
    if number:
        raise RequestError(f"there is no adapter {number}")


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """As vLLM's request says it. Raises RequestError for what it would do otherwise."""
    greedy = sampling.temperature == 0
    if not greedy and sampling.temperature < _MIN_TEMPERATURE:
        raise RequestError(
            f"temperature ({sampling.temperature}) must be 0 or at least {_MIN_TEMPERATURE} with vLLM, which raises it"
        )
    if not greedy and sampling.typical_p < 1:
        raise RequestError(f"typical_p ({sampling.typical_p}) must be 1 with vLLM, which does not have it")
    if not greedy and sampling.min_p > 0 and sampling.top_p < 1:
        raise RequestError(
            f"min_p ({sampling.min_p}) and top_p ({sampling.top_p}) cannot be combined with vLLM, which applies min_p "
            "first",
            hint="set min_p to 0 or top_p to 1",
        )
    if sampling.seed is not None and sampling.seed > _MAX_SEED:
        raise RequestError(f"seed ({sampling.seed}) must be at most {_MAX_SEED} with vLLM")
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    bias = {str(token): value for token, value in sampling.logit_bias.items()}
    return {name: getattr(sampling, name) for name in names + penalties} | {"logit_bias": bias or None}


def _structured(source: str) -> dict[str, str]:
    """A grammar of llguidance as vLLM's `structured_outputs` says it: one schema or one text in Lark's notation, which
    holds the grammars that it names as rules of its own."""
    whole, *named = msgspec.json.decode(source)["grammars"]
    if "json_schema" in whole:
        return {"json": msgspec.json.encode(whole["json_schema"]).decode()}
    lark = whole["lark_grammar"]
    for grammar in named:
        if "json_schema" in grammar:
            inside = f"%json {msgspec.json.encode(grammar['json_schema']).decode()}"
        else:
            inside = f"%lark {{\n{grammar['lark_grammar']}\n}}"
        rule = f"dapji_{grammar['name']}"
        lark = re.sub(rf"@{re.escape(grammar['name'])}\b", rule, lark) + f"\n{rule}: {inside}"
    return {"grammar": lark}


def _told_logprobs(chosen: float, top: Mapping[str, float], n: int) -> Logprobs:
    rows = ((int(name.removeprefix("token_id:")), value) for name, value in top.items())
    return Logprobs(chosen=chosen, top=_likeliest(rows, n))


def _likeliest(rows: Iterable[tuple[int, float]], n: int) -> tuple[tuple[int, float], ...]:
    """vLLM tells the chosen token too, where it is not among the n likeliest."""
    return tuple(sorted(rows, key=lambda row: (-row[1], row[0]))[:n])


async def _cancel_others() -> None:
    """Of the running loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
