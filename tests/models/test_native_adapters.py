"""Adapters on the native executor: against the reference of the same arithmetic on quantised bases, and bits that
depend on nothing but the text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from dapji.errors import ConfigError
from dapji.models.adapter import Adapter, adaptable
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from dapji.models.executor import open_executor
from dapji.models.native_executor import NativeExecutor
from dapji.ops import native
from dapji.ops.batch import Batch
from dapji.ops.formats import FORMATS
from dapji.ops.low_rank import LowRank
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Tensor
from random_weights import random_weights

VOCAB = 80


def model(format: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Rows of whole blocks of each format."""
    attention = AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=32, rope=RopeConfig(theta=1e4, dim=32), qkv_bias=True)
    layer = LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=512))
    config = ModelConfig(
        family="llama", dim=256, vocab_size=VOCAB, max_context=1024, norm_eps=1e-5, layers=(layer,) * 2, tied_head=False
    )
    return config, random_weights(config, 5, format=lambda name: format)


def adapter(
    config: ModelConfig, seed: int, *, ranks: tuple[int, ...] = (16,), format: str = "F32", dora: bool = False
) -> Adapter:
    """Of every weight; ranks in turn, and every second with a magnitude where `dora`."""
    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, cols: int) -> Tensor:
        values = (random.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        if format == "F32":
            return Tensor.from_float32(name, values)
        assert format == "BF16"
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        return Tensor(name=name, format=FORMATS["BF16"], shape=(rows, cols), source=halves.view(np.uint8))

    pairs = {}
    for i, (name, (rows, cols)) in enumerate(adaptable(config).items()):
        rank = ranks[i % len(ranks)]
        magnitude = random.uniform(0.3, 1.5, rows).astype(np.float32) if dora and i % 2 else None
        a, b = matrix(f"{name}.a", rank, cols), matrix(f"{name}.b", rows, rank)
        pairs[name] = LowRank(a=a, b=b, scale=0.7, magnitude=magnitude)
    return Adapter(pairs=pairs)


def text(n: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).astype(np.int32)


def opened(format: str, *, threads: int, n_blocks: int = 64) -> NativeExecutor:
    config, tensors = model(format)
    return NativeExecutor(config, tensors, context=1024, n_blocks=n_blocks, threads=threads)


def chosen(ids: NDArray[np.int32], numbers: list[int], *, start: int, end: int, n_blocks: int = 40) -> Batch:
    """ids[start:end] of as many sequences as there are numbers, each in blocks of its own."""
    n = end - start
    return Batch(
        tokens=np.tile(ids[start:end], len(numbers)),
        positions=np.tile(np.arange(start, end, dtype=np.int32), len(numbers)),
        starts=np.arange(len(numbers) + 1, dtype=np.int32) * n,
        blocks=np.arange(len(numbers) * n_blocks, dtype=np.int32).reshape(len(numbers), n_blocks),
        rows=np.arange(n * len(numbers), dtype=np.int32),
        adapters=np.array(numbers, dtype=np.int32),
    )


@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize(("stored", "dora"), [("F32", False), ("BF16", False), ("BF16", True)])
def test_the_reference_of_the_same_arithmetic(format: str, stored: str, dora: bool) -> None:
    """As test_native_executor says of the base: within a part of what rounding to int8 does at all, and without
    rounding within float32's."""
    config, tensors = model(format)
    change = adapter(config, 1, ranks=(16, 5, 33), format=stored, dora=dora)
    results = {}
    for kind, activations in (("reference", "f32"), ("reference", "q8"), ("native", "f32")):
        executor = open_executor(kind, config, tensors, context=64, kv="f32", activations=activations)  # type: ignore[arg-type]
        ids = chosen(text(40), [executor.add_adapter(change)], start=0, end=40, n_blocks=4)
        results[kind, activations] = executor.step(ids)
    exact, rounded, got = results.values()
    if FORMATS[format].block == 1:
        np.testing.assert_allclose(got, exact, rtol=0, atol=2e-5 * np.abs(exact).max())
    else:
        effect = np.sqrt(np.mean((rounded - exact) ** 2))
        assert np.sqrt(np.mean((got - rounded) ** 2)) < 0.5 * effect
        assert np.median(np.abs(got - rounded)) < 0.25 * effect


@pytest.mark.parametrize("format", ["BF16", "Q4_1"])
def test_bits_depend_on_neither_threads_nor_cuts_nor_company(format: str) -> None:
    ids = text(300)
    executor = opened(format, threads=1)
    change, other = (adapter(executor.config, seed, ranks=(16, 5, 33), dora=seed == 1) for seed in (1, 2))
    whole = executor.step(chosen(ids, [executor.add_adapter(change)], start=0, end=300))
    plain = executor.step(chosen(ids, [0], start=0, end=300))
    assert np.abs(whole - plain).max() > 0.1

    for threads, cuts in ((2, [0, 1, 9, 17, 80, 300]), (3, [0, 131, 290, *range(291, 301)])):
        executor = opened(format, threads=threads)
        number = executor.add_adapter(change)
        pieces = [executor.step(chosen(ids, [number], start=a, end=b)) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)

    # beside the base and another adapter, each twice and not side by side; the last tokens one by one
    executor = opened(format, threads=2, n_blocks=6 * 40)
    one, two = executor.add_adapter(change), executor.add_adapter(other)
    numbers = [0, one, two, one, two, 0]
    for start, end in ((0, 100), (100, 297), (297, 298), (298, 299), (299, 300)):
        got = executor.step(chosen(ids, numbers, start=start, end=end)).reshape(6, end - start, VOCAB)
        for i in (1, 3):
            np.testing.assert_array_equal(got[i], whole[start:end])
        for i in (0, 5):
            np.testing.assert_array_equal(got[i].view(np.uint32), plain[start:end].view(np.uint32))
        np.testing.assert_array_equal(got[2], got[4])


def test_logits_of_some_rows_are_those_of_all() -> None:
    """The head is adapted too, after the other rows have gone."""
    executor = opened("Q4_1", threads=2, n_blocks=4 * 40)
    number = executor.add_adapter(adapter(executor.config, 1))
    batch = chosen(text(20), [number, 0, number, 0], start=0, end=20)
    whole = executor.step(batch)
    for rows in ([19, 39, 59, 79], [5, 25], [], [70], list(range(10, 75))):
        some = Batch(**{**vars(batch), "rows": np.array(rows, dtype=np.int32)})
        np.testing.assert_array_equal(executor.step(some), whole[rows])


@pytest.mark.parametrize("format", ["F16", "Q4_K", "Q8_0"])
def test_every_instruction_set_gives_the_same_bits(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for isa in native.isas():
        monkeypatch.setenv("DAPJI_ISA", isa)
        executor = opened(format, threads=2, n_blocks=120)
        changes = [adapter(executor.config, seed, ranks=(16, 7), dora=seed == 2) for seed in (1, 2)]
        numbers = [0, *map(executor.add_adapter, changes)]
        # many tokens, then few
        steps = [executor.step(chosen(text(50), numbers, start=a, end=b)) for a, b in ((0, 49), (49, 50))]
        results.append(np.concatenate(steps))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_what_is_not_there_or_does_not_fit_is_refused() -> None:
    executor = opened("Q4_1", threads=1)
    number = executor.add_adapter(adapter(executor.config, 1))
    executor.remove_adapter(number)
    with pytest.raises(ValueError, match="sequence 0 has adapter 1, which is not there"):
        executor.step(chosen(text(3), [number], start=0, end=3))
    wide = Adapter(
        pairs={
            "layers.0.attention.q": LowRank(
                a=Tensor.from_float32("a", np.zeros((4, 128), dtype=np.float32)),
                b=Tensor.from_float32("b", np.zeros((256, 4), dtype=np.float32)),
                scale=1.0,
            )
        }
    )
    with pytest.raises(ConfigError, match=r"\[4, 128\] and \[256, 4\], but the model's \[256, 256\] wants \[4, 256\]"):
        executor.add_adapter(wide)
    assert executor.add_adapter(adapter(executor.config, 1)) == number + 1, "a number is never used again"
