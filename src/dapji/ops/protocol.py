"""`Ops`: the operations that a decoder is stated in. An implementation computes them (reference, torch) or records
them (native).

The batch (tokens, positions, cache blocks, rows) belongs to the implementation, so that the decoder's text is the same
for one token and for a thousand. Knows nothing of models.

Shapes: T new tokens, R rows whose logits are wanted, N rows whose hidden states are, D dim, H query heads, K kv heads,
Dh head dim, F hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

from dapji.ops.attention import Attention, LatentAttention
from dapji.ops.rope import RopeTable, RopeTables
from dapji.ops.routing import Routing

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""silu: x sigmoid(x); gelu: x Phi(x), by the error function; gelu_tanh: its approximation by tanh."""

V = TypeVar("V")
W = TypeVar("W", contravariant=True)


class Ops(Protocol[V, W]):
    """V: an activation, [rows, columns]. W: a weight handle, whatever the implementation made of a `Tensor`."""

    @property
    def tables(self) -> RopeTables:
        """Rope tables of the context that the implementation was made for."""
        ...

    def embed(self, weight: W, scale: float) -> V:
        """[T, D]: the rows of `weight` [V, D] for the batch's tokens, times `scale`."""
        ...

    def norm(self, x: V, weight: W, eps: float, offset: float) -> V:
        """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis (Zhang & Sennrich 2019, RMSNorm)."""
        ...

    def norm_heads(self, x: V, weight: W | None, eps: float, offset: float, head_dim: int) -> V:
        """The same of each head of x [T, n*Dh], by one weight [Dh] for all; None: by ones, without offset."""
        ...

    def linear(self, x: V, weight: W, bias: W | None = None) -> V:
        """x @ weight.T + bias; weight [out, in], bias [out]."""
        ...

    def rope(self, x: V, table: RopeTable, head_dim: int) -> V:
        """x [T, n*Dh]: the first table.dim values of each head rotated by the batch's positions, in pairs
        (i, i + table.dim/2)."""
        ...

    def attention(self, q: V, k: V, v: V, *, layer: int, attention: Attention) -> V:
        """Writes k and v [T, K*Dh] to the cache of `layer`, then attends, [T, H*Dh]."""
        ...

    def latent_attention(
        self, q_nope: V, q_rope: V, latent: V, k_rope: V, k_up: W, v_up: W, *, layer: int, attention: LatentAttention
    ) -> V:
        """Writes latent [T, latent_dim] and k_rope [T, rope_dim] to the cache of `layer`, then attends, giving
        [T, H*value_dim].

        q_nope [T, H*nope_dim], q_rope [T, H*rope_dim], k_up [H, latent_dim, nope_dim], v_up [H, value_dim, latent_dim].
        """
        ...

    def gated(self, gate: V, up: V, activation: Activation) -> V:
        """activation(gate) * up."""
        ...

    def experts(
        self,
        x: V,
        logits: V,
        selection_bias: W | None,
        gate: W,
        up: W,
        down: W,
        *,
        routing: Routing,
        activation: Activation,
    ) -> V:
        """Each row of x [T, D] through the experts that `route` chooses by its logits [T, E], [T, D]: the sum of
        weight * down(activation(gate(x)) * up(x)), or, where routing weighs the input, of the same of weight * x.

        selection_bias [E], gate and up [E, F, D], down [E, D, F].
        """
        ...

    def add(self, a: V, b: V) -> V:
        """a + b."""
        ...

    def select_rows(self, x: V) -> V:
        """[R, D]: the batch's `rows` of x [T, D]."""
        ...

    def select_hidden(self, x: V) -> V:
        """[N, D]: the batch's `hidden_rows` of x [T, D]. Comes before `select_rows`."""
        ...

    def softcap(self, x: V, cap: float) -> V:
        """cap tanh(x / cap)."""
        ...
