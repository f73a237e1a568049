"""The engine on the real decoder: what it gives equals a plain loop over the executor, whatever else runs.

The reference executor's sums depend in their last bit on the shape of a step (its products are BLAS's), so these
compare tokens, drawn with fixed seeds, and log-probabilities within float32 rounding. That the engine itself changes
nothing is shown bit for bit in test_engine.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from engine_models import tiny_executor

from dapji.engine import Engine, Request, Sampling
from dapji.engine.sampling import Sampler
from dapji.ops.batch import Batch

SAMPLING = Sampling(temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.05, seed=42)


def loop(prompt: list[int], n: int, *, window: int | None) -> list[int]:
    """n tokens after the prompt: the whole sequence through the executor anew for each, nothing cached."""
    executor, sampler, tokens = tiny_executor(window=window), Sampler(SAMPLING), list(prompt)
    for _ in range(n):
        logits = executor.step(Batch.single(tokens, all_rows=False))[0]
        tokens.append(sampler.draw(logits, tokens=np.array(tokens, dtype=np.int32), n_prompt=len(prompt)))
    return tokens[len(prompt) :]


def random_prompt(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, n).tolist()


@pytest.mark.parametrize("window", [None, 20])
def test_tokens_equal_those_of_a_plain_loop(window: int | None) -> None:
    mine = Request(prompt=random_prompt(0, 60), max_tokens=40, sampling=SAMPLING)
    expected = loop(mine.prompt, 40, window=window)
    assert len(set(expected)) > 10  # no degenerate repetition that would hide a difference

    def answer(engine: Engine) -> tuple[list[int], int]:
        outputs = list(engine.generate(mine))
        return [output.token for output in outputs], outputs[-1].finish.usage.cached

    with Engine(tiny_executor(window=window)) as engine:
        assert answer(engine) == (expected, 0)
        assert answer(engine) == (expected, 48)  # now on a cached prefix
    with Engine(tiny_executor(window=window), step_tokens=9, max_running=1) as engine:
        assert answer(engine) == (expected, 0)  # the prompt in chunks
    with Engine(tiny_executor(window=window, n_blocks=10), step_tokens=40, max_running=8) as engine:
        others = [
            engine.generate(Request(prompt=random_prompt(i, 7 * i), max_tokens=50, sampling=Sampling(seed=i)))
            for i in range(1, 8)
        ]
        assert answer(engine)[0] == expected  # among seven others that take each other's blocks
        for other in others:
            list(other)


def test_logprobs_and_scores_equal_a_float64_softmax_of_the_uncached_logits() -> None:
    prompt = random_prompt(1, 30)
    with Engine(tiny_executor(), step_tokens=16, max_running=4) as engine:
        outputs = list(engine.generate(Request(prompt=prompt, max_tokens=20, sampling=SAMPLING, logprobs=3)))
        text = prompt + [output.token for output in outputs]
        scores = engine.score(text)
    exact = tiny_executor().step(Batch.single(text)).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    # 2e-5: float32 sums of up to 48 products in another order, through two layers, on logits of up to about 10.
    np.testing.assert_allclose(scores, [exact[i - 1, text[i]] for i in range(1, len(text))], atol=2e-5)
    for i, output in enumerate(outputs, start=len(prompt)):
        assert output.logprobs.chosen == pytest.approx(exact[i - 1, output.token], abs=2e-5)
        best = np.argsort(-exact[i - 1])[:3]
        assert [token for token, _ in output.logprobs.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in output.logprobs.top], exact[i - 1, best], atol=2e-5)
