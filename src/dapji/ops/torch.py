"""The ops in torch: differentiable, on any device. For GPUs and for training.

Two kinds differ in attention alone: `CachedTorchOps` runs a `Batch` over a cache of keys and values, as every executor
does; `UncachedTorchOps` runs whole sequences, through which gradients flow. Norms and rotations are computed in float32
whatever the weights' type. Needs torch (the extra `train`); import it on use only. Knows nothing of models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dapji.ops.attention import Attention, KvShape, LatentAttention
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.protocol import Activation
from dapji.ops.reference import Q8_BLOCK, KvFormat
from dapji.ops.rope import RopeTable, RopeTables
from dapji.ops.routing import Routing


class TorchTables(RopeTables):
    """Rope tables with a copy of each on the device."""

    def __init__(self, context: int, device: torch.device) -> None:
        super().__init__(context)
        self._device = device
        self._copies: dict[RopeTable, tuple[Tensor, Tensor]] = {}

    def on_device(self, table: RopeTable) -> tuple[Tensor, Tensor]:
        """cos and sin, [context, dim/2] float32."""
        if table not in self._copies:
            self._copies[table] = (
                torch.tensor(table.cos, device=self._device),
                torch.tensor(table.sin, device=self._device),
            )
        return self._copies[table]


class _Rows:
    """Keys, or values, of one layer: [slots, K, Dh] on the device, in a format of the cache."""

    def __init__(self, n_slots: int, n_kv_heads: int, head_dim: int, kv: KvFormat, device: torch.device) -> None:
        self._head_dim = head_dim
        self._scales: Tensor | None = None
        if kv == "q8":
            groups = -(-head_dim // Q8_BLOCK)
            self._scales = torch.zeros(n_slots, n_kv_heads, groups, 1, device=device)
            self._stored = torch.zeros(n_slots, n_kv_heads, groups, Q8_BLOCK, dtype=torch.int8, device=device)
        else:
            dtype = torch.float16 if kv == "f16" else torch.float32
            self._stored = torch.zeros(n_slots, n_kv_heads, head_dim, dtype=dtype, device=device)

    def write(self, slots: Tensor, new: Tensor) -> None:
        """new: [len(slots), K*Dh]."""
        new = new.view(len(new), -1, self._head_dim)
        if self._scales is None:
            self._stored[slots] = new.to(self._stored.dtype)
        else:  # as `reference.quantize_q8`
            padded = F.pad(new.float(), (0, -self._head_dim % Q8_BLOCK)).view(len(new), *self._stored.shape[1:])
            largest = padded.abs().amax(dim=-1, keepdim=True)
            # by a tensor: on CUDA, division by a number is multiplication by its reciprocal, which rounds otherwise
            scales = largest / torch.full_like(largest, 127)
            scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0, scales)
            codes = torch.where(scales > 0, padded / scales, 0)
            self._stored[slots] = codes.round().to(torch.int8)
            self._scales[slots] = scales

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """slots: [n, S]. Returns [n, K, S, Dh]."""
        rows = self._stored[slots]
        if self._scales is not None:
            rows = (rows * self._scales[slots]).flatten(-2)[..., : self._head_dim]
        return rows.to(dtype).transpose(1, 2)

    def copy(self, source: slice, target: slice) -> None:
        self._stored[target] = self._stored[source]
        if self._scales is not None:
            self._scales[target] = self._scales[source]


class TorchCache:
    """Keys and values of every layer, in blocks."""

    def __init__(self, kv_shapes: Sequence[KvShape], n_blocks: int, kv: KvFormat, device: torch.device) -> None:
        n_slots = n_blocks * KV_BLOCK
        self.keys = [_Rows(n_slots, shape.n_kv_heads, shape.key_dim, kv, device) for shape in kv_shapes]
        self.values = [_Rows(n_slots, shape.n_kv_heads, shape.value_dim, kv, device) for shape in kv_shapes]

    def copy_block(self, source: int, target: int) -> None:
        for rows in (*self.keys, *self.values):
            rows.copy(*(slice(block * KV_BLOCK, (block + 1) * KV_BLOCK) for block in (source, target)))


class TorchOps(ABC):
    """What does not depend on where keys and values are."""

    def __init__(self, tokens: Tensor, positions: Tensor, tables: TorchTables) -> None:
        """tokens and positions: [T] int64 on the device."""
        self._tokens = tokens
        self._positions = positions
        self.tables = tables
        self._angles: dict[RopeTable, tuple[Tensor, Tensor]] = {}

    def embed(self, weight: Tensor, scale: float) -> Tensor:
        return F.embedding(self._tokens, weight) * scale

    def norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, offset + weight.float(), eps).to(x.dtype)

    def norm_heads(self, x: Tensor, weight: Tensor | None, eps: float, offset: float, head_dim: int) -> Tensor:
        factors = None if weight is None else offset + weight.float()
        heads = x.view(len(x), -1, head_dim).float()
        return F.rms_norm(heads, (head_dim,), factors, eps).to(x.dtype).view(x.shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def rope(self, x: Tensor, table: RopeTable, head_dim: int) -> Tensor:
        if table not in self._angles:
            cos, sin = self.tables.on_device(table)
            self._angles[table] = cos[self._positions, None], sin[self._positions, None]  # [T, 1, dim/2]
        cos, sin = self._angles[table]
        heads = x.view(len(x), -1, head_dim).float()  # [T, n, Dh]
        first, second, rest = heads.tensor_split((table.dim // 2, table.dim), dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return rotated.to(x.dtype).view(x.shape)

    def latent_attention(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        k_up: Tensor,
        v_up: Tensor,
        *,
        layer: int,
        attention: LatentAttention,
    ) -> Tensor:
        raise NotImplementedError

    @abstractmethod
    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, attention: Attention) -> Tensor: ...

    def gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        if activation == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up

    def experts(
        self,
        x: Tensor,
        logits: Tensor,
        selection_bias: Tensor | None,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        routing: Routing,
        activation: Activation,
    ) -> Tensor:
        raise NotImplementedError

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @abstractmethod
    def select_rows(self, x: Tensor) -> Tensor: ...


class CachedTorchOps(TorchOps):
    """The ops on one batch. Sequences with as many new tokens attend together; all else takes all rows at once."""

    def __init__(
        self, batch: Batch, cache: TorchCache, tables: TorchTables, device: torch.device, *, length: int | None = None
    ) -> None:
        """length: attend as if the longest sequence had so many tokens (at least as many as it has), by the same
        operations whatever the lengths are. Default: by what is least to do."""
        super().__init__(_index(batch.tokens, device), _index(batch.positions, device), tables)
        self._cache = cache
        self._rows = _index(batch.rows, device)
        counts = np.diff(batch.starts)
        owners = np.repeat(np.arange(len(counts)), counts)
        self._written = _index(batch.slots_at(owners, batch.positions), device)
        self._groups = [_Group(batch, np.flatnonzero(counts == count), device, length) for count in np.unique(counts)]

    def take(self, other: CachedTorchOps) -> None:
        """Continue with the batch of `other`, which has the same shape and length, in the tensors of this one."""
        for mine, its in zip(self._indices(), other._indices(), strict=True):
            mine.copy_(its)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, attention: Attention) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.write(self._written, k)
        values.write(self._written, v)
        mixed = torch.empty_like(q)
        n_kv_heads, head_dim = attention.n_kv_heads, attention.head_dim
        sharing = attention.n_heads // n_kv_heads
        for group in self._groups:
            slots, mask, causal = group.view(attention.window, sharing)
            queries = q[group.rows].view(group.n, group.new, n_kv_heads, sharing, head_dim).permute(0, 2, 3, 1, 4)
            # Under a mask, heads that share keys become rows of one head, which every kernel of torch can do.
            attended = F.scaled_dot_product_attention(
                queries.flatten(1, 2) if causal else queries.flatten(2, 3),  # [n, H, t, Dh] or [n, K, H/K * t, Dh]
                keys.read(slots, q.dtype),
                values.read(slots, q.dtype),
                attn_mask=mask,
                is_causal=causal,
                scale=attention.scale,
                enable_gqa=causal and sharing > 1,
            )
            attended = attended.view(queries.shape).permute(0, 3, 1, 2, 4)  # [n, t, K, H/K, Dh]
            mixed[group.rows] = attended.reshape(-1, q.shape[1])
        return mixed

    def select_rows(self, x: Tensor) -> Tensor:
        return x[self._rows]

    def _indices(self) -> list[Tensor]:
        own = [self._tokens, self._positions, self._rows, self._written]
        return own + [index for group in self._groups for index in (group.slots, group.positions)]


class _Group:
    """Sequences of a batch that have as many new tokens each."""

    def __init__(
        self, batch: Batch, members: NDArray[np.intp], device: torch.device, length: int | None = None
    ) -> None:
        """members: [n] which sequences."""
        starts = batch.starts[members]
        self.n = len(members)
        self.new = int(batch.starts[members[0] + 1] - starts[0])
        rows = starts[:, None] + np.arange(self.new)  # [n, t]
        self.rows = slice(None) if rows.size == len(batch.tokens) else _index(rows.ravel(), device)
        """Of the batch, its tokens: n * t rows, sequence after sequence."""
        positions = batch.positions[rows]
        last = positions[:, -1:]
        self._shortest = int(last.min()) + 1 if length is None else 0  # any, for a given length
        self._longest = int(last.max()) + 1 if length is None else length
        # beyond a sequence's end its last slot again: no token sees what seems to lie after itself
        self.slots = _index(batch.slots_at(members[:, None], np.minimum(np.arange(self._longest), last)), device)
        self.positions = _index(positions, device)
        self._views: dict[tuple[int | None, int], tuple[Tensor, Tensor | None, bool]] = {}

    def view(self, window: int | None, sharing: int) -> tuple[Tensor, Tensor | None, bool]:
        """Slots of the keys that its tokens see, [n, S], and the mask for them: [n, 1, sharing * t, S], or none and
        whether attention is causal. Slots before every token's window are left out."""
        key = window, sharing
        if key not in self._views:
            first = 0 if window is None else max(0, self._shortest - self.new - window + 1)
            slots = self.slots[:, first:]
            whole = first == 0 and self.new == self._longest and (window is None or self.new <= window)
            if whole or (self.new == 1 and self._shortest == self._longest):
                self._views[key] = slots, None, self.new > 1
            else:
                keys = torch.arange(first, self._longest, device=slots.device)
                seen = visible(self.positions, keys, window)[:, None].repeat(1, 1, sharing, 1)
                self._views[key] = slots, seen, False
        return self._views[key]


class UncachedTorchOps(TorchOps):
    """The ops on whole sequences of one length, all rows wanted; gradients flow through all of them."""

    def __init__(self, tokens: Tensor, tables: TorchTables) -> None:
        """tokens: [B, S] int64."""
        self._n_sequences, self._length = tokens.shape
        positions = torch.arange(self._length, device=tokens.device)
        super().__init__(tokens.flatten(), positions.repeat(self._n_sequences), tables)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, attention: Attention) -> Tensor:
        q, k, v = (x.view(self._n_sequences, self._length, -1, attention.head_dim).transpose(1, 2) for x in (q, k, v))
        mask, window = None, attention.window
        if window is not None and window < self._length:
            positions = self._positions[: self._length]
            mask = visible(positions, positions, window)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=attention.scale, enable_gqa=q.shape[1] != k.shape[1]
        )  # [B, H, S, Dh]
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def select_rows(self, x: Tensor) -> Tensor:
        return x


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """queries: [..., t], keys: [S]. [..., t, S] bool: whether the token at each position sees the key at each."""
    distance = queries[..., None] - keys
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _index(values: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
