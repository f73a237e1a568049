"""Every op of the numpy reference against torch in float64, or against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dapji.ops.attention import Attention, KvShape
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.formats import FORMATS
from dapji.ops.protocol import Activation
from dapji.ops.reference import (
    Activations,
    KvFormat,
    ReferenceCache,
    ReferenceOps,
    ReferenceWeight,
    quantize_q8,
    round_q8,
    softmax,
)
from dapji.ops.rope import RopeConfig, RopeTables
from dapji.ops.tensor import Tensor

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 40
KV_SHAPE = KvShape(n_kv_heads=KV_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM)
TOKENS = 37
EXACT = {"rtol": 2e-6, "atol": 2e-6}
"""float32 against float64, on values of magnitude 1."""


def asked(window: int | None) -> Attention:
    return Attention(n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=window, scale=0.2)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def weight(*shape: int, seed: int = 1, quantized: bool = False) -> ReferenceWeight:
    return ReferenceWeight(values=random(*shape, seed=seed), quantized=quantized)


def ops(batch: Batch | None = None, *, kv: KvFormat = "f32", activations: Activations = "f32") -> ReferenceOps:
    return ReferenceOps(
        batch=batch or Batch.single(list(range(TOKENS))),
        cache=ReferenceCache([KV_SHAPE], 8, kv),
        tables=RopeTables(128),
        activations=activations,
    )


def double(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def test_embed_and_select_rows() -> None:
    batch = Batch.single([4, 0, 4, 2], all_rows=False)
    table = weight(5, 8)
    x = ops(batch).embed(table, 1.0)
    np.testing.assert_array_equal(x, F.embedding(torch.tensor([4, 0, 4, 2]), torch.tensor(table.values)))
    np.testing.assert_array_equal(ops(batch).select_rows(x), x[3:])


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norm(eps: float) -> None:
    x, w = random(TOKENS, 48), weight(48)
    np.testing.assert_allclose(ops().norm(x, w, eps, 0.0), F.rms_norm(double(x), (48,), double(w.values), eps), **EXACT)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    x, w, b = random(TOKENS, 64), weight(96, 64), weight(96, seed=2) if bias else None
    expected = F.linear(double(x), double(w.values), double(b.values) if b else None)
    np.testing.assert_allclose(ops().linear(x, w, b), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["Q8_0", "F32"])
def test_linear_of_q8_activations_is_the_integer_formula(format: str) -> None:
    """Codes, int32 products per block, scales in float; a weight that is not quantised takes float activations."""
    x, values = random(TOKENS, 96), random(8, 96, seed=3)
    codes, scales = quantize_q8(values)
    if format == "Q8_0":
        halves = scales.astype(np.float16)
        data = np.concatenate([halves.view(np.uint8), codes.view(np.uint8)], axis=-1).reshape(8, -1)
        tensor = Tensor(name="w", format=FORMATS["Q8_0"], shape=(8, 96), source=data)
        x_codes, x_scales = quantize_q8(x)
        dots = np.einsum("tbk,obk->tob", x_codes.astype(np.int32), codes.astype(np.int32))
        expected = (dots * x_scales[:, None, :, 0].astype(np.float64) * halves[None, :, :, 0]).sum(axis=-1)
    else:
        tensor = Tensor.from_float32("w", values)
        expected = (double(x) @ double(values).T).numpy()
    got = ops(activations="q8").linear(x, ReferenceWeight.load(tensor))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    rounding = np.abs(got - x @ tensor.float32().T).max()
    assert (rounding > 1e-3) == (format == "Q8_0")


def test_q8_codes_are_the_formula_bit_for_bit() -> None:
    """One value at a time, in float32: scale = amax / 127, code = round-half-even(x / scale)."""
    x = random(5, 80, seed=4) * np.float32(10) ** np.arange(-3, 2, dtype=np.float32)[:, None]
    x[1, 32:64] = 0
    codes, scales = quantize_q8(x)
    assert codes.shape == (5, 3, 32)
    for row, block in np.ndindex(5, 3):
        values = x[row, 32 * block : 32 * (block + 1)]
        scale = np.float32(max(abs(v) for v in values)) / np.float32(127)
        assert scales[row, block, 0] == scale
        for i, value in enumerate(values):
            # Python's round is half to even too
            assert codes[row, block, i] == (round(float(np.float32(value / scale))) if scale else 0)
        assert not codes[row, block, len(values) :].any()
    np.testing.assert_array_equal(round_q8(x), (codes * scales).reshape(5, 96)[:, :80])
    assert (np.abs(round_q8(x) - x) <= np.repeat(scales[..., 0], 32, axis=1)[:, :80] * 0.5001).all()
    ties = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5] + [0] * 26], dtype=np.float32)
    assert quantize_q8(ties)[0][0, 0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    codes, scales = quantize_q8(np.full(32, 1e-38, dtype=np.float32))
    assert not codes.any()
    assert not scales.any()


@pytest.mark.parametrize("dim", [HEAD_DIM, 16])
def test_rope(dim: int) -> None:
    """Against transformers' rotation of the first `dim` values; the others stay."""
    rope = RopeConfig(theta=1e4, dim=dim)
    batch = Batch.single(list(range(TOKENS)), past=50)
    x = random(TOKENS, HEADS * HEAD_DIM)
    angles = np.outer(np.arange(50, 50 + TOKENS), 1e4 ** -(np.arange(0, dim, 2) / dim))
    cos, sin = (double(np.tile(f(angles), 2))[None] for f in (np.cos, np.sin))
    heads = double(x).view(1, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)
    rotated, _ = apply_rotary_pos_emb(heads[..., :dim], heads[..., :dim], cos, sin)
    expected = torch.cat([rotated, heads[..., dim:]], dim=-1).transpose(1, 2).reshape(TOKENS, -1)
    table = ops(batch).tables[rope]
    np.testing.assert_allclose(ops(batch).rope(x, table, HEAD_DIM), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("past", [0, 20])
def test_attention(window: int | None, past: int) -> None:
    """Against torch's, over the whole text at once; here the first `past` tokens come in a step of their own."""
    q, k, v = (random(TOKENS, n * HEAD_DIM, seed=n) for n in (HEADS, KV_HEADS, KV_HEADS))
    first = ops(Batch.single(list(range(past)))) if past else ops()
    if past:
        first.attention(q[:past], k[:past], v[:past], layer=0, attention=asked(window))
    then = ReferenceOps(
        batch=Batch.single(list(range(TOKENS - past)), past=past),
        cache=first.cache,
        tables=first.tables,
        activations="f32",
    )
    got = then.attention(q[past:], k[past:], v[past:], layer=0, attention=asked(window))

    heads = [double(x).view(TOKENS, -1, HEAD_DIM).transpose(0, 1)[None] for x in (q, k, v)]
    mask = torch.ones(TOKENS, TOKENS).tril().bool()
    if window is not None:
        mask &= torch.ones(TOKENS, TOKENS).triu(1 - window).bool()
    expected = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.2, enable_gqa=True)
    np.testing.assert_allclose(got, expected[0].transpose(0, 1).reshape(TOKENS, -1)[past:], **EXACT)


