"""Ops that record: the decoder runs once over `Recorder`, nothing is computed, and each op leaves a node.

What becomes of the nodes, `lowering` says. Knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dapji.ops.attention import Attention, LatentAttention
from dapji.ops.protocol import Activation
from dapji.ops.rope import RopeTable, RopeTables
from dapji.ops.routing import Routing
from dapji.ops.tensor import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One op of the decoder; `inputs` are those whose results it takes."""

    op: str
    inputs: tuple[Node, ...] = ()
    weights: tuple[Tensor, ...] = ()
    width: int
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Recorder:
    """`Ops` whose values are nodes and whose weights are tensors as they lie in the file."""

    def __init__(self, context: int) -> None:
        self.tables = RopeTables(context)
        self.nodes: list[Node] = []

    def _add(self, op: str, *inputs: Node, weights: Sequence[Tensor] = (), width: int, **arguments: Any) -> Node:
        node = Node(op=op, inputs=inputs, weights=tuple(weights), width=width, arguments=arguments)
        self.nodes.append(node)
        return node

    def embed(self, weight: Tensor, scale: float) -> Node:
        return self._add("embed", weights=[weight], width=weight.cols, scale=scale)

    def norm(self, x: Node, weight: Tensor, eps: float, offset: float) -> Node:
        return self._add("norm", x, weights=[weight], width=x.width, eps=eps, offset=offset)

    def norm_heads(self, x: Node, weight: Tensor | None, eps: float, offset: float, head_dim: int) -> Node:
        weights = [] if weight is None else [weight]
        return self._add("norm_heads", x, weights=weights, width=x.width, eps=eps, offset=offset, head_dim=head_dim)

    def linear(self, x: Node, weight: Tensor, bias: Tensor | None = None) -> Node:
        return self._add("linear", x, weights=[weight] if bias is None else [weight, bias], width=weight.rows)

    def rope(self, x: Node, table: RopeTable, head_dim: int) -> Node:
        return self._add("rope", x, width=x.width, table=table)

    def attention(self, q: Node, k: Node, v: Node, *, layer: int, attention: Attention) -> Node:
        return self._add("attention", q, k, v, width=q.width, layer=layer, attention=attention)

    def latent_attention(
        self,
        q_nope: Node,
        q_rope: Node,
        latent: Node,
        k_rope: Node,
        k_up: Tensor,
        v_up: Tensor,
        *,
        layer: int,
        attention: LatentAttention,
    ) -> Node:
        """Absorbed: queries are brought to the latents' dimensions, and what they attend to to the values'."""
        width = attention.n_heads * attention.latent_dim
        queries = self._add("head_linear", q_nope, weights=k_up.split(), width=width)
        mixed = self._add(
            "latent_attention", queries, q_rope, latent, k_rope, width=width, layer=layer, attention=attention
        )
        return self._add("head_linear", mixed, weights=v_up.split(), width=attention.n_heads * attention.value_dim)

    def gated(self, gate: Node, up: Node, activation: Activation) -> Node:
        return self._add("gated", gate, up, width=gate.width, activation=activation)

    def experts(
        self,
        x: Node,
        logits: Node,
        selection_bias: Tensor | None,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        routing: Routing,
        activation: Activation,
    ) -> Node:
        matrices = [*gate.split(), *up.split(), *down.split()]
        return self._add(
            "experts", x, logits, weights=matrices, width=x.width,
            selection_bias=selection_bias, routing=routing, activation=activation,
        )  # fmt: skip

    def add(self, a: Node, b: Node) -> Node:
        return self._add("add", a, b, width=a.width)

    def select_rows(self, x: Node) -> Node:
        return self._add("select_rows", x, width=x.width)

    def select_hidden(self, x: Node) -> Node:
        return self._add("select_hidden", x, width=x.width)

    def softcap(self, x: Node, cap: float) -> Node:
        return self._add("softcap", x, width=x.width, cap=cap)
