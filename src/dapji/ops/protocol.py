"""`Ops`: the operations that a decoder is stated in. An implementation computes them (reference, torch) or records
them (native).

The batch (tokens, positions, cache blocks, rows) belongs to the implementation, so that the decoder's text is the same
for one token and for a thousand. Knows nothing of models.

Shapes: T new tokens, R rows whose logits are wanted, D dim, H query heads, K kv heads, Dh head dim, F hidden, V
vocabulary.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

from dapji.ops.rope import RopeTable, RopeTables

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

    def embed(self, weight: W) -> V:
        """[T, D]: the rows of `weight` [V, D] for the batch's tokens."""
        ...

    def norm(self, x: V, weight: W, eps: float) -> V:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, RMSNorm)."""
        ...

    def linear(self, x: V, weight: W, bias: W | None = None) -> V:
        """x @ weight.T + bias; weight [out, in], bias [out]."""
        ...

    def rope(self, x: V, table: RopeTable, head_dim: int) -> V:
        """x [T, n*Dh]: the first table.dim values of each head rotated by the batch's positions, in pairs
        (i, i + table.dim/2)."""
        ...

    def attention(
        self,
        q: V,
        k: V,
        v: V,
        *,
        layer: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        window: int | None,
        scale: float,
    ) -> V:
        """Writes k and v [T, K*Dh] to the cache of `layer`, then attends causally: softmax(scale q k) v, [T, H*Dh].

        Query head h reads kv head h // (H/K). A token sees itself and the window - 1 tokens before it; None: all.
        """
        ...

    def gated(self, gate: V, up: V, activation: Activation) -> V:
        """activation(gate) * up."""
        ...

    def add(self, a: V, b: V) -> V:
        """a + b."""
        ...

    def select_rows(self, x: V) -> V:
        """[R, D]: the batch's `rows` of x [T, D]."""
        ...
