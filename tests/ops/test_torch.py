"""The ops in torch against the numpy reference, op by op, and its cache bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.protocol import Activation
from dapji.ops.reference import KvFormat, ReferenceCache, ReferenceOps, ReferenceWeight
from dapji.ops.rope import RopeConfig, RopeTables
from dapji.ops.torch import CachedTorchOps, TorchCache, TorchTables, UncachedTorchOps

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 40
CONTEXT = 128
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
SHAPE: dict[str, Any] = {"layer": 0, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def two_sequences() -> Batch:
    """A chunk of 5 tokens after 20, and one of 18 from the start, in scattered blocks; some rows are wanted."""
    return Batch(
        tokens=np.arange(23, dtype=np.int32),
        positions=np.array([*range(20, 25), *range(18)], dtype=np.int32),
        starts=np.array([0, 5, 23], dtype=np.int32),
        blocks=np.array([[4, 1], [5, 0]], dtype=np.int32),
        rows=np.array([4, 5, 22], dtype=np.int32),
    )


def both(batch: Batch, kv: KvFormat = "f32") -> tuple[ReferenceOps, CachedTorchOps]:
    """Over caches that hold the same 20 tokens in blocks 4 and 1."""
    reference = ReferenceCache([(KV_HEADS, HEAD_DIM)], 6, kv)
    cache = TorchCache([(KV_HEADS, HEAD_DIM)], 6, kv, CPU)
    k, v = random(20, KV_HEADS * HEAD_DIM, seed=8), random(20, KV_HEADS * HEAD_DIM, seed=9)
    slots = np.array([*range(4 * KV_BLOCK, 5 * KV_BLOCK), *range(KV_BLOCK, KV_BLOCK + 4)])
    reference.write(0, slots, k, v)
    cache.keys[0].write(torch.tensor(slots), torch.tensor(k))
    cache.values[0].write(torch.tensor(slots), torch.tensor(v))
    return (
        ReferenceOps(batch=batch, cache=reference, tables=RopeTables(CONTEXT), activations="f32"),
        CachedTorchOps(batch, cache, TorchTables(CONTEXT, CPU), CPU),
    )


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("window", [None, 1, 6, 19])
def test_attention_over_the_cache(kv: KvFormat, window: int | None) -> None:
    reference, ops = both(two_sequences(), kv)
    q, k, v = (random(23, n * HEAD_DIM, seed=n) for n in (HEADS, KV_HEADS, 1 + KV_HEADS))
    v = v[:, : KV_HEADS * HEAD_DIM]
    want = reference.attention(q, k, v, **SHAPE, window=window, scale=0.2)
    got = ops.attention(*map(torch.tensor, (q, k, v)), **SHAPE, window=window, scale=0.2)
    np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_the_cache_rounds_as_the_reference_does(kv: KvFormat) -> None:
    """Bit for bit, with a block of zeros and halves between two codes among the values."""
    x = random(9, KV_HEADS * HEAD_DIM)
    x[0] = 0
    x[1, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    slots = np.random.default_rng(1).permutation(2 * KV_BLOCK)[:9]
    reference = ReferenceCache([(KV_HEADS, HEAD_DIM)], 3, kv)
    reference.write(0, slots, x, x)
    cache = TorchCache([(KV_HEADS, HEAD_DIM)], 3, kv, CPU)
    cache.keys[0].write(torch.tensor(slots), torch.tensor(x))
    reference.copy_block(0, 2)
    cache.copy_block(0, 2)
    rows = cache.keys[0].read(torch.arange(3 * KV_BLOCK), torch.float32)
    np.testing.assert_array_equal(rows[0].transpose(0, 1), reference.keys[0])


def test_embed_norm_linear_and_rows() -> None:
    reference, ops = both(two_sequences())
    table, scale, w, b = random(30, 48), random(48, seed=1), random(64, 48, seed=2), random(64, seed=3)

    def held(values: np.ndarray) -> ReferenceWeight:
        return ReferenceWeight(values=values, quantized=False)

    x = reference.embed(held(table))
    np.testing.assert_array_equal(ops.embed(torch.tensor(table)), x)
    normed = reference.norm(x, held(scale), 1e-5)
    np.testing.assert_allclose(ops.norm(torch.tensor(x), torch.tensor(scale), 1e-5), normed, **CLOSE)
    y = reference.linear(x, held(w), held(b))
    np.testing.assert_allclose(ops.linear(torch.tensor(x), torch.tensor(w), torch.tensor(b)), y, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(ops.select_rows(torch.tensor(x)), reference.select_rows(x))
    np.testing.assert_array_equal(ops.add(torch.tensor(x), torch.tensor(x)), reference.add(x, x))


@pytest.mark.parametrize("dim", [HEAD_DIM, 16])
def test_rope(dim: int) -> None:
    reference, ops = both(two_sequences())
    rope = RopeConfig(theta=1e4, dim=dim)
    x = random(23, HEADS * HEAD_DIM)
    want = reference.rope(x, reference.tables[rope], HEAD_DIM)
    np.testing.assert_allclose(ops.rope(torch.tensor(x), ops.tables[rope], HEAD_DIM), want, **CLOSE)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(activation: Activation) -> None:
    reference, ops = both(two_sequences())
    gate, up = random(23, 64) * 4, random(23, 64, seed=1)
    want = reference.gated(gate, up, activation)
    np.testing.assert_allclose(ops.gated(torch.tensor(gate), torch.tensor(up), activation), want, **CLOSE)


@pytest.mark.parametrize("window", [None, 5, 100])
def test_attention_without_a_cache_is_attention_with_one(window: int | None) -> None:
    """Two sequences of 20 tokens, each against the reference alone."""
    q, k, v = (random(40, n * HEAD_DIM, seed=s) for n, s in ((HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)))
    ops = UncachedTorchOps(torch.arange(40).view(2, 20), TorchTables(CONTEXT, CPU))
    got = ops.attention(*map(torch.tensor, (q, k, v)), **SHAPE, window=window, scale=0.2)
    for part in (slice(0, 20), slice(20, 40)):
        reference, _ = both(Batch.single(list(range(20))))
        want = reference.attention(q[part], k[part], v[part], **SHAPE, window=window, scale=0.2)
        np.testing.assert_allclose(got[part], want, **CLOSE)


def test_bfloat16_stays_bfloat16_with_norms_and_angles_in_float32() -> None:
    reference, ops = both(two_sequences())
    x = torch.tensor(random(23, HEADS * HEAD_DIM)).bfloat16()
    rope = RopeConfig(theta=1e4, dim=HEAD_DIM)
    rotated = ops.rope(x, ops.tables[rope], HEAD_DIM)
    assert rotated.dtype == torch.bfloat16
    exact = torch.tensor(reference.rope(x.float().numpy(), reference.tables[rope], HEAD_DIM))
    assert ((rotated.float() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()  # one rounding, at the end
    ones = torch.ones(HEADS * HEAD_DIM, dtype=torch.bfloat16)
    normed = ops.norm(x, ones, 1e-5)
    exact = torch.tensor(
        reference.norm(x.float().numpy(), ReferenceWeight(values=ones.float().numpy(), quantized=False), 1e-5)
    )
    assert normed.dtype == torch.bfloat16
    assert ((normed.float() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()
