"""The reference: every op in plain numpy float32, slow and readable: the truth that the others are compared with.

Two arithmetics. `activations="f32"` multiplies float32 by dequantised weights. `activations="q8"` first rounds what
enters a linear with a quantised weight to int8, as integer dot-product kernels must; the products are then exact, so
that a kernel may differ from this by the order of its float32 sums alone. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dapji.ops.attention import Attention, KvShape, LatentAttention, first_visible
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.low_rank import LowRank
from dapji.ops.protocol import Activation
from dapji.ops.rope import RopeTable, RopeTables
from dapji.ops.routing import Routing, route
from dapji.ops.tensor import Tensor

Floats = NDArray[np.float32]
Activations = Literal["f32", "q8"]
KvFormat = Literal["f32", "f16", "q8"]

Q8_BLOCK = 32
"""So many neighbours of an activation (of a head's key or value, with kv="q8") share one scale."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceWeight:
    """A weight's values, held as float32 whatever the file holds: speed of a step over memory."""

    values: Floats
    quantized: bool

    @staticmethod
    def load(tensor: Tensor) -> ReferenceWeight:
        return ReferenceWeight(values=tensor.float32(), quantized=tensor.format.block > 1)

    def expert(self, index: int) -> ReferenceWeight:
        """One matrix of [n, out, in]."""
        return ReferenceWeight(values=self.values[index], quantized=self.quantized)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceLowRank:
    """`LowRank`, its values."""

    a: Floats
    b: Floats
    scale: float
    factors: Floats | None

    @staticmethod
    def load(pair: LowRank, weight: ReferenceWeight) -> ReferenceLowRank:
        return ReferenceLowRank(
            a=pair.a.float32(), b=pair.b.float32(), scale=pair.scale, factors=pair.factors(weight.values)
        )

    def changed(self, y: Floats, x: Floats) -> Floats:
        """What becomes of the weight's products y of x."""
        projected: Floats = np.float32(self.scale) * (x @ self.a.T)
        term: Floats = projected @ self.b.T
        return y + term if self.factors is None else (y + term) * self.factors


class ReferenceCache:
    """Keys and values of every layer, in blocks. Rounded on the way in to what `kv` can hold, and kept as float32."""

    def __init__(self, kv_shapes: Sequence[KvShape], n_blocks: int, kv: KvFormat) -> None:
        self.kv: KvFormat = kv
        n_slots = n_blocks * KV_BLOCK
        self.keys = [self._rows(n_slots, shape.n_kv_heads, shape.key_dim) for shape in kv_shapes]  # [slots, K, Dh]
        self.values = [self._rows(n_slots, shape.n_kv_heads, shape.value_dim) for shape in kv_shapes]

    @staticmethod
    def _rows(*shape: int) -> Floats:
        return np.zeros(shape, dtype=np.float32)

    def write(self, layer: int, slots: NDArray[np.int64], k: Floats, v: Floats | None) -> None:
        """k, v: [len(slots), K*Dh]; v None where values are the beginning of the keys."""
        for rows, new in ((self.keys[layer], k), (self.values[layer], v)):
            if new is not None:
                rows[slots] = self._round(new.reshape(-1, *rows.shape[1:]))

    def copy_block(self, source: int, target: int) -> None:
        for rows in (*self.keys, *self.values):
            rows[target * KV_BLOCK : (target + 1) * KV_BLOCK] = rows[source * KV_BLOCK : (source + 1) * KV_BLOCK]

    def _round(self, x: Floats) -> Floats:
        if self.kv == "f16":
            return x.astype(np.float16).astype(np.float32)
        return round_q8(x) if self.kv == "q8" else x


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceOps:
    """The ops on one batch."""

    batch: Batch
    cache: ReferenceCache
    tables: RopeTables
    activations: Activations
    adapters: Mapping[ReferenceWeight, Mapping[int, ReferenceLowRank]] = field(default_factory=dict)
    """What each adapter, by its number in batches, makes of the linear of a weight."""

    def embed(self, weight: ReferenceWeight, scale: float) -> Floats:
        return weight.values[self.batch.tokens] * np.float32(scale)

    def norm(self, x: Floats, weight: ReferenceWeight, eps: float, offset: float) -> Floats:
        return _normed(x, eps) * (np.float32(offset) + weight.values)

    def norm_heads(self, x: Floats, weight: ReferenceWeight | None, eps: float, offset: float, head_dim: int) -> Floats:
        normed = _normed(x.reshape(len(x), -1, head_dim), eps)
        if weight is not None:
            normed = normed * (np.float32(offset) + weight.values)
        return normed.reshape(x.shape)

    def linear(self, x: Floats, weight: ReferenceWeight, bias: ReferenceWeight | None = None) -> Floats:
        taken = round_q8(x) if weight.quantized and self.activations == "q8" else x
        y: Floats = taken @ weight.values.T
        for number, pair in self.adapters.get(weight, {}).items():
            rows = self.batch.adapted(number, len(x))
            y[rows] = pair.changed(y[rows], x[rows])
        if bias is not None:
            y += bias.values
        return y

    def rope(self, x: Floats, table: RopeTable, head_dim: int) -> Floats:
        heads = x.reshape(len(x), -1, head_dim)  # [T, n, Dh]
        cos = table.cos[self.batch.positions, None, :]  # [T, 1, dim/2]
        sin = table.sin[self.batch.positions, None, :]
        first, second, rest = np.split(heads, [table.dim // 2, table.dim], axis=-1)
        rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
        return rotated.reshape(x.shape)

    def attention(self, q: Floats, k: Floats, v: Floats, *, layer: int, attention: Attention) -> Floats:
        n_kv_heads, head_dim = attention.n_kv_heads, attention.head_dim
        if attention.temperature is not None:
            q = q * attention.temperature.factors(self.tables.context)[self.batch.positions, None]
        mixed = np.empty_like(q)  # [T, H*Dh]
        for new, positions, slots in self._sequences():
            self.cache.write(layer, slots[positions], k[new], v[new])
            # Query heads side by side with the kv head that they share.
            queries = q[new].reshape(len(positions), n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)  # [K, H/K, T, Dh]
            keys = self.cache.keys[layer][slots].transpose(1, 2, 0)[:, None]  # [K, 1, Dh, S]
            values = self.cache.values[layer][slots].transpose(1, 0, 2)[:, None]  # [K, 1, S, Dh]
            scores = queries @ keys * np.float32(attention.scale)  # [K, H/K, T, S]
            if attention.softcap is not None:
                scores = _softcap(scores, attention.softcap)
            seen = visible(positions, attention.window, attention.chunk)
            attended = softmax(np.where(seen, scores, np.float32(-np.inf))) @ values
            mixed[new] = attended.transpose(2, 0, 1, 3).reshape(len(positions), -1)
        return mixed

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
        """The naive form."""
        n_heads, latent_dim = attention.n_heads, attention.latent_dim
        queries = np.concatenate(
            [q_nope.reshape(len(q_nope), n_heads, -1), q_rope.reshape(len(q_rope), n_heads, -1)], axis=-1
        )  # [T, H, nope + rope]
        mixed = np.empty((len(queries), n_heads * attention.value_dim), dtype=np.float32)
        for new, positions, slots in self._sequences():
            self.cache.write(layer, slots[positions], np.concatenate([latent[new], k_rope[new]], axis=-1), None)
            cached = self.cache.keys[layer][slots, 0]  # [S, latent + rope]
            latents, rotated = cached[:, :latent_dim], cached[:, latent_dim:]
            expanded = latents @ k_up.values  # [H, S, nope]
            shared = np.broadcast_to(rotated, (n_heads, *rotated.shape))
            keys = np.concatenate([expanded, shared], axis=-1)  # [H, S, nope + rope]
            values = latents @ v_up.values.transpose(0, 2, 1)  # [H, S, value]
            scores = (
                queries[new].transpose(1, 0, 2) @ keys.transpose(0, 2, 1) * np.float32(attention.scale)
            )  # [H, T, S]
            attended = softmax(np.where(visible(positions), scores, np.float32(-np.inf))) @ values  # [H, T, value]
            mixed[new] = attended.transpose(1, 0, 2).reshape(len(positions), -1)
        return mixed

    def _sequences(self) -> Iterator[tuple[slice, NDArray[np.int32], NDArray[np.int64]]]:
        """Of each sequence: its new tokens in the batch, their positions [T], and the slots [S] from position 0 on."""
        for sequence in range(len(self.batch.starts) - 1):
            new = slice(self.batch.starts[sequence], self.batch.starts[sequence + 1])
            yield new, self.batch.positions[new], self.batch.slots(sequence)

    def gated(self, gate: Floats, up: Floats, activation: Activation) -> Floats:
        return _ACTIVATIONS[activation](gate) * up

    def experts(
        self,
        x: Floats,
        logits: Floats,
        selection_bias: ReferenceWeight | None,
        gate: ReferenceWeight,
        up: ReferenceWeight,
        down: ReferenceWeight,
        *,
        routing: Routing,
        activation: Activation,
    ) -> Floats:
        chosen, weights = route(logits, None if selection_bias is None else selection_bias.values, routing)
        given = np.zeros((*chosen.shape, x.shape[1]), dtype=np.float32)  # [T, k, D]
        for expert in np.unique(chosen):
            token, choice = np.nonzero(chosen == expert)
            weight = weights[token, choice, None]
            taken = x[token] * weight if routing.weighs == "input" else x[token]
            hidden = self.gated(
                self.linear(taken, gate.expert(expert)), self.linear(taken, up.expert(expert)), activation
            )
            out = self.linear(hidden, down.expert(expert))
            given[token, choice] = out * weight if routing.weighs == "output" else out
        return given.sum(axis=1)  # type: ignore[no-any-return]

    def add(self, a: Floats, b: Floats) -> Floats:
        return a + b

    def select_rows(self, x: Floats) -> Floats:
        return x[self.batch.rows]

    def select_hidden(self, x: Floats) -> Floats:
        return x[self.batch.hidden_rows]

    def softcap(self, x: Floats, cap: float) -> Floats:
        return _softcap(x, cap)


def visible(positions: NDArray[np.int32], window: int | None = None, chunk: int | None = None) -> NDArray[np.bool_]:
    """[T, S]: whether the query at each of the positions sees the key at 0 … S - 1, S being the last position + 1."""
    keys = np.arange(positions[-1] + 1)
    seen: NDArray[np.bool_] = (keys <= positions[:, None]) & (keys >= first_visible(positions, window, chunk)[:, None])
    return seen


def softmax(x: Floats) -> Floats:
    """Over the last axis. Every row has a finite value."""
    weights: Floats = np.exp(x - x.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def quantize_q8(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """[..., n] -> codes [..., blocks, 32] and scales [..., blocks, 1]: x is about codes * scales.

    scale = amax / 127; code = x / scale, rounded half to even, all in float32. A block of zeros, or of numbers
    so small that the scale would not be a normal float, has scale 0 and codes 0. A last block of less than 32 values is
    filled up with zeros.
    """
    n = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-n // Q8_BLOCK) * Q8_BLOCK), dtype=np.float32)
    padded[..., :n] = x
    blocks = padded.reshape(*x.shape[:-1], -1, Q8_BLOCK)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    scales[scales < np.finfo(np.float32).tiny] = 0
    codes = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    return np.rint(codes).astype(np.int8), scales


def round_q8(x: Floats) -> Floats:
    """x [..., n] as int8 codes can hold it."""
    codes, scales = quantize_q8(x)
    rounded: Floats = (codes * scales).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return rounded


def _normed(x: Floats, eps: float) -> Floats:
    """By the root mean square of the last axis."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    normed: Floats = x / np.sqrt(mean_square + np.float32(eps))
    return normed


def _softcap(x: Floats, cap: float) -> Floats:
    capped: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return capped


def _silu(x: Floats) -> Floats:
    # exp of the negative magnitude never overflows
    small = np.exp(-np.abs(x))
    sigmoid: Floats = np.where(x >= 0, np.float32(1), small) / (1 + small)
    return x * sigmoid


def _gelu(x: Floats) -> Floats:
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return np.float32(0.5) * x * (1 + erf(x / np.float32(math.sqrt(2))))  # type: ignore[no-any-return]


def _gelu_tanh(x: Floats) -> Floats:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))  # type: ignore[no-any-return]


_ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}
