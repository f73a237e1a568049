"""What sequences are for: `Generation` draws one token after another, `Scoring` reads log-probabilities off a text.

Both take the rows of logits that the scheduler has asked for on their behalf. Run on the engine's thread only; know
neither blocks nor other sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from dapji.engine.request import Finish, Output, Request, Timings, Usage
from dapji.engine.sampling import Sampler, log_probability, logprobs
from dapji.engine.scheduler import Sequence


class Job(Sequence):
    """A sequence with somebody waiting for its results."""

    def __init__(
        self, tokens: NDArray[np.int32], *, length: int, wanted: int, deliver: Callable[[object], None]
    ) -> None:
        super().__init__(tokens, length=length, wanted=wanted)
        self.deliver = deliver
        """Passes a result, or the exception that ended the job, to who waits. Any thread; never blocks or raises."""
        self.done = False

    def accept(self, logits: NDArray[np.float32]) -> object | None:
        """Takes logits [r, V] of positions `wanted` …; returns what to deliver. Sets `done` when that was the last."""
        raise NotImplementedError


class Generation(Job):
    """Delivers an `Output` for each generated token."""

    def __init__(
        self,
        request: Request,
        tokens: NDArray[np.int32],
        *,
        stop_tokens: frozenset[int],
        vocab_size: int,
        deliver: Callable[[object], None],
    ) -> None:
        """tokens: the prompt, then room for the longest answer. stop_tokens: all that end this answer. vocab_size: the
        ids below it can be drawn."""
        n_prompt = len(request.prompt)
        super().__init__(tokens, length=n_prompt, wanted=n_prompt - 1, deliver=deliver)
        self._request = request
        self._n_prompt = n_prompt
        self._stop_tokens = stop_tokens
        self._stop_ids = np.array(sorted(stop_tokens), dtype=np.intp)
        self._vocab_size = vocab_size
        self._sampler = Sampler(request.sampling)
        self._submitted = perf_counter()
        self._first_token: float | None = None

    def accept(self, logits: NDArray[np.float32]) -> Output:
        row = logits[0]
        request = self._request
        generated = self.length - self._n_prompt
        token = self._sampler.draw(
            row[: self._vocab_size],
            tokens=self.tokens[: self.length],
            n_prompt=self._n_prompt,
            banned=self._stop_ids if generated < request.min_tokens else None,
        )
        self.tokens[self.length] = token
        self.length += 1
        self.wanted += 1
        now = perf_counter()
        if self._first_token is None:
            self._first_token = now
        return Output(
            token=token,
            logprobs=None if request.logprobs is None else logprobs(row, token, request.logprobs),
            finish=self._finish(token, now),
        )

    def _finish(self, token: int, now: float) -> Finish | None:
        is_stop_token = token in self._stop_tokens
        stopped = is_stop_token or (self._request.stop is not None and self._request.stop(token))
        if not stopped and self.length < len(self.tokens):
            return None
        self.done = True
        assert self.cached is not None
        assert self._first_token is not None
        return Finish(
            reason="stop" if stopped else "length",
            stop_token=token if is_stop_token else None,
            usage=Usage(prompt=self._n_prompt, cached=self.cached, generated=self.length - self._n_prompt),
            timings=Timings(first_token=self._first_token - self._submitted, decode=now - self._first_token),
        )


class Scoring(Job):
    """Delivers, once, the log-probability of each token from `start` on given those before it, float64."""

    def __init__(self, tokens: NDArray[np.int32], *, start: int, deliver: Callable[[object], None]) -> None:
        # Position p's logits speak of token p + 1: the last token need not be computed.
        super().__init__(tokens[:-1], length=len(tokens) - 1, wanted=start - 1, deliver=deliver)
        self._targets = tokens[1:]
        self._first = start - 1
        self._result = np.empty(len(tokens) - start, dtype=np.float64)

    def accept(self, logits: NDArray[np.float32]) -> NDArray[np.float64] | None:
        first, end = self.wanted, self.wanted + len(logits)
        self._result[first - self._first : end - self._first] = log_probability(logits, self._targets[first:end])
        self.wanted = end
        self.done = self.wanted == self.length
        return self._result if self.done else None
