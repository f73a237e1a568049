"""Each step of sampling against transformers' processors and warpers, or against its formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from dapji.engine.request import Sampling
from dapji.engine.sampling import Sampler, distribution, log_probabilities, log_probability, logprobs, top_indices
from dapji.errors import FormatError

V = 500
NO_TOKENS = np.empty(0, dtype=np.int32)


def random_logits(seed: int, *, n: int = V, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(n, dtype=np.float32)


def probabilities(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """[V]: what is drawn from."""
    ids, weights = distribution(scores, sampling)
    result = np.zeros(len(scores))
    result[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return result


def transformers_probabilities(scores: np.ndarray, *warpers: logits_process.LogitsProcessor) -> np.ndarray:
    warped = logits_process.LogitsProcessorList(warpers)(
        torch.zeros(1, 1, dtype=torch.long), torch.tensor(scores)[None]
    )
    return torch.softmax(warped[0].double(), dim=-1).numpy()


WARPERS = {
    "temperature": ({"temperature": 0.6}, [logits_process.TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 7}, [logits_process.TopKLogitsWarper(7)]),
    "top_p": ({"top_p": 0.8}, [logits_process.TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.05}, [logits_process.MinPLogitsWarper(0.05)]),
    "typical_p": ({"typical_p": 0.7}, [logits_process.TypicalLogitsWarper(0.7)]),
    "all, in order": (
        {"temperature": 1.4, "top_k": 200, "top_p": 0.95, "min_p": 0.002, "typical_p": 0.9},
        [
            logits_process.TemperatureLogitsWarper(1.4),
            logits_process.TopKLogitsWarper(200),
            logits_process.TopPLogitsWarper(0.95),
            logits_process.MinPLogitsWarper(0.002),
            logits_process.TypicalLogitsWarper(0.9),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_filters_equal_those_of_transformers(name: str, scale: float) -> None:
    options, warpers = WARPERS[name]
    for seed in range(20):
        scores = random_logits(seed, scale=scale)
        ours, theirs = probabilities(scores, Sampling(**options)), transformers_probabilities(scores, *warpers)
        # Both work in float32, in another order: a token at the very border may fall on either side.
        assert np.count_nonzero((ours > 0) != (theirs > 0)) <= (1 if "p" in name or "all" in name else 0)
        if np.array_equal(ours > 0, theirs > 0):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_top_p_on_a_wide_distribution_sorts_it_all_and_is_right() -> None:
    scores = random_logits(1, n=5000, scale=0.3)
    exact = np.exp(scores.astype(np.float64))
    falling = np.sort(exact)[::-1]
    n = int(np.searchsorted(np.cumsum(falling), 0.9 * exact.sum())) + 1
    assert n > 3000
    kept = np.flatnonzero(probabilities(scores, Sampling(top_p=0.9)))
    assert np.array_equal(kept, np.sort(np.argsort(-exact)[:n]))


def test_filters_keep_what_is_tied_with_the_last() -> None:
    scores = np.log(np.array([0.4, 0.2, 0.2, 0.2], dtype=np.float32))
    for sampling in (Sampling(top_p=0.5), Sampling(top_k=2)):
        np.testing.assert_allclose(probabilities(scores, sampling), [0.4, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(probabilities(scores, Sampling(top_p=0.4)), [1, 0, 0, 0])


def test_a_tiny_temperature_is_greedy() -> None:
    scores = random_logits(2)
    scores[5] = -np.inf
    for temperature in (1e-3, 1e-30, 1e-60):
        assert probabilities(scores, Sampling(temperature=temperature))[scores.argmax()] == pytest.approx(1)


def test_repetition_penalty_and_bias_equal_those_of_transformers() -> None:
    tokens = np.array([3, 4, 3, 17, 499], dtype=np.int32)
    bias = {4: -2.5, 100: 7.0}
    for seed in range(5):
        logits = random_logits(seed)
        before = logits.copy()
        ours = Sampler(Sampling(repetition_penalty=1.3, logit_bias=bias)).penalized(logits, tokens=tokens, n_prompt=3)
        processors = logits_process.LogitsProcessorList(
            [
                logits_process.RepetitionPenaltyLogitsProcessor(1.3),
                logits_process.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            ]
        )
        theirs = processors(torch.tensor(tokens.astype(np.int64))[None], torch.tensor(logits)[None])[0].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        assert np.array_equal(logits, before)


def test_frequency_and_presence_count_the_answer_alone() -> None:
    """The formula of OpenAI's API reference: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    logits = random_logits(3)
    prompt, answer = [7, 8, 8], [8, 9, 9, 9, 20]
    sampler = Sampler(Sampling(frequency_penalty=0.7, presence_penalty=-0.4))
    ours = sampler.penalized(logits, tokens=np.array(prompt + answer, dtype=np.int32), n_prompt=len(prompt))
    expected = [
        float(value) - answer.count(j) * 0.7 - (answer.count(j) > 0) * -0.4 for j, value in enumerate(logits.tolist())
    ]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.8, seed=1), Sampling(top_p=0.7, seed=2), Sampling(top_k=5, seed=3)]
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    scores = random_logits(4, n=40, scale=1.0)
    expected = probabilities(scores, sampling)
    sampler, n = Sampler(sampling), 8_000
    counts = np.bincount([sampler.draw(scores, tokens=NO_TOKENS, n_prompt=0) for _ in range(n)], minlength=40)
    assert not counts[expected == 0].any()
    # Binomial counts; the seed is fixed, so that 5 standard deviations need hold only once.
    assert np.all(np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected) + 1e-9)


