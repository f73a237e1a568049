"""What sequences are for: `Generation` draws one token after another, `Scoring` reads log-probabilities off a text,
`Embedding` makes one vector of it.

They take the rows of logits, or of hidden states, that the scheduler has asked for on their behalf. Run on the engine's
thread only; know neither blocks nor other sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from dapji.engine.request import Finish, Output, Request, Scores, Timings, Usage
from dapji.engine.sampling import Sampler, log_probability, logprobs
from dapji.engine.scheduler import Sequence
from dapji.engine.speculation import Speculation
from dapji.errors import FormatError
from dapji.models.config import Pooling


class Job(Sequence):
    """A sequence with somebody waiting for its results."""

    def __init__(
        self,
        tokens: NDArray[np.int32],
        *,
        length: int,
        wanted: int,
        adapter: int,
        deliver: Callable[[object], None],
    ) -> None:
        super().__init__(tokens, length=length, wanted=wanted, adapter=adapter)
        self.deliver = deliver
        """Passes a result, or the exception that ended the job, to who waits. Any thread; never blocks or raises."""
        self.done = False

    def accept(self, rows: NDArray[np.float32]) -> Iterator[object]:
        """Takes logits [r, V], or hidden states [r, D], of positions `wanted` …; yields what to deliver. Sets `done`
        when that was the last."""
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
        speculate: bool,
        deliver: Callable[[object], None],
    ) -> None:
        """tokens: the prompt, then room for the longest answer. stop_tokens: all that end this answer. vocab_size: the
        ids below it can be drawn. speculate: propose tokens."""
        n_prompt = len(request.prompt)
        super().__init__(tokens, length=n_prompt, wanted=n_prompt - 1, adapter=request.adapter, deliver=deliver)
        self.background = request.background
        self._request = request
        self._n_prompt = n_prompt
        self._stop_tokens = stop_tokens
        self._stop_ids = np.array(sorted(stop_tokens), dtype=np.intp)
        self._vocab_size = vocab_size
        self._sampler = Sampler(request.sampling)
        self._speculation = Speculation(tokens, n_prompt=n_prompt) if speculate else None
        self._proposed = self._accepted = 0
        self._submitted = perf_counter()
        self._first_token: float | None = None

    def propose(self, limit: int, *, beside: int) -> int:
        if self._speculation is None:
            return 0
        # The step yields a token besides those proposed, and the answer's last token need not be computed.
        limit = min(limit, len(self.tokens) - self.length - 1)
        n_proposed = self._speculation.propose(limit, beside=beside)
        proposed = self.tokens[self.length : self.length + n_proposed].tolist()
        # Nothing comes after a stop token: it need not be computed either.
        return next((i for i, token in enumerate(proposed) if token in self._stop_tokens), n_proposed)

    def accept(self, rows: NDArray[np.float32]) -> Iterator[Output]:
        # A row counts as long as every proposed token before it is the one that was drawn: then it is the row that
        # decoding token by token would have computed, and what is drawn from it, by the same random number, the same.
        proposed = self.tokens[self.length : self.length + len(rows) - 1].tolist()
        self._proposed += len(proposed)
        for row, expected in zip(rows, [*proposed, None], strict=True):
            token = self._draw(row)
            self._accepted += token == expected
            yield self._output(row, token)
            if self.done or token != expected:
                break
        if self._speculation is not None and not self.done:
            self._speculation.update(self.length)

    def _draw(self, row: NDArray[np.float32]) -> int:
        generated, constraint = self.length - self._n_prompt, self._request.constraint
        token = self._sampler.draw(
            row[: self._vocab_size],
            tokens=self.tokens[: self.length],
            n_prompt=self._n_prompt,
            banned=self._stop_ids if generated < self._request.min_tokens else None,
            allowed=None if constraint is None else constraint.allowed(),
        )
        if constraint is not None:
            constraint.push(token)
        self.tokens[self.length] = token
        self.length += 1
        self.wanted += 1
        return token

    def _output(self, row: NDArray[np.float32], token: int) -> Output:
        now = perf_counter()
        if self._first_token is None:
            self._first_token = now
        n_logprobs = self._request.logprobs
        return Output(
            token=token,
            logprobs=None if n_logprobs is None else logprobs(row, token, n_logprobs),
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
            usage=Usage(
                prompt=self._n_prompt,
                cached=self.cached,
                generated=self.length - self._n_prompt,
                proposed=self._proposed,
                accepted=self._accepted,
            ),
            timings=Timings(first_token=self._first_token - self._submitted, decode=now - self._first_token),
        )


class Scoring(Job):
    """Delivers, once, the `Scores` of the tokens from `start` on."""

    def __init__(
        self,
        tokens: NDArray[np.int32],
        *,
        start: int,
        n_top: int,
        adapter: int,
        deliver: Callable[[object], None],
    ) -> None:
        # Position p's logits speak of token p + 1: the last token need not be computed.
        super().__init__(tokens[:-1], length=len(tokens) - 1, wanted=start - 1, adapter=adapter, deliver=deliver)
        self._targets = tokens[1:]
        self._first = start - 1
        self._n_top = n_top
        self._chosen = np.empty(len(tokens) - start, dtype=np.float64)
        self._top: list[tuple[tuple[int, float], ...]] = []

    def accept(self, rows: NDArray[np.float32]) -> Iterator[Scores]:
        first, end = self.wanted, self.wanted + len(rows)
        chosen = self._chosen[first - self._first : end - self._first]
        targets = self._targets[first:end]
        if self._n_top:
            # Both from one computation: the likeliest token's value is the same to the last bit in either place.
            each = [logprobs(row, int(token), self._n_top) for row, token in zip(rows, targets, strict=True)]
            chosen[:] = [one.chosen for one in each]
            self._top += [one.top for one in each]
        else:
            chosen[:] = log_probability(rows, targets)
            self._top += [()] * len(rows)
        self.wanted = end
        if self.wanted == self.length:
            self.done = True
            yield Scores(chosen=self._chosen, top=self._top)


class Embedding(Job):
    """Delivers, once, the vector [D] float32 that `pooling` makes of the hidden states."""

    wants_hidden = True

    def __init__(
        self, tokens: NDArray[np.int32], *, pooling: Pooling, adapter: int, deliver: Callable[[object], None]
    ) -> None:
        first = len(tokens) - 1 if pooling == "last" else 0
        super().__init__(tokens, length=len(tokens), wanted=first, adapter=adapter, deliver=deliver)
        self._n_pooled = len(tokens) - first
        self._sum: NDArray[np.float64] | None = None

    def accept(self, rows: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        if self._sum is None:
            self._sum = np.zeros(rows.shape[1])
        for row in rows:  # one by one, so that the sum does not depend on where the text was cut
            self._sum += row
        self.wanted += len(rows)
        if self.wanted == self.length:
            if not np.isfinite(self._sum).all():
                raise FormatError("the model's hidden states hold inf or nan: its weights are broken")
            self.done = True
            yield (self._sum / self._n_pooled).astype(np.float32)
