"""The native executor's latent attention: against the reference, and bits that depend on nothing but the text."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from test_native_executor import VOCAB, side_by_side, text

from dapji.models.config import FeedForwardConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from dapji.models.decoder import decode
from dapji.models.executor import open_executor
from dapji.models.native_executor import NativeExecutor
from dapji.models.size import cached_values, kv_shapes
from dapji.ops import native
from dapji.ops.attention import LatentAttention
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.formats import FORMATS
from dapji.ops.reference import (
    Floats,
    KvFormat,
    ReferenceCache,
    ReferenceOps,
    ReferenceWeight,
    softmax,
    visible,
)
from dapji.ops.rope import RopeConfig, RopeTables
from dapji.ops.tensor import Tensor
from random_weights import random_weights

ODD = LatentAttentionConfig(
    n_heads=5, query_dim=40, latent_dim=24, nope_dim=12, value_dim=20, rope=RopeConfig(theta=10000.0, dim=8),
    scale=0.3, norm_eps=1e-6,
)  # fmt: skip
DIRECT = replace(ODD, query_dim=None, latent_dim=33, nope_dim=7, rope=RopeConfig(theta=500.0, dim=2))
HEADS = replace(ODD, n_heads=200, query_dim=None, latent_dim=16, nope_dim=4, value_dim=3)
"""More than share one pass over the cache."""
WHOLE = LatentAttentionConfig(
    n_heads=4, query_dim=256, latent_dim=256, nope_dim=256, value_dim=64, rope=RopeConfig(theta=10000.0, dim=64),
    scale=0.05, norm_eps=1e-6,
)  # fmt: skip
"""Every matrix has rows of 256 values, whole blocks of each format."""


def model(
    *attentions: LatentAttentionConfig, format: str = "F32", dim: int = 64
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A layer for each."""
    feed_forward = FeedForwardConfig(hidden_dim=dim)
    config = ModelConfig(
        family="llama", dim=dim, vocab_size=VOCAB, max_context=1024, norm_eps=1e-5, tied_head=False,
        layers=tuple(LayerConfig(attention=one, feed_forward=feed_forward) for one in attentions),
    )  # fmt: skip
    return config, random_weights(config, 3, format=lambda name: format, scale=0.12 if format == "F32" else 0.06)


def opened(*attentions: LatentAttentionConfig, **options: Any) -> NativeExecutor:
    return NativeExecutor(*model(*attentions), **{"context": 1024, "n_blocks": 64, **options})


def reference(config: ModelConfig, tensors: dict[str, Tensor], ids: Batch, **options: Any) -> Floats:
    return open_executor("reference", config, tensors, **{"context": 1024, "kv": "f32", **options}).step(ids)


class Absorbed(ReferenceOps):
    """The reference in the form that the native executor computes: by heads that read the latents themselves, with the
    two products that this takes rounded as every product of a linear is."""

    def latent_attention(
        self,
        q_nope: Floats,
        q_rope: Floats,
        latent: Floats,
        k_rope: Floats,
        k_up: ReferenceWeight,
        v_up: ReferenceWeight,
        *,
        layer: int,
        attention: LatentAttention,
    ) -> Floats:
        positions, slots = self.batch.positions, self.batch.slots(0)
        self.cache.write(layer, slots[positions], np.concatenate([latent, k_rope], axis=-1), None)
        cached = self.cache.keys[layer][slots, 0]  # [S, latent + rope]
        mixed = []
        for head in range(attention.n_heads):
            nope, rope = (x.reshape(len(x), attention.n_heads, -1)[:, head] for x in (q_nope, q_rope))
            query = np.concatenate([self.linear(nope, k_up.expert(head)), rope], axis=-1)  # [T, latent + rope]
            scores = query @ cached.T * np.float32(attention.scale)
            attended = softmax(np.where(visible(positions), scores, np.float32(-np.inf))) @ cached
            mixed.append(self.linear(attended[:, : attention.latent_dim], v_up.expert(head)))
        return np.concatenate(mixed, axis=-1)


