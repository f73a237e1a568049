"""From one row of logits to one token: penalties, temperature, filters, the draw; and log-probabilities.

Numpy on a row of V logits; V may be 152k, so a row is scanned and sorted only where it matters. Knows neither batches
nor executors: what is drawn depends on the row, the sequence's own tokens and its own generator.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dapji.engine.request import Logprobs, Sampling
from dapji.errors import FormatError

_CHUNK = 64  # of `top_indices`: long enough that maxima are cheap, short enough that few other values pass
_FEW = 1024  # of `_nearest`: a nucleus is rarely larger


def seed_of(*numbers: int) -> int:
    """A seed for `Sampling` that follows from these, which are not negative, and is far from those of all others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Sampler:
    """Draws the tokens of one request. Holds the request's generator and nothing else that changes."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # Philox: a counter-based generator, specified bit for bit (Salmon et al. 2011), the same on every platform.
        self._generator = np.random.Generator(np.random.Philox(sampling.seed))
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.intp)
        self._bias_values = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)

    def draw(
        self,
        logits: NDArray[np.float32],
        *,
        tokens: NDArray[np.int32],
        n_prompt: int,
        banned: NDArray[np.intp] | None = None,
        allowed: NDArray[np.intp] | None = None,
    ) -> int:
        """The next token. logits [V] stays as it is; tokens: the sequence so far, its first n_prompt the prompt.

        banned: ids that get no probability; allowed: rising, those that get one. Raises FormatError where the logits
        leave nothing to draw from.
        """
        scores = self.penalized(logits, tokens=tokens, n_prompt=n_prompt)
        if banned is not None:
            scores = scores.copy() if scores is logits else scores
            scores[banned] = -np.inf
        if allowed is None:
            return self._drawn(scores)
        return int(allowed[self._drawn(scores[allowed])])

    def _drawn(self, scores: NDArray[np.float32]) -> int:
        """The index in scores."""
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            raise FormatError(
                f"the model's largest logit is {scores[best]} (token {best}): no token can be drawn",
                hint="its weights are probably damaged",
            )
        if self._sampling.temperature == 0:
            return best
        ids, weights = distribution(scores, self._sampling)
        cumulative = np.cumsum(weights, dtype=np.float64)
        total = float(cumulative[-1])
        # Scaled by the sum instead of normalised; rounding may carry the product up to the sum itself, hence min.
        point = min(float(self._generator.random()) * total, math.nextafter(total, 0))
        at = int(np.searchsorted(cumulative, point, side="right"))  # the first beyond it: its weight is not 0
        return at if ids is None else int(ids[at])

    def penalized(
        self, logits: NDArray[np.float32], *, tokens: NDArray[np.int32], n_prompt: int
    ) -> NDArray[np.float32]:
        """logits [V] with penalties and bias applied; `logits` itself where there are none."""
        options = self._sampling
        repetition = options.repetition_penalty != 1
        counted = bool(options.frequency_penalty or options.presence_penalty) and len(tokens) > n_prompt
        if not (repetition or counted or len(self._bias_ids)):
            return logits
        scores = logits.copy()
        if repetition:
            # A token that occurs twice is written twice with the same value: no need to find the distinct ones.
            seen = scores[tokens]
            factor = np.float32(options.repetition_penalty)
            scores[tokens] = np.where(seen < 0, seen * factor, seen / factor)
        if counted:
            ids, counts = np.unique(tokens[n_prompt:], return_counts=True)
            scores[ids] -= (counts * options.frequency_penalty + options.presence_penalty).astype(np.float32)
        if len(self._bias_ids):
            scores[self._bias_ids] += self._bias_values
        return scores


def distribution(
    scores: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
    """Temperature (> 0) and filters: the ids that remain, rising (None: all V), and their weights, not normalised.

    scores [V], at least one finite.
    """
    ids: NDArray[np.intp] | None = None
    if 0 < sampling.top_k < len(scores):
        ids = top_indices(scores, sampling.top_k)
        scores = scores[ids]
    # The largest is subtracted before the division, so that a tiny temperature gives 0 and -inf, never inf or nan.
    temperature = max(np.float32(sampling.temperature), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        weights = np.exp((scores - scores.max()) / temperature)

    def keep(chosen: NDArray[np.intp]) -> None:
        nonlocal ids, weights
        ids = chosen if ids is None else ids[chosen]
        weights = weights[chosen]

    if sampling.top_p < 1:
        keep(_nearest(-weights, weights, sampling.top_p))
    if sampling.min_p > 0:
        keep(np.flatnonzero(weights >= np.float32(sampling.min_p)))  # the largest weight is 1
    if sampling.typical_p < 1:
        keep(np.flatnonzero(weights))  # what has probability 0 is infinitely surprising
        probabilities = weights / np.float32(weights.sum(dtype=np.float64))
        surprise = -np.log(probabilities)
        entropy = (probabilities * surprise).sum(dtype=np.float64)
        keep(_nearest(np.abs(surprise - np.float32(entropy)), weights, sampling.typical_p))
    return ids, weights


def log_probability(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """Natural log of softmax(logits[i])[targets[i]], [R] float64. logits [R, V], targets [R].

    The sum runs in float64 over float32 exponentials: error about 1e-7.
    """
    largest = logits.max(axis=-1)
    sums = np.exp(logits - largest[:, None]).sum(axis=-1, dtype=np.float64)
    chosen = logits[np.arange(len(logits)), targets]
    result: NDArray[np.float64] = (chosen - largest).astype(np.float64) - np.log(sums)
    return result


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log of softmax(logits), [R, V], all in float64: divergences are small differences of numbers near 1."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


def logprobs(logits: NDArray[np.float32], chosen: int, n_top: int) -> Logprobs:
    """Log-probability of `chosen` and of the n_top likeliest under softmax(logits [V])."""
    top = top_indices(logits, n_top) if n_top else np.empty(0, dtype=np.intp)
    top = top[np.argsort(-logits[top], kind="stable")][:n_top]
    wanted = np.append(top, chosen)
    largest = logits.max()
    log_sum = np.log(np.exp(logits - largest).sum(dtype=np.float64))
    values = ((logits[wanted] - largest).astype(np.float64) - log_sum).tolist()
    return Logprobs(chosen=values[-1], top=tuple(zip(top.tolist(), values[:-1], strict=True)))


def top_indices(values: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """Indices, rising, of the k largest values and of those tied with the k-th. values [V], 1 <= k."""
    n = len(values)
    if k >= n:
        return np.arange(n)
    n_chunks = n // _CHUNK
    if k > n_chunks:
        return np.flatnonzero(values >= np.partition(values, n - k)[n - k])
    # The k largest chunk maxima are k of the values: the smallest of them is at most the k-th largest value. So the
    # exact selection need only look at what reaches it, and the whole row is only scanned.
    maxima = values[: n_chunks * _CHUNK].reshape(n_chunks, _CHUNK).max(axis=1)
    candidates = np.flatnonzero(values >= np.partition(maxima, n_chunks - k)[n_chunks - k])
    among = values[candidates]
    result: NDArray[np.intp] = candidates[among >= np.partition(among, len(among) - k)[len(among) - k]]
    return result


def _nearest(distances: NDArray[np.float32], weights: NDArray[np.float32], share: float) -> NDArray[np.intp]:
    """Indices, rising, of the fewest smallest distances whose weights reach `share` of all weight, with all ties."""
    target = share * float(weights.sum(dtype=np.float64))
    indices = top_indices(-distances, _FEW)
    if weights[indices].sum(dtype=np.float64) < target:
        indices = np.arange(len(weights))
    order = indices[np.argsort(distances[indices])]  # tied ones in any order: they stay or go together
    cumulative = np.cumsum(weights[order], dtype=np.float64)
    at = min(int(np.searchsorted(cumulative, target)), len(order) - 1)  # rounding may leave the sum below the target
    return np.flatnonzero(distances <= distances[order[at]])
