"""`Speculation`: proposes a sequence's next tokens by looking its last ones up in what stands before them.

Prompt-lookup decoding (Saxena 2023): a text that is repeated, edited or continued by a pattern says its next tokens in
advance. A step that computes a token and the proposed ones after it reads the weights once, as a step of one token
does, and yields every token as far as the proposals are what is drawn. Knows one sequence's tokens; neither logits nor
batches nor blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_STEP_TOKENS = 8
"""Most tokens of a step with proposals: so many the native kernels compute side by side."""

# Lengths of n-grams that are looked up. After a shorter one anything may follow; a longer one is never needed, since a
# match is followed for as long as it lasts.
_SHORTEST, _LONGEST = 2, 3

_TOKEN_COST = 0.3  # of `step_cost`
_LEAST_GAIN = 1.1  # in expected tokens per time
_FIRST_RATE = 0.4  # acceptance rate, before anything has been proposed
_RATE_WEIGHT = 1 / 8  # of the latest proposal in the moving average of the rate


def step_cost(n_tokens: int) -> float:
    """Time of a step of 1 to MAX_STEP_TOKENS tokens, in times of a step of one.

    benchmarks/speculation.py measures it: less with AVX-512, up to 0.45 a token with AVX2.
    """
    return 1.0 + _TOKEN_COST * (n_tokens - 1)


class Speculation:
    """The proposals for one sequence, and how often they were right.

    What would be proposed is compared with every token drawn, whether a step has computed it or not. So it is known at
    no cost when proposals pay, and a text that does not repeat itself is decoded as if there were none.
    """

    def __init__(self, tokens: NDArray[np.int32], *, n_prompt: int) -> None:
        """tokens: what the sequence has and room for all that it may get; the first n_prompt are its prompt."""
        self._tokens = tokens
        self._n_prompt = n_prompt
        self._length = 0  # tokens seen
        self._match = 0  # the end of what matches the end of tokens[:_length]; 0: nothing does
        self._rate = _FIRST_RATE
        self._ends: dict[bytes, int] = {}  # of the latest occurrence of each n-gram

    def update(self, length: int) -> None:
        """The sequence has `length` tokens now."""
        # The n-grams of the new tokens are slices of one string: those of a prompt are many.
        first = max(0, self._length - _LONGEST)
        data = self._tokens[first:length].tobytes()
        for end in range(self._length + 1, length + 1):
            if self._match and end > self._n_prompt:
                right = self._tokens[self._match] == self._tokens[end - 1]
                self._rate += _RATE_WEIGHT * (float(right) - self._rate)
                self._match = self._match + 1 if right else 0
            for n in range(min(_LONGEST, end), _SHORTEST - 1, -1):
                gram = data[(end - n - first) * 4 : (end - first) * 4]
                if not self._match and end >= self._n_prompt:
                    self._match = self._ends.get(gram, 0)
                self._ends[gram] = end
        self._length = length

    def propose(self, limit: int, *, beside: int) -> int:
        """Writes up to `limit` proposals after the tokens seen; returns how many are worth computing, often 0.

        beside: other tokens in the step, taken to yield one each. A step with k proposals of acceptance rate p yields
        1 + p + ... + p^k more (Leviathan et al. 2023). Taken is the k with the most tokens for the step's cost.
        """
        if not self._match:
            return 0
        tokens, best = beside + 1.0, 0
        most = _LEAST_GAIN * tokens / step_cost(beside + 1)
        for k in range(1, limit + 1):
            tokens += self._rate**k
            speed = tokens / step_cost(beside + 1 + k)
            if speed > most:
                best, most = k, speed
        for i in range(best):  # one by one: of a text in short cycles, proposals follow from proposals
            self._tokens[self._length + i] = self._tokens[self._match + i]
        return best
