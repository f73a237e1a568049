"""The ops in torch: differentiable, on any device. For GPUs and for training.

Two kinds differ in attention alone: `CachedTorchOps` runs a `Batch` over a cache of keys and values, as every executor
does; `UncachedTorchOps` runs whole sequences, through which gradients flow. Norms, rotations and routing are computed
in float32 whatever the weights' type. Needs torch (the extra `train`); import it on use only. Knows nothing of models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dapji.ops import torch_kernels as kernels
from dapji.ops.attention import Attention, KvShape, LatentAttention, Temperature, first_visible
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.protocol import Activation
from dapji.ops.reference import Q8_BLOCK, KvFormat
from dapji.ops.rope import RopeTable, RopeTables
from dapji.ops.routing import Routing


class TorchTables(RopeTables):
    """Rope tables with a copy of each on the device, and what else depends on positions alone."""

    def __init__(self, context: int, device: torch.device) -> None:
        super().__init__(context)
        self._device = device
        self._copies: dict[RopeTable, tuple[Tensor, Tensor]] = {}
        self._factors: dict[Temperature, Tensor] = {}

    def on_device(self, table: RopeTable) -> tuple[Tensor, Tensor]:
        """cos and sin, [context, dim/2] float32."""
        if table not in self._copies:
            self._copies[table] = (
                torch.tensor(table.cos, device=self._device),
                torch.tensor(table.sin, device=self._device),
            )
        return self._copies[table]

    def factors(self, temperature: Temperature) -> Tensor:
        """[context] float32, of queries by position."""
        if temperature not in self._factors:
            self._factors[temperature] = torch.tensor(temperature.factors(self.context), device=self._device)
        return self._factors[temperature]


class _Rows:
    """Keys, or values, of one layer: [slots, K, Dh] on the device, in a format of the cache."""

    def __init__(self, n_slots: int, n_kv_heads: int, head_dim: int, kv: KvFormat, device: torch.device) -> None:
        self.head_dim = head_dim
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
        new = new.view(len(new), -1, self.head_dim)
        if self._scales is None:
            self._stored[slots] = new.to(self._stored.dtype)
        else:  # as `reference.quantize_q8`
            padded = F.pad(new.float(), (0, -self.head_dim % Q8_BLOCK)).view(len(new), *self._stored.shape[1:])
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
            rows = (rows * self._scales[slots]).flatten(-2)[..., : self.head_dim]
        return rows.to(dtype).transpose(1, 2)

    def copy(self, source: slice, target: slice) -> None:
        self._stored[target] = self._stored[source]
        if self._scales is not None:
            self._scales[target] = self._scales[source]


class TorchCache:
    """Keys and values of every layer, in blocks. Where values are the beginning of the keys, theirs take no memory."""

    def __init__(self, kv_shapes: Sequence[KvShape], n_blocks: int, kv: KvFormat, device: torch.device) -> None:
        n_slots = n_blocks * KV_BLOCK
        self.keys = [_Rows(n_slots, shape.n_kv_heads, shape.key_dim, kv, device) for shape in kv_shapes]
        self.values = [_Rows(n_slots, shape.n_kv_heads, shape.value_dim, kv, device) for shape in kv_shapes]

    def read(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """slots: [n, S]. Returns keys and values, [n, K, S, Dh]; the keys again where there are no values."""
        keys, values = self.keys[layer], self.values[layer]
        read = keys.read(slots, dtype)
        return read, values.read(slots, dtype) if values.head_dim else read

    def copy_block(self, source: int, target: int) -> None:
        for rows in (*self.keys, *self.values):
            rows.copy(*(slice(block * KV_BLOCK, (block + 1) * KV_BLOCK) for block in (source, target)))


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchLowRank:
    """`LowRank` on the device. Gradients flow to a and b, whose type may be another than the weights'."""

    a: Tensor
    b: Tensor
    scale: float
    factors: Tensor | None = None
    """[out] float32, where there is a magnitude."""

    def changed(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """What becomes of y, the weight's products of x with the bias added."""
        term = self.scale * F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)
        if self.factors is None:
            return y + term.to(y.dtype)
        y, shift = y.float(), 0.0 if bias is None else bias.float()
        return (y - shift + term) * self.factors + shift


Adapters = Mapping[Tensor, Mapping[int, TorchLowRank]]
"""What each adapter, by its number in batches, makes of the linear of a weight."""


