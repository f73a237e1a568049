"""The ops in torch against the numpy reference, op by op, and its cache bit by bit; on a GPU too where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dapji.ops.attention import Attention, KvShape
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.protocol import Activation
from dapji.ops.reference import KvFormat, ReferenceCache, ReferenceOps, ReferenceWeight
from dapji.ops.rope import RopeConfig, RopeTables
from dapji.ops.torch import CachedTorchOps, TorchCache, TorchTables, UncachedTorchOps

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 40
KV_SHAPE = KvShape(n_kv_heads=KV_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM)
CONTEXT = 128
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def asked(window: int | None) -> Attention:
    return Attention(n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=window, scale=0.2)


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


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
    autouse=True,
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the tensors of every test lie."""
    with torch.device(request.param) as device:
        yield device


def both(batch: Batch, device: torch.device, kv: KvFormat = "f32") -> tuple[ReferenceOps, CachedTorchOps]:
    """Over caches that hold the same 20 tokens in blocks 4 and 1."""
    reference = ReferenceCache([KV_SHAPE], 6, kv)
    cache = TorchCache([KV_SHAPE], 6, kv, device)
    k, v = random(20, KV_HEADS * HEAD_DIM, seed=8), random(20, KV_HEADS * HEAD_DIM, seed=9)
    slots = np.array([*range(4 * KV_BLOCK, 5 * KV_BLOCK), *range(KV_BLOCK, KV_BLOCK + 4)])
    reference.write(0, slots, k, v)
    cache.keys[0].write(torch.tensor(slots), torch.tensor(k))
    cache.values[0].write(torch.tensor(slots), torch.tensor(v))
    return (
        ReferenceOps(batch=batch, cache=reference, tables=RopeTables(CONTEXT), activations="f32"),
        CachedTorchOps(batch, cache, TorchTables(CONTEXT, device), device),
    )


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("window", [None, 1, 6, 19])
def test_attention_over_the_cache(device: torch.device, kv: KvFormat, window: int | None) -> None:
    reference, ops = both(two_sequences(), device, kv)
    q, k, v = (random(23, n * HEAD_DIM, seed=n) for n in (HEADS, KV_HEADS, 1 + KV_HEADS))
    v = v[:, : KV_HEADS * HEAD_DIM]
    want = reference.attention(q, k, v, layer=0, attention=asked(window))
    got = ops.attention(*map(torch.tensor, (q, k, v)), layer=0, attention=asked(window))
    np.testing.assert_allclose(got.cpu(), want, **CLOSE)


