"""How sure a score is, and whether two differ: intervals and p values of rows that were scored. Knows no models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

RESAMPLES = 10_000
_Z = 1.959963984540054
"""The normal distribution's quantile of 97.5 %."""
_BLOCK = 1 << 20
"""Draws at a time."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over rows, with its 95 % interval."""

    value: float
    low: float | None
    """None: no interval is known."""
    high: float | None
    n: int
    """Rows."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """After less before, of the same rows, with its 95 % interval."""

    value: float
    low: float
    high: float
    p: float
    """How likely as many rows or more would have changed in one direction, were both directions equally likely."""
    better: int
    """Rows."""
    worse: int


def proportion(passed: Sequence[float]) -> Score:
    """The share of rows that pass (1, else 0), with Wilson's interval (1927), sound for few rows and at 0 and 1 too."""
    n = len(passed)
    share = sum(passed) / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # In the two ends the interval ends there too, but for rounding.
    return Score(value=share, low=0.0 if share == 0 else centre - half, high=1.0 if share == 1 else centre + half, n=n)


def mean_score(values: Sequence[float]) -> Score:
    """The mean of any numbers, with the normal distribution's interval; of 0 and 1 alone, their `proportion`."""
    if set(values) <= {0.0, 1.0}:
        return proportion(values)
    n, value = len(values), float(np.mean(values))
    half = None if n < 2 else _Z * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Score(
        value=value, low=None if half is None else value - half, high=None if half is None else value + half, n=n
    )


def paired_difference(after: Sequence[float], before: Sequence[float], *, seed: int = 0) -> Difference:
    """The mean difference of rows that were scored twice.

    The interval is the paired bootstrap's (Efron and Tibshirani 1993): rows are drawn again with replacement, each with
    both its scores, and the interval holds the middle 95 % of the means. p is the exact sign test of the rows that
    differ, two-sided; of scores of 0 and 1 that is McNemar's exact test.
    """
    changes = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    # Rows with the same change are alike: how often each change is drawn is multinomial.
    values, counts = np.unique(changes, return_counts=True)
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(values))
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    shares = counts / len(changes)
    means = np.concatenate([random.multinomial(len(changes), shares, size) @ values for size in sizes]) / len(changes)
    low, high = np.quantile(means, (0.025, 0.975))
    better, worse = int((changes > 0).sum()), int((changes < 0).sum())
    return Difference(
        value=float(changes.mean()),
        low=float(low),
        high=float(high),
        p=_sign_test(better, worse),
        better=better,
        worse=worse,
    )


def _sign_test(better: int, worse: int) -> float:
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0
