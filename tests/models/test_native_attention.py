"""The native executor's attention in all that a configuration can say: against the reference, and bits that depend on
nothing but the text."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from test_native_executor import VOCAB, side_by_side, text

from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from dapji.models.executor import open_executor
from dapji.models.native_executor import NativeExecutor
from dapji.ops import native
from dapji.ops.attention import Temperature, first_visible
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.reference import KvFormat
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Tensor
from random_weights import random_weights

ROPE = RopeConfig(theta=10000.0, dim=32)
PLAIN = AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=32, rope=ROPE)
TEMPERATURE = Temperature(scale=0.5, length=16)

EXTRAS = {
    "norms of q and k": (replace(PLAIN, qk_norm="weighted"),),
    "norms without weights": (replace(PLAIN, qk_norm="plain"),),
    "layers without rope": (PLAIN, replace(PLAIN, rope=None)),
    "a rope for each layer": (PLAIN, replace(PLAIN, rope=RopeConfig(theta=500.0, dim=12))),
    "chunk": (replace(PLAIN, chunk=24),),
    "chunk within a window": (replace(PLAIN, chunk=40, window=20),),
    "softcap": (replace(PLAIN, softcap=1.5, scale=1.0),),
    "temperature": (replace(PLAIN, temperature=TEMPERATURE),),
    "scale": (replace(PLAIN, scale=0.6),),
    "all": (
        replace(PLAIN, qk_norm="weighted", softcap=3.0, scale=1.0, window=50),
        replace(PLAIN, qk_norm="plain", chunk=300, temperature=TEMPERATURE, rope=RopeConfig(theta=500.0, dim=8)),
        replace(PLAIN, rope=None, temperature=TEMPERATURE, window=300, chunk=70),
    ),
}


def model(*attentions: AttentionConfig, norm_offset: float = 0.0) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A layer for each; weights in float32."""
    layers = tuple(LayerConfig(attention=one, feed_forward=FeedForwardConfig(hidden_dim=64)) for one in attentions)
    config = ModelConfig(
        family="llama", dim=64, vocab_size=VOCAB, max_context=1024, norm_eps=1e-5, layers=layers, tied_head=False,
        norm_offset=norm_offset,
    )  # fmt: skip
    return config, random_weights(config, 7, scale=0.2)


def opened(name: str, **options: object) -> NativeExecutor:
    config, tensors = model(*EXTRAS[name])
    return NativeExecutor(config, tensors, **{"context": 1024, "n_blocks": 64, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("norm_offset", [0.0, 1.0])
@pytest.mark.parametrize("name", EXTRAS)
def test_logits_are_the_references(name: str, norm_offset: float) -> None:
    """In one pass, and token by token: a single row takes another way through the cache."""
    config, tensors = model(*EXTRAS[name], norm_offset=norm_offset)
    ids = Batch.single(text(130))
    wanted = open_executor("reference", config, tensors, context=256, kv="f32").step(ids)
    tolerance = 2e-5 * np.abs(wanted).max()  # the order of float32 sums
    executor = open_executor("native", config, tensors, context=256, kv="f32")
    np.testing.assert_allclose(executor.step(ids), wanted, rtol=0, atol=tolerance)
    got = [executor.step(Batch.single(text(130)[i : i + 1], past=i)) for i in range(100, 130)]
    np.testing.assert_allclose(np.concatenate(got), wanted[100:], rtol=0, atol=tolerance)
    if name != "scale":  # each of them is something that these logits would show
        plain = replace(config, layers=tuple(replace(layer, attention=PLAIN) for layer in config.layers))
        without = open_executor("reference", plain, tensors, context=256, kv="f32").step(ids)
        assert np.abs(without - wanted)[-1].max() > 100 * tolerance


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_bits_depend_on_neither_threads_nor_cuts_nor_company(kv: KvFormat) -> None:
    ids = text(600)
    whole = opened("all", kv=kv, threads=1).step(Batch.single(ids))
    for threads, cuts in ((2, [0, 1, 17, 64, 65, 300, 600]), (3, [0, 511, 513, *range(590, 601)])):
        executor = opened("all", kv=kv, threads=threads)
        pieces = [executor.step(Batch.single(ids[a:b], past=a)) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    executor = opened("all", kv=kv, threads=2, n_blocks=128)
    blocks = np.arange(127, -1, -1, dtype=np.int32).reshape(2, 64)
    other = text(600, seed=1)
    got = [executor.step(side_by_side(ids, other, blocks, 0, 580))[:580]]
    got += [executor.step(side_by_side(ids, other, blocks, i, i + 1))[:1] for i in range(580, 600)]
    np.testing.assert_array_equal(np.concatenate(got), whole)


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for isa in native.isas():
        monkeypatch.setenv("DAPJI_ISA", isa)
        executor = opened("all")
        results.append((executor.step(Batch.single(text(290))), executor.step(Batch.single(text(1), past=290))))
    for prompt, decoded in results[1:]:
        np.testing.assert_array_equal(prompt, results[0][0])
        np.testing.assert_array_equal(decoded, results[0][1])


@pytest.mark.parametrize(
    "reaches", [[(None, 30)], [(24, 30)], [(50, None), (None, 40)], [(20, None), (None, 30)]], ids=str
)
def test_blocks_before_all_that_is_seen_are_not_read(reaches: list[tuple[int | None, int | None]]) -> None:
    config, tensors = model(*(replace(PLAIN, window=window, chunk=chunk) for window, chunk in reaches))
    executor, other = (NativeExecutor(config, tensors, context=256, n_blocks=16) for _ in range(2))
    ids = text(101)
    for one in (executor, other):
        one.step(Batch.single(ids[:100]))
    batch = Batch.single(ids[100:], past=100)
    oldest = min(int(first_visible(batch.positions, *reach)[0]) for reach in reaches)
    assert oldest >= 2 * KV_BLOCK
    forgotten = batch.blocks.copy()
    forgotten[0, : oldest // KV_BLOCK] = -1
    np.testing.assert_array_equal(executor.step(replace(batch, blocks=forgotten)), other.step(batch))
    forgotten[0, oldest // KV_BLOCK] = -1
    with pytest.raises(ValueError, match="sequence 0 has a block outside the cache"):
        executor.step(replace(batch, blocks=forgotten))


def test_the_extras_are_part_of_the_attention() -> None:
    """No operation of their own, so no barrier."""
    lines = opened("all")._program.describe()
    assert [line for line in lines if line.startswith("attention")] == [
        "attention of layer 0, 8 heads over 2 of 32, window 50",
        "attention of layer 1, 8 heads over 2 of 32, chunk 300",
        "attention of layer 2, 8 heads over 2 of 32, window 300, chunk 70",
    ]
    assert len(lines) == 1 + 3 * 5 + 3