class TorchOps(ABC):
    """What does not depend on where keys and values are."""

    _recordable = False
    """Whether operations must be the same, with the same shapes, whatever the values: what a CUDA graph can record."""

    def __init__(self, tokens: Tensor, positions: Tensor, tables: TorchTables, adapters: Adapters) -> None:
        """tokens and positions: [T] int64 on the device."""
        self._adapters = adapters
        self._tokens = tokens
        self._positions = positions
        self.tables = tables
        self._angles: dict[RopeTable, tuple[Tensor, Tensor]] = {}

    def embed(self, weight: Tensor, scale: float) -> Tensor:
        return F.embedding(self._tokens, weight) * scale

    def norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        return kernels.rms_norm(x, _factors(weight, offset), eps)

    def norm_heads(self, x: Tensor, weight: Tensor | None, eps: float, offset: float, head_dim: int) -> Tensor:
        factors = None if weight is None else _factors(weight, offset)
        return kernels.rms_norm(x.view(len(x), -1, head_dim), factors, eps).view(x.shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = kernels.linear(x.to(weight.dtype), weight, bias)  # a router may be float32 where all else is bfloat16
        for number, pair in self._adapters.get(weight, {}).items():
            y = self._changed(y, x, bias, number, pair)
        return y

    @abstractmethod
    def _changed(self, y: Tensor, x: Tensor, bias: Tensor | None, number: int, pair: TorchLowRank) -> Tensor:
        """y and, for the rows that have the adapter, what its pair makes of it."""

    def rope(self, x: Tensor, table: RopeTable, head_dim: int) -> Tensor:
        if table not in self._angles:
            cos, sin = self.tables.on_device(table)
            self._angles[table] = cos[self._positions, None], sin[self._positions, None]  # [T, 1, dim/2]
        cos, sin = self._angles[table]
        heads = x.view(len(x), -1, head_dim).float()  # [T, n, Dh]
        return kernels.rotate(heads, cos, sin).to(x.dtype).view(x.shape)

    @abstractmethod
    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, attention: Attention) -> Tensor: ...

    @abstractmethod
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
    ) -> Tensor: ...

    def gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        return gated(gate, up, activation)

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
        chosen, weights = route(logits, selection_bias, routing)  # [T, k]
        experts = _Experts(gate, up, down, routing, activation)
        apply = experts.on_device if self._recordable else experts.one_by_one
        return apply(x, chosen, weights).to(x.dtype)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @abstractmethod
    def select_rows(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def select_hidden(self, x: Tensor) -> Tensor: ...

    def _tempered(self, q: Tensor, temperature: Temperature | None) -> Tensor:
        if temperature is None:
            return q
        return (q * self.tables.factors(temperature)[self._positions, None]).to(q.dtype)


class CachedTorchOps(TorchOps):
    """The ops on one batch. Sequences with as many new tokens attend together; all else takes all rows at once."""

    def __init__(
        self, batch: Batch, cache: TorchCache, tables: TorchTables, device: torch.device, *,
        adapters: Adapters | None = None, length: int | None = None,
    ) -> None:  # fmt: skip
        """length: attend as if the longest sequence had so many tokens (at least as many as it has), by the same
        operations whatever lengths and values are, as a CUDA graph must. Default: by what is least to do."""
        super().__init__(_index(batch.tokens, device), _index(batch.positions, device), tables, adapters or {})
        self._recordable = length is not None
        self._batch = batch
        self._adapted: dict[tuple[int, int], Tensor] = {}
        self._cache = cache
        self._rows = _index(batch.rows, device)
        self._hidden_rows = _index(batch.hidden_rows, device)
        counts = np.diff(batch.starts)
        owners = np.repeat(np.arange(len(counts)), counts)
        self._written = _index(batch.slots_at(owners, batch.positions), device)
        self._groups = [_Group(batch, np.flatnonzero(counts == count), device, length) for count in np.unique(counts)]

    def take(self, other: CachedTorchOps) -> None:
        """Continue with the batch of `other`, which has the same shape and length, in the tensors of this one."""
        for mine, its in zip(self._indices(), other._indices(), strict=True):
            mine.copy_(its)

    def _changed(self, y: Tensor, x: Tensor, bias: Tensor | None, number: int, pair: TorchLowRank) -> Tensor:
        key = number, len(x)
        if key not in self._adapted:
            self._adapted[key] = _index(self._batch.adapted(number, len(x)), y.device)
        rows = self._adapted[key]
        return y.index_copy(0, rows, pair.changed(y[rows], x[rows], bias).to(y.dtype)) if len(rows) else y

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, attention: Attention) -> Tensor:
        self._cache.keys[layer].write(self._written, k)
        self._cache.values[layer].write(self._written, v)
        return self._attend(self._tempered(q, attention.temperature), layer, attention)

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
        """The absorbed form: attention with one kv head, whose keys are what is cached, and values their beginning."""
        self._cache.keys[layer].write(self._written, torch.cat([latent, k_rope], dim=-1))
        n_heads, latent_dim = attention.n_heads, attention.latent_dim
        absorbed = torch.einsum("thn,hln->thl", q_nope.view(len(q_nope), n_heads, -1), k_up)
        queries = torch.cat([absorbed, q_rope.view(len(q_rope), n_heads, -1)], dim=-1)  # [T, H, latent + rope]
        asked = Attention(n_heads=n_heads, n_kv_heads=1, head_dim=queries.shape[-1], scale=attention.scale)
        attended = self._attend(queries.flatten(1), layer, asked).view(queries.shape)
        return torch.einsum("thl,hvl->thv", attended[..., :latent_dim], v_up).flatten(1)

    def _attend(self, q: Tensor, layer: int, attention: Attention) -> Tensor:
        """q: [T, H*Dh]. The same of what is in the cache of `layer`."""
        mixed = torch.empty_like(q)
        for group in self._groups:
            slots, mask, causal = group.view(attention)
            keys, values = self._cache.read(layer, slots, q.dtype)
            queries = q[group.rows].view(group.n, group.new, -1)
            mixed[group.rows] = attend(queries, keys, values, mask, causal, attention).flatten(0, 1)
        return mixed

    def select_rows(self, x: Tensor) -> Tensor:
        return x[self._rows]

    def select_hidden(self, x: Tensor) -> Tensor:
        return x[self._hidden_rows]

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
        self._same_length = length is None and bool((last == last[0]).all())
        self._first = int(positions.min()) if length is None else 0  # the first of any batch, for a given length
        self._longest = int(last.max()) + 1 if length is None else length
        # beyond a sequence's end its last slot again: no token sees what seems to lie after itself
        self.slots = _index(batch.slots_at(members[:, None], np.minimum(np.arange(self._longest), last)), device)
        self.positions = _index(positions, device)
        self._views: dict[Attention, tuple[Tensor, Tensor | None, bool]] = {}

    def view(self, attention: Attention) -> tuple[Tensor, Tensor | None, bool]:
        """Slots of the keys that its tokens see, [n, S], and the mask for `attend`, or none and whether attention is
        causal. Slots that no token sees are left out."""
        if attention not in self._views:
            first = int(first_visible(np.array(self._first), attention.window, attention.chunk))
            slots = self.slots[:, first:]
            if self.new == 1 and self._same_length:
                self._views[attention] = slots, None, False
            elif self.new == self._longest and not needs_mask(attention, self._longest):
                self._views[attention] = slots, None, True
            else:
                keys = torch.arange(first, self._longest, device=slots.device)
                self._views[attention] = slots, visible(self.positions, keys, attention), False
        return self._views[attention]