@pytest.mark.parametrize(
    "attentions", [(ODD, ODD), (DIRECT,), (HEADS,)], ids=["latent queries", "direct queries", "many heads"]
)
def test_logits_are_the_references(attentions: tuple[LatentAttentionConfig, ...]) -> None:
    """In one pass, and token by token: a single row's segments are apart. The other form of the same sums: float32."""
    config, tensors = model(*attentions)
    ids = text(300)
    wanted = reference(config, tensors, Batch.single(ids))
    tolerance = 2e-5 * np.abs(wanted).max()
    executor = open_executor("native", config, tensors, context=1024, kv="f32", threads=2)
    np.testing.assert_allclose(executor.step(Batch.single(ids)), wanted, rtol=0, atol=tolerance)
    got = [executor.step(Batch.single(ids[i : i + 1], past=i)) for i in range(250, 300)]
    np.testing.assert_allclose(np.concatenate(got), wanted[250:], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_a_rounded_cache_is_the_references(kv: KvFormat) -> None:
    """A latent whose float32 sum differs may be rounded to its other neighbour: less than what rounding does at all."""
    config, tensors = model(ODD, DIRECT)
    ids = Batch.single(text(200))
    exact, rounded = reference(config, tensors, ids), reference(config, tensors, ids, kv=kv)
    got = open_executor("native", config, tensors, context=256, kv=kv).step(ids)
    effect = np.sqrt(np.mean((rounded - exact) ** 2))
    assert effect > 1e-5
    assert np.sqrt(np.mean((got - rounded) ** 2)) < 0.3 * effect


@pytest.mark.parametrize("format", FORMATS)
def test_every_weight_format_is_the_reference_of_the_same_arithmetic(format: str) -> None:
    """As for other linears: a sum in another order may put an activation on the other side of an int8 step. So the
    bound is relative to what rounding to int8 does at all."""
    config, tensors = model(WHOLE, format=format, dim=256)
    ids = Batch.single(text(40))
    exact = reference(config, tensors, ids)
    weights = {name: ReferenceWeight.load(tensor) for name, tensor in tensors.items()}
    cache = ReferenceCache(kv_shapes(config), 3, "f32")
    rounded = decode(config, weights, Absorbed(batch=ids, cache=cache, tables=RopeTables(64), activations="q8")).logits
    got = open_executor("native", config, tensors, context=64, kv="f32").step(ids)
    if FORMATS[format].block == 1:
        np.testing.assert_allclose(got, exact, rtol=0, atol=2e-5 * np.abs(exact).max())
        return
    effect = np.sqrt(np.mean((rounded - exact) ** 2))
    assert effect > 0
    assert np.sqrt(np.mean((got - rounded) ** 2)) < 0.5 * effect
    assert np.median(np.abs(got - rounded)) < 0.25 * effect
    # and near the other form, which rounds in fewer places
    assert np.sqrt(np.mean((got - reference(config, tensors, ids, activations="q8")) ** 2)) < 2 * effect


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_bits_depend_on_neither_threads_nor_cuts_nor_company(kv: KvFormat) -> None:
    ids = text(600)
    layers = (ODD, HEADS)
    whole = opened(*layers, kv=kv, threads=1).step(Batch.single(ids))
    for threads, cuts in ((2, [0, 1, 17, 64, 65, 300, 600]), (3, [0, 511, 513, *range(590, 601)])):
        executor = opened(*layers, kv=kv, threads=threads)
        pieces = [executor.step(Batch.single(ids[a:b], past=a)) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    executor = opened(*layers, kv=kv, threads=2, n_blocks=128)
    blocks = np.arange(127, -1, -1, dtype=np.int32).reshape(2, 64)
    other = text(600, seed=1)
    got = [executor.step(side_by_side(ids, other, blocks, 0, 580))[:580]]
    got += [executor.step(side_by_side(ids, other, blocks, i, i + 1))[:1] for i in range(580, 600)]
    np.testing.assert_array_equal(np.concatenate(got), whole)


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = model(WHOLE, replace(WHOLE, query_dim=None), format="Q4_K", dim=256)
    results = []
    for isa in native.isas():
        monkeypatch.setenv("DAPJI_ISA", isa)
        executor = NativeExecutor(config, tensors, context=512, n_blocks=32)
        results.append((executor.step(Batch.single(text(290))), executor.step(Batch.single(text(1), past=290))))
    for prompt, decoded in results[1:]:
        np.testing.assert_array_equal(prompt, results[0][0])
        np.testing.assert_array_equal(decoded, results[0][1])


@pytest.mark.parametrize(("kv", "bytes_per_value", "bytes_of_scales"), [("f32", 4, 0), ("f16", 2, 0), ("q8", 1, 4)])
def test_the_cache_holds_a_latent_and_a_key_per_token(kv: KvFormat, bytes_per_value: int, bytes_of_scales: int) -> None:
    """Of the sizes of published models nothing is rounded up."""
    attention = replace(ODD, latent_dim=512, rope=RopeConfig(theta=10000.0, dim=64))
    executor = opened(attention, attention, kv=kv, n_blocks=8)
    values = cached_values(executor.config)
    assert values == 2 * 576
    assert executor.cache_bytes == 8 * KV_BLOCK * (values * bytes_per_value + values // 32 * bytes_of_scales)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_a_copied_block_is_read_like_the_original(kv: KvFormat) -> None:
    executor = opened(ODD, kv=kv)
    ids = text(41)
    executor.step(Batch.single(ids[:40]))
    batch = Batch.single(ids[40:], past=40)
    copied = batch.blocks.copy()
    for i, target in enumerate((9, 30, 20)):
        executor.copy_block(int(batch.blocks[0, i]), target)
        copied[0, i] = target
    wanted = executor.step(batch)
    executor.step(Batch.single(text(48, seed=1)))  # over the originals
    np.testing.assert_array_equal(executor.step(replace(batch, blocks=copied)), wanted)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_a_number_that_is_none_reaches_every_token_that_attends_to_it(kv: KvFormat) -> None:
    config, tensors = model(ODD)
    values = tensors["embed"].float32().copy()
    values[3] = np.nan
    tensors["embed"] = Tensor.from_float32("embed", values)
    executor = NativeExecutor(config, tensors, context=64, n_blocks=4, kv=kv)
    assert np.isnan(executor.step(Batch.single([3, 1, 2]))).all()
    assert np.isnan(executor.step(Batch.single([1], past=3))).all()
    # and is gone with the tokens, where others get their block
    assert not np.isnan(executor.step(Batch.single([1]))).any()


def test_the_program_reads_the_input_once() -> None:
    lines = opened(ODD)._program.describe()
    assert lines[1:7] == [
        "norm, linear F32 40x64 F32 24x64 F32 8x64",
        "norm, linear F32 60x40 F32 40x40",
        "linear of 5 heads F32 24x12",
        "latent attention of layer 0, 5 heads over 24 + 8",
        "linear of 5 heads F32 20x24",
        "linear F32 64x100 (added)",
    ]