def test_the_cache_holds_what_its_format_can() -> None:
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((20, KV_HEADS * HEAD_DIM), dtype=np.float32) for _ in range(2))
    slots = rng.permutation(3 * KV_BLOCK)[:20]
    for kv in ("f32", "f16", "q8"):
        cache = ReferenceCache([KV_SHAPE], 3, kv)
        cache.write(0, slots, k, v)
        for rows, new in ((cache.keys[0], k), (cache.values[0], v)):
            heads = new.reshape(20, KV_HEADS, HEAD_DIM)
            if kv == "f16":
                heads = torch.tensor(heads).half().float().numpy()
            elif kv == "q8":  # blocks of 32 and 8 values, of each head on its own
                parts = [heads[..., :32], heads[..., 32:]]
                scales = [np.abs(part).max(axis=-1, keepdims=True) / np.float32(127) for part in parts]
                heads = np.concatenate([np.rint(p / s) * s for p, s in zip(parts, scales, strict=True)], axis=-1)
            np.testing.assert_array_equal(rows[slots], heads)
        cache.copy_block(0, 2)
        np.testing.assert_array_equal(cache.keys[0][2 * KV_BLOCK :], cache.keys[0][:KV_BLOCK])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(activation: Activation) -> None:
    gate, up = random(TOKENS, 64) * 4, random(TOKENS, 64, seed=2)
    gate[0, :6] = [0, -0.0, 100, -100, 1e4, -1e4]
    x = double(gate)
    functions = {"silu": F.silu(x), "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    np.testing.assert_allclose(ops().gated(gate, up, activation), functions[activation] * double(up), **EXACT)


def test_add_and_softmax() -> None:
    a, b = random(3, 5), random(3, 5, seed=1)
    np.testing.assert_array_equal(ops().add(a, b), a + b)
    x = np.array([[1e4, 1e4 - 1, -math.inf], [-1e4, 0, 3]], dtype=np.float32)
    np.testing.assert_allclose(softmax(x), torch.softmax(double(x), dim=-1), **EXACT)