class SharedPrefixes(NamedTuple):
    """Of T tokens of several sequences, U to compute: a causal model says the same of equal tokens after equal ones."""

    first: Tensor
    """[U] int64: the tokens that are computed, by their numbers among the T."""
    places: Tensor
    """[T] int64: which of `first` stands for each token."""


class UncachedTorchOps(TorchOps):
    """The ops on whole sequences, one after the other, which do not see each other; gradients flow through all."""

    def __init__(
        self, tokens: Tensor, lengths: Sequence[int], tables: TorchTables, *,
        adapters: Adapters | None = None, hidden_rows: Tensor | None = None, shared: SharedPrefixes | None = None,
    ) -> None:  # fmt: skip
        """tokens: [T] int64. lengths: of the sequences, T in all. adapters: of all sequences, whatever their numbers.
        hidden_rows: [N] int64 in T; None: no row. shared: rows are those of `first`, so that all but attention is
        computed for U tokens. Logits are of all rows."""
        positions = torch.cat([torch.arange(length) for length in lengths]).to(tokens.device)
        if shared is not None:
            tokens, positions = tokens[shared.first], positions[shared.first]
            hidden_rows = None if hidden_rows is None else shared.places[hidden_rows]
        super().__init__(tokens, positions, tables, adapters or {})
        self._lengths = lengths
        self._hidden_rows = hidden_rows
        self._shared = shared
        self._masks: dict[tuple[Attention, int], Tensor | None] = {}

    def _changed(self, y: Tensor, x: Tensor, bias: Tensor | None, number: int, pair: TorchLowRank) -> Tensor:
        return pair.changed(y, x, bias).to(y.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, attention: Attention) -> Tensor:
        return self._attend(self._tempered(q, attention.temperature), k, v, attention)

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
        """The naive form: less to compute than the absorbed one where all tokens are new."""
        n_heads = attention.n_heads
        queries = torch.cat([x.view(len(x), n_heads, -1) for x in (q_nope, q_rope)], dim=-1)  # [T, H, nope + rope]
        expanded = torch.einsum("tl,hln->thn", latent, k_up)
        keys = torch.cat([expanded, k_rope[:, None].expand(-1, n_heads, -1)], dim=-1)  # [T, H, nope + rope]
        values = torch.einsum("tl,hvl->thv", latent, v_up)
        asked = Attention(n_heads=n_heads, n_kv_heads=n_heads, head_dim=keys.shape[-1], scale=attention.scale)
        return self._attend(queries.flatten(1), keys.flatten(1), values.flatten(1), asked)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """q: [U, H*Dh], k: [U, K*Dh], v: [U, K*Dv]. Returns [U, H*Dv]."""
        if self._shared is None:
            return self._attend_all(q, k, v, attention)
        # index_select, here and for hidden rows: threads add up the gradient of x[places] in another order each time.
        q, k, v = (x.index_select(0, self._shared.places) for x in (q, k, v))
        return self._attend_all(q, k, v, attention).index_select(0, self._shared.first)

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """The same of all T."""
        if len(set(self._lengths)) == 1:  # all at once
            return self._attend_alike(q, k, v, self._lengths[0], attention)
        queries, keys, values = (torch.split(x, list(self._lengths)) for x in (q, k, v))
        parts = zip(queries, keys, values, self._lengths, strict=True)
        return torch.cat([self._attend_alike(*part, attention) for part in parts])

    def _attend_alike(self, q: Tensor, k: Tensor, v: Tensor, length: int, attention: Attention) -> Tensor:
        """The same of sequences of one length."""
        key = attention, length
        if key not in self._masks:
            positions = torch.arange(length, device=q.device)
            self._masks[key] = visible(positions[None], positions, attention) if needs_mask(attention, length) else None
        mask = self._masks[key]
        batch = (-1, length, attention.n_kv_heads)
        keys, values = (x.view(*batch, x.shape[-1] // attention.n_kv_heads).transpose(1, 2) for x in (k, v))
        return attend(q.view(-1, length, q.shape[-1]), keys, values, mask, mask is None, attention).flatten(0, 1)

    def select_rows(self, x: Tensor) -> Tensor:
        return x

    def select_hidden(self, x: Tensor) -> Tensor:
        return x[:0] if self._hidden_rows is None else x.index_select(0, self._hidden_rows)


def needs_mask(attention: Attention, length: int) -> bool:
    """Whether `attend` needs one for `length` tokens from position 0 on: where a token does not see all before it, and
    where torch's kernels, which know causality, cannot compute the scores."""
    limits = (attention.window, attention.chunk)
    return attention.softcap is not None or any(limit is not None and limit < length for limit in limits)


def visible(queries: Tensor, keys: Tensor, attention: Attention) -> Tensor:
    """queries: [n, t], keys: [S]. [n, 1, H/K * t, S] bool: whether the token at each position sees the key at each."""
    at = queries[..., None]
    seen = keys <= at
    if attention.window is not None:
        seen &= keys > at - attention.window
    if attention.chunk is not None:
        seen &= keys >= at // attention.chunk * attention.chunk
    return seen[:, None].repeat(1, 1, attention.n_heads // attention.n_kv_heads, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, attention: Attention) -> Tensor:
    """q: [n, t, H*Dh], k: [n, K, S, Dh], v: [n, K, S, Dv]. Returns [n, t, H*Dv].

    mask: as `visible` gives it; None: all of S, or with `causal`, S being t, what is not later.
    """
    sharing = attention.n_heads // attention.n_kv_heads
    queries = q.view(*q.shape[:2], attention.n_kv_heads, sharing, -1).permute(0, 2, 3, 1, 4)  # [n, K, H/K, t, Dh]
    # Unless it is causal, heads that share keys become rows of one head, which every kernel of torch can do.
    rows = queries.flatten(1, 2) if causal else queries.flatten(2, 3)  # [n, H, t, Dh] or [n, K, H/K * t, Dh]
    if attention.softcap is None:
        mixed = F.scaled_dot_product_attention(
            rows, k, v, attn_mask=mask, is_causal=causal, scale=attention.scale, enable_gqa=causal and sharing > 1
        )
    else:
        scores = torch.tanh((rows @ k.mT).float() * (attention.scale / attention.softcap)) * attention.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v
    return mixed.reshape(*queries.shape[:-1], -1).permute(0, 3, 1, 2, 4).flatten(2)  # [n, t, K, H/K, Dv]


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return kernels.silu_gated(gate, up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """As `routing.route`, in float32; the weights differentiable, the choice not."""
    logits = logits.float()
    scores = logits.sigmoid() if routing.score == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if routing.n_groups > 1:
        groups = choice.view(len(choice), routing.n_groups, -1)  # [T, G, E/G]
        best = groups.topk(2 if routing.group_score == "top2" else 1, dim=-1).values.sum(dim=-1)  # [T, G]
        part = torch.zeros_like(best, dtype=torch.bool).scatter(1, _first_best(best, routing.n_groups_per_token), True)
        choice = groups.masked_fill(~part[..., None], -torch.inf).flatten(1)
    experts = _first_best(choice, routing.n_experts_per_token)
    weights = scores.gather(1, experts)
    if routing.normalized:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * routing.scale


def _first_best(x: Tensor, n: int) -> Tensor:
    """[T, n] indices of the largest of x [T, E], best first, of equals the first: `topk` takes any."""
    return x.detach().sort(dim=-1, descending=True, stable=True).indices[:, :n]


class _Experts:
    """What the chosen experts give: x [T, D], chosen and weights [T, k] -> [T, D] float32."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, routing: Routing, activation: Activation) -> None:
        self._matrices = gate, up, down  # [E, F, D], [E, F, D], [E, D, F]
        self._routing = routing
        self._activation = activation

    def one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert that occurs takes its rows; the host must know which do."""
        places = chosen.flatten()
        counts = places.bincount(minlength=self._routing.n_experts).tolist()
        given = torch.zeros(x.shape, device=x.device)
        experts = zip(*(matrix.unbind() for matrix in self._matrices), strict=True)
        for expert, mine in zip(experts, places.argsort(stable=True).split_with_sizes(counts), strict=True):
            if len(mine):
                rows = mine // chosen.shape[1]
                given.index_add_(0, rows, self._give(x[rows], weights.flatten()[mine, None], *expert))
        return given

    def on_device(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same operations whatever is chosen."""
        (n_rows, k), n_experts = chosen.shape, self._routing.n_experts
        if 3 * n_rows * k < n_experts:  # to gather an expert is to read it twice and to write it once
            gathered = (matrix[chosen.flatten()] for matrix in self._matrices)
            repeated = x[:, None].expand(-1, k, -1).reshape(n_rows * k, 1, -1)
            return self._give(repeated, weights.view(-1, 1, 1), *gathered).view(n_rows, k, -1).sum(dim=1)
        everyone = torch.zeros(n_rows, n_experts, device=x.device).scatter(1, chosen, weights)
        return self._give(x.expand(n_experts, -1, -1), everyone.T[..., None], *self._matrices).sum(dim=0)

    def _give(self, x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """x: [..., t, D], weights: [..., t, 1], one expert's matrices or one for each of the leading dimension."""
        if self._routing.weighs == "input":
            x = (x * weights).to(x.dtype)
        out = gated(x @ gate.mT, x @ up.mT, self._activation) @ down.mT
        return out.float() if self._routing.weighs == "input" else out * weights


def _factors(weight: Tensor, offset: float) -> Tensor:
    """What a norm multiplies by, float32."""
    return offset + weight.float() if offset else weight.float()


def _index(values: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
