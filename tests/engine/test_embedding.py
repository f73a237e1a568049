"""Texts to embed among other requests, on a fake executor whose hidden states hash the history in its cache."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from engine_models import VOCAB, Gate, HashExecutor, greedy, hash_logits
from numpy.typing import NDArray

from dapji.engine import Engine, Request, Sampling
from dapji.errors import ContextError, FormatError, RequestError, UsageError
from dapji.models.config import Pooling

POOLINGS: list[Pooling] = ["mean", "last"]


def text(n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, n).tolist()
    return ids


def pooled(tokens: list[int], pooling: Pooling) -> NDArray[np.float32]:
    """Without an engine."""
    states = [hash_logits(np.array(tokens[: i + 1])).astype(np.float64) for i in range(len(tokens))]
    if pooling == "last":
        return states[-1].astype(np.float32)
    total = np.zeros(VOCAB)
    for state in states:
        total += state
    return (total / len(states)).astype(np.float32)


def n_computed(executor: HashExecutor) -> int:
    return sum(len(batch.tokens) for batch in executor.batches)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_text_gets_its_vector(pooling: Pooling) -> None:
    texts = [text(n, seed=n) for n in (1, 2, 15, 16, 17, 60, 300)]
    with Engine(HashExecutor(), step_tokens=40, max_running=5) as engine:
        got = engine.embed(texts, pooling=pooling)
        assert engine.embed([], pooling=pooling).shape == (0, 0)
        assert engine._scheduler.pool.available == engine._executor.n_blocks
    np.testing.assert_array_equal(got, [pooled(each, pooling) for each in texts])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_beside_answers_that_take_their_blocks(pooling: Pooling) -> None:
    """Answers grow until the younger texts must be read again: neither notices."""
    executor = HashExecutor(n_blocks=24)
    prompts = [text(20, seed=100 + i) for i in range(3)]
    texts = [text(80, seed=i) for i in range(6)]
    with Engine(executor, step_tokens=24, mixed_prompt_tokens=8, max_running=6) as engine:
        streams = [
            engine.generate(Request(prompt=prompt, max_tokens=90, sampling=Sampling(temperature=0)))
            for prompt in prompts
        ]
        got = engine.embed(texts, pooling=pooling)
        answers = [[output.token for output in stream] for stream in streams]
    np.testing.assert_array_equal(got, [pooled(each, pooling) for each in texts])
    assert answers == [greedy(prompt, 90) for prompt in prompts]
    assert any(len(batch.rows) and len(batch.hidden_rows) for batch in executor.batches), "no step had both"


def test_the_last_state_needs_no_prefix_that_is_cached() -> None:
    prefix = text(64)
    for pooling, computed in (("last", 64 + 5 + 5), ("mean", 69 + 69)):
        executor = HashExecutor()
        with Engine(executor) as engine:
            for seed in (1, 2):
                engine.embed([[*prefix, *text(5, seed)]], pooling=pooling)  # type: ignore[arg-type]
        assert n_computed(executor) == computed


def test_an_embedded_text_is_cached_for_answers() -> None:
    with Engine(HashExecutor()) as engine:
        engine.embed([text(64)], pooling="mean")
        *_, last = engine.generate(Request(prompt=[*text(64), 1], max_tokens=2, sampling=Sampling(temperature=0)))
    assert last.finish is not None
    assert last.finish.usage.cached == 64


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], RequestError, "at least one token, got 0"),
        ([1, 32], RequestError, r"tokens\[1\] must be a token id from 0 to 31, got 32"),
        ([1] * 1025, ContextError, r"the text \(1025 tokens\) exceeds the context \(1024 tokens\)"),
    ],
)
def test_a_text_that_cannot_be_embedded(tokens: list[int], error: type[Exception], message: str) -> None:
    with Engine(HashExecutor()) as engine:
        with pytest.raises(error, match=message):
            engine.embed([text(9), tokens], pooling="mean")
        assert not engine._scheduler.busy
    with pytest.raises(UsageError, match="closed"):
        engine.embed([[1]], pooling="mean")


def test_broken_weights_are_an_error_of_the_text() -> None:
    class Broken(HashExecutor):
        def step(self, batch: Any, hidden: Any = None) -> Any:
            logits = super().step(batch, hidden)
            if hidden is not None:
                hidden[:] = np.nan
            return logits

    with Engine(Broken()) as engine:
        with pytest.raises(FormatError, match="inf or nan"):
            engine.embed([text(9), text(8)], pooling="last")
        assert not engine._scheduler.busy


def test_who_gives_up_frees_its_blocks() -> None:
    gate = Gate()
    engine = Engine(HashExecutor(on_step=gate), step_tokens=64)

    async def give_up() -> None:
        task = asyncio.ensure_future(engine.aembed(text(200), pooling="mean"))
        await asyncio.to_thread(gate.entered.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine._scheduler.busy
        gate.open(1000)
        np.testing.assert_array_equal(await engine.aembed(text(30), pooling="mean"), pooled(text(30), "mean"))

    asyncio.run(give_up())
    engine.close()
