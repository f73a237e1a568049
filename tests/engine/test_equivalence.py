"""The engine on the real decoder: what it gives equals a plain loop over the executor, whatever else runs.

The native executor computes each row in one order, so that there everything must agree to the last bit. The sums of
the reference depend in their last bit on the shape of a step (the products are BLAS's), so for it these compare tokens,
drawn with fixed seeds, and log-probabilities within float32 rounding.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_models import tiny_executor

from dapji.engine import Engine, Output, Request, Sampling
from dapji.engine.sampling import Sampler
from dapji.models.executor import ExecutorKind
from dapji.ops import native
from dapji.ops.batch import Batch
from dapji.ops.reference import KvFormat

SAMPLING = Sampling(temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.05, seed=42)
N_TOKENS = 40

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
KINDS = ["reference", pytest.param("native", marks=needs_native)]


def random_prompt(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, n).tolist()


MINE = Request(prompt=random_prompt(0, 60), max_tokens=N_TOKENS, sampling=SAMPLING, logprobs=1)


def loop(kind: ExecutorKind, *, window: int | None) -> list[int]:
    """The answer to MINE without an engine: the whole sequence through the executor anew for each token."""
    executor, sampler, tokens = tiny_executor(kind, window=window), Sampler(SAMPLING), list(MINE.prompt)
    for _ in range(N_TOKENS):
        logits = executor.step(Batch.single(tokens, all_rows=False))[0]
        tokens.append(sampler.draw(logits, tokens=np.array(tokens, dtype=np.int32), n_prompt=len(MINE.prompt)))
    executor.close()
    return tokens[len(MINE.prompt) :]


def answers(
    kind: ExecutorKind, *, window: int | None = None, quantized: bool = False, kv: KvFormat = "f16"
) -> list[tuple[int, list[Output]]]:
    """Cached prompt tokens and outputs for MINE: alone, on its cached prompt, on prefixes of others that end within a
    block, with the prompt in chunks of 9, as one of several samples, and among seven others that take each other's
    blocks."""
    found = []

    def ask(engine: Engine) -> None:
        outputs = list(engine.generate(MINE))
        finish = outputs[-1].finish
        assert finish is not None
        found.append((finish.usage.cached, outputs))

    def executor(n_blocks: int = 32) -> object:
        return tiny_executor(kind, quantized=quantized, kv=kv, n_blocks=n_blocks, window=window)

    with Engine(executor()) as engine:
        ask(engine)
        ask(engine)
    for n_shared in (5, 21, 47):
        with Engine(executor()) as engine:
            prompt = [*MINE.prompt[:n_shared], *random_prompt(9, 20)]
            running = engine.generate(Request(prompt=prompt, max_tokens=50))
            next(running)
            ask(engine)
            running.close()
    with Engine(executor(), step_tokens=9, max_running=1) as engine:
        ask(engine)
    with Engine(executor(), step_tokens=32, max_running=4) as engine:
        samples = [engine.generate(replace(MINE, sampling=one)) for one in Sampling(seed=1).split(3)]
        ask(engine)
        for sample in samples:
            list(sample)
    with Engine(executor(n_blocks=10), step_tokens=40, max_running=8) as engine:
        others = [
            engine.generate(Request(prompt=random_prompt(i, 7 * i), max_tokens=50, sampling=Sampling(seed=i)))
            for i in range(1, 8)
        ]
        ask(engine)
        for other in others:
            list(other)
    return found


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_a_plain_loop(kind: ExecutorKind, window: int | None) -> None:
    expected = loop(kind, window=window)
    assert len(set(expected)) > 10  # no degenerate repetition that would hide a difference
    found = answers(kind, window=window)
    assert [cached for cached, _ in found[:7]] == [0, 59, 5, 21, 47, 0, 59]
    for _, outputs in found:
        assert [output.token for output in outputs] == expected


@needs_native
@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("quantized", [False, True])
def test_on_the_native_executor_every_bit_is_the_same(quantized: bool, kv: KvFormat) -> None:
    found = answers("native", quantized=quantized, kv=kv)
    alone, *others = ([(output.token, output.logprobs) for output in outputs] for _, outputs in found)
    for other in others:
        assert other == alone


def test_logprobs_and_scores_equal_a_float64_softmax_of_the_uncached_logits() -> None:
    prompt = random_prompt(1, 30)
    with Engine(tiny_executor(kv="f32"), step_tokens=16, max_running=4) as engine:
        outputs = list(engine.generate(Request(prompt=prompt, max_tokens=20, sampling=SAMPLING, logprobs=3)))
        text = prompt + [output.token for output in outputs]
        scores = engine.score(text).chosen
    exact = tiny_executor(kv="f32").step(Batch.single(text)).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    # 2e-5: float32 sums of up to 96 products in another order, through two layers, on logits of up to about 10.
    np.testing.assert_allclose(scores, [exact[i - 1, text[i]] for i in range(1, len(text))], atol=2e-5)
    for i, output in enumerate(outputs, start=len(prompt)):
        assert output.logprobs is not None
        assert output.logprobs.chosen == pytest.approx(exact[i - 1, output.token], abs=2e-5)
        best = np.argsort(-exact[i - 1])[:3]
        assert [token for token, _ in output.logprobs.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in output.logprobs.top], exact[i - 1, best], atol=2e-5)