@pytest.mark.parametrize("window", [None, 1, 6])
def test_ops_of_a_given_length_take_another_batch(device: torch.device, window: int | None) -> None:
    """Single tokens after 20 and after 3, attended to as if there were 40; in the tensors of another batch."""

    def single_tokens(positions: list[int], blocks: list[list[int]]) -> Batch:
        return Batch(
            tokens=np.arange(2, dtype=np.int32),
            positions=np.array(positions, dtype=np.int32),
            starts=np.array([0, 1, 2], dtype=np.int32),
            blocks=np.array(blocks, dtype=np.int32),
            rows=np.array([0, 1], dtype=np.int32),
        )

    batch = single_tokens([20, 3], [[4, 1], [5, -1]])
    reference, other = both(batch, device)
    ops, fixed = (
        CachedTorchOps(each, other._cache, other.tables, device, length=40)
        for each in (single_tokens([7, 33], [[0, -1, -1], [2, 3, 5]]), batch)
    )
    ops.take(fixed)
    q, k, v = (random(2, n * HEAD_DIM, seed=s) for n, s in ((HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)))
    want = reference.attention(q, k, v, layer=0, attention=asked(window))
    for each in (other, fixed, ops):
        got = each.attention(*map(torch.tensor, (q, k, v)), layer=0, attention=asked(window))
        np.testing.assert_allclose(got.cpu(), want, **CLOSE)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_the_cache_rounds_as_the_reference_does(device: torch.device, kv: KvFormat) -> None:
    """Bit for bit, with a block of zeros and halves between two codes among the values."""
    x = random(9, KV_HEADS * HEAD_DIM)
    x[0] = 0
    x[1, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    slots = np.random.default_rng(1).permutation(2 * KV_BLOCK)[:9]
    reference = ReferenceCache([KV_SHAPE], 3, kv)
    reference.write(0, slots, x, x)
    cache = TorchCache([KV_SHAPE], 3, kv, device)
    cache.keys[0].write(torch.tensor(slots), torch.tensor(x))
    reference.copy_block(0, 2)
    cache.copy_block(0, 2)
    rows = cache.keys[0].read(torch.arange(3 * KV_BLOCK)[None], torch.float32)
    np.testing.assert_array_equal(rows[0].transpose(0, 1).cpu(), reference.keys[0])


def test_embed_norm_linear_and_rows(device: torch.device) -> None:
    reference, ops = both(two_sequences(), device)
    table, scale, w, b = random(30, 48), random(48, seed=1), random(64, 48, seed=2), random(64, seed=3)

    def held(values: np.ndarray) -> ReferenceWeight:
        return ReferenceWeight(values=values, quantized=False)

    x = reference.embed(held(table), 1.0)
    np.testing.assert_array_equal(ops.embed(torch.tensor(table), 1.0).cpu(), x)
    normed = reference.norm(x, held(scale), 1e-5, 0.0)
    np.testing.assert_allclose(ops.norm(torch.tensor(x), torch.tensor(scale), 1e-5, 0.0).cpu(), normed, **CLOSE)
    y = reference.linear(x, held(w), held(b))
    product = ops.linear(torch.tensor(x), torch.tensor(w), torch.tensor(b))
    np.testing.assert_allclose(product.cpu(), y, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(ops.select_rows(torch.tensor(x)).cpu(), reference.select_rows(x))
    np.testing.assert_array_equal(ops.add(torch.tensor(x), torch.tensor(x)).cpu(), reference.add(x, x))


@pytest.mark.parametrize("dim", [HEAD_DIM, 16])
def test_rope(device: torch.device, dim: int) -> None:
    reference, ops = both(two_sequences(), device)
    rope = RopeConfig(theta=1e4, dim=dim)
    x = random(23, HEADS * HEAD_DIM)
    want = reference.rope(x, reference.tables[rope], HEAD_DIM)
    np.testing.assert_allclose(ops.rope(torch.tensor(x), ops.tables[rope], HEAD_DIM).cpu(), want, **CLOSE)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(device: torch.device, activation: Activation) -> None:
    reference, ops = both(two_sequences(), device)
    gate, up = random(23, 64) * 4, random(23, 64, seed=1)
    want = reference.gated(gate, up, activation)
    np.testing.assert_allclose(ops.gated(torch.tensor(gate), torch.tensor(up), activation).cpu(), want, **CLOSE)


@pytest.mark.parametrize("window", [None, 5, 100])
def test_attention_without_a_cache_is_attention_with_one(device: torch.device, window: int | None) -> None:
    """Two sequences of 20 tokens, each against the reference alone."""
    q, k, v = (random(40, n * HEAD_DIM, seed=s) for n, s in ((HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)))
    ops = UncachedTorchOps(torch.arange(40).view(2, 20), TorchTables(CONTEXT, device))
    got = ops.attention(*map(torch.tensor, (q, k, v)), layer=0, attention=asked(window))
    for part in (slice(0, 20), slice(20, 40)):
        reference, _ = both(Batch.single(list(range(20))), device)
        want = reference.attention(q[part], k[part], v[part], layer=0, attention=asked(window))
        np.testing.assert_allclose(got[part].cpu(), want, **CLOSE)


def test_bfloat16_stays_bfloat16_with_norms_and_angles_in_float32(device: torch.device) -> None:
    reference, ops = both(two_sequences(), device)
    x = torch.tensor(random(23, HEADS * HEAD_DIM)).bfloat16()
    rope = RopeConfig(theta=1e4, dim=HEAD_DIM)
    rotated = ops.rope(x, ops.tables[rope], HEAD_DIM)
    assert rotated.dtype == torch.bfloat16
    exact = torch.tensor(reference.rope(x.float().cpu().numpy(), reference.tables[rope], HEAD_DIM))
    assert ((rotated.float() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()  # one rounding, at the end
    ones = torch.ones(HEADS * HEAD_DIM, dtype=torch.bfloat16)
    normed = ops.norm(x, ones, 1e-5, 0.0)
    exact = torch.tensor(
        reference.norm(
            x.float().cpu().numpy(), ReferenceWeight(values=ones.float().cpu().numpy(), quantized=False), 1e-5, 0.0
        )
    )
    assert normed.dtype == torch.bfloat16
    assert ((normed.float() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()