def test_the_seed_alone_decides() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.draw(random_logits(i), tokens=NO_TOKENS, n_prompt=0) for i in range(30)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)
    assert draws(2**64 - 1) == draws(2**64 - 1)


def test_greedy_takes_the_first_of_the_largest_and_banned_ids_are_never_drawn() -> None:
    scores = np.array([1, 5, 5, 0], dtype=np.float32)
    banned = np.array([1, 3])
    assert Sampler(Sampling(temperature=0)).draw(scores, tokens=NO_TOKENS, n_prompt=0) == 1
    assert Sampler(Sampling(temperature=0)).draw(scores, tokens=NO_TOKENS, n_prompt=0, banned=banned) == 2
    sampler = Sampler(Sampling(temperature=100, seed=0))
    drawn = {sampler.draw(scores, tokens=NO_TOKENS, n_prompt=0, banned=banned) for _ in range(200)}
    assert drawn == {0, 2}
    assert scores.tolist() == [1, 5, 5, 0]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_an_error(broken: float) -> None:
    scores = random_logits(5)
    scores[17] = broken
    for temperature in (0.0, 1.0):
        with pytest.raises(FormatError, match="token 17"):
            Sampler(Sampling(temperature=temperature)).draw(scores, tokens=NO_TOKENS, n_prompt=0)


@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=700),
    k=st.integers(1, 800),
)
@settings(deadline=None, max_examples=200)
def test_top_indices_equal_a_full_sort(values: list[int], k: int) -> None:
    row = np.array(values, dtype=np.float32)
    bound = np.sort(row)[::-1][min(k, len(row)) - 1]
    assert top_indices(row, k).tolist() == np.flatnonzero(row >= bound).tolist()


def test_top_indices_on_a_large_row() -> None:
    row = random_logits(6, n=151_936)
    for k in (1, 20, 2000, 50_000):
        assert np.array_equal(top_indices(row, k), np.sort(np.argsort(-row, kind="stable")[:k]))


def test_logprobs_equal_a_float64_softmax() -> None:
    logits = np.stack([random_logits(seed, n=5000) for seed in range(4)])
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    targets = np.array([0, 17, 4999, 17], dtype=np.int32)
    # The exponentials are float32 (half an ulp each, 6e-8), the logits' differences too (2e-7 at 10).
    np.testing.assert_allclose(log_probability(logits, targets), exact[range(4), targets], atol=1e-6)
    np.testing.assert_allclose(log_probabilities(logits), exact, rtol=0, atol=1e-12)
    found = logprobs(logits[1], 17, 5)
    order = np.argsort(-exact[1])[:5]
    assert [token for token, _ in found.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in found.top], exact[1, order], atol=1e-6)
    assert found.chosen == pytest.approx(exact[1, 17], abs=1e-6)


def test_logprobs_order_ties_by_id() -> None:
    found = logprobs(np.array([0, 2, 1, 2, 2], dtype=np.float32), 0, 2)
    assert [token for token, _ in found.top] == [1, 3]
    assert logprobs(np.zeros(4, dtype=np.float32), 2, 0).top == ()
    assert logprobs(np.zeros(4, dtype=np.float32), 2, 4).chosen == pytest.approx(-np.log(4))
