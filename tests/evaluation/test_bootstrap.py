"""Intervals and p values against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dapji.evaluation.bootstrap import RESAMPLES, paired_difference, proportion


@pytest.mark.parametrize(("passed", "n"), [(0, 1), (0, 100), (1, 3), (47, 100), (100, 100), (9_999, 10_000)])
def test_interval_of_a_score(passed: int, n: int) -> None:
    score = proportion([1.0] * passed + [0.0] * (n - passed))
    expected = stats.binomtest(passed, n).proportion_ci(0.95, method="wilson")
    assert (score.value, score.n) == (passed / n, n)
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("better", "worse", "same"), [(0, 0, 5), (1, 0, 0), (9, 2, 30), (4, 4, 0), (700, 600, 10)])
def test_p_is_mcnemars(better: int, worse: int, same: int) -> None:
    found = paired_difference([1] * better + [0] * (worse + same), [0] * better + [1] * worse + [0] * same)
    assert (found.better, found.worse) == (better, worse)
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("graded", [False, True], ids=["0 and 1", "any number"])
def test_interval_of_a_difference(graded: bool) -> None:
    random = np.random.default_rng(1)
    before = random.random(300) if graded else (random.random(300) < 0.4).astype(float)
    after = np.clip(before + random.normal(0.1, 0.3, 300), 0, 1)
    after = after if graded else np.where(random.random(300) < 0.6, before, random.random(300) < 0.7).astype(float)
    found = paired_difference(after, before)
    expected = stats.bootstrap(
        (after, before),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(2),
        batch=1000,
    )
    assert found.value == pytest.approx(np.mean(after - before))
    # A quantile at q of so many draws from a normal distribution has the standard error sqrt(q (1 - q) / n) / density;
    # both sides draw, and four of those pass by chance once in 16,000.
    spread = expected.standard_error
    error = np.sqrt(0.025 * 0.975 / RESAMPLES) / stats.norm.pdf(1.96) * spread
    interval = expected.confidence_interval
    tolerance = 4 * np.sqrt(2) * error + 1 / 300  # and means of 0 and 1 lie on a grid
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=tolerance)
    assert found.low < found.value < found.high
    assert found == paired_difference(after, before), "the same rows, the same interval"
