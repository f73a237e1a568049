"""From recorded nodes to the operations of a native program: which are fused, and in which buffers their values lie.

Knows neither the extension module nor how weights are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dapji.ops.recording import Node
from dapji.ops.rope import RopeTable


@dataclass(frozen=True, kw_only=True)
class _Product:
    node: Node
    """The linear."""
    result: Node
    """Whose value it leaves in its buffer: its own, or that of the add or gate that it is fused with."""
    kind: str
    activation: str


class Lowering:
    """Fuses nodes and gives them buffers.

    norm: into every linear that reads it; computed once, where others read it too. add(x, y) of a linear, a norm or
    experts: y is added to x where that lies. gated(linear, linear): the second product multiplies the activation of the
    first where that lies. norm_heads and rope: into attention, which norms and rotates as it reads. Linears that read
    one value next to each other become one operation. select_hidden: into the norm that reads it.
    """

    def __init__(self, nodes: Sequence[Node], hidden: Node, logits: Node) -> None:
        """hidden: a norm of selected rows. logits: a linear, or its softcap."""
        self._nodes = nodes
        self._hidden = hidden
        self._capped = logits.op == "softcap"
        self._logits = logits.inputs[0] if self._capped else logits
        self._users: dict[Node, list[Node]] = {}
        for node in nodes:
            for x in node.inputs:
                self._users.setdefault(x, []).append(node)
        self._unread = {node: len(users) for node, users in self._users.items()}
        self._buffer_of: dict[Node, int] = {}
        self._free: dict[int, list[int]] = {}
        self.widths: list[int] = []

    def run(self, emit: Callable[..., None]) -> None:
        """Calls emit(operation, …) for each operation in order."""
        pending: list[_Product] = []
        for node in self._nodes:
            if self._is_fused(node):
                continue
            if pending and not (node.op == "linear" and node.inputs == pending[0].node.inputs):
                self._flush(pending, emit)
            if node.op == "linear":
                pending.append(self._product(node))
            elif node.op == "embed":
                emit("embed", node.weights[0], node.arguments["scale"], self._take(node))
            elif node is self._hidden:
                (x,) = node.inputs[0].inputs
                emit("hidden", self._buffer_of[x], node)
                self._read(x)
            elif node.op == "norm":
                self._norm(node, emit)
            elif node.op == "select_rows":
                self._alias(node, node.inputs[0])
                emit("select", [self._buffer_of[node]])
            elif node.op == "attention":
                self._attention(node, emit)
            elif node.op == "experts":
                self._experts(node, emit)
            elif node.op == "softcap":
                assert self._capped
                emit("softcap", node.arguments["cap"])
            elif node.op == "head_linear":
                (x,) = node.inputs
                emit("head_linear", self._buffer_of[x], node.weights, self._take(node))
                self._read(x)
            elif node.op == "latent_attention":
                self._latent_attention(node, emit)
            else:
                raise AssertionError(f"{node.op} cannot be fused")
        self._flush(pending, emit)

    def _is_fused(self, node: Node) -> bool:
        """Whether it is computed by what comes before it or by what reads it."""
        if node is self._hidden:
            return False
        if node.op == "norm":
            return all(user.op in ("linear", "latent_attention") for user in self._users[node])
        if node.op == "add":
            return node.inputs[1].op in ("linear", "norm", "experts") and self._is_added(node.inputs[1])
        if node.op == "gated":
            return all(x.op == "linear" for x in node.inputs)
        return node.op in ("norm_heads", "rope", "select_hidden")

    def _is_added(self, node: Node) -> bool:
        """Whether its only use is to be added to something."""
        users = self._users[node]
        return len(users) == 1 and users[0].op == "add" and users[0].inputs[1] is node

    def _product(self, node: Node) -> _Product:
        kind, result, activation = "store", node, "silu"
        if node is not self._logits and self._is_added(node):
            (result,) = self._users[node]
            kind = "add"
        elif node is not self._logits and self._users[node][0].op == "gated":
            (result,) = self._users[node]
            kind, activation = "store" if result.inputs[0] is node else "gate", result.arguments["activation"]
        return _Product(node=node, result=result, kind=kind, activation=activation)

    def _flush(self, pending: list[_Product], emit: Callable[..., None]) -> None:
        if not pending:
            return
        (x,) = pending[0].node.inputs
        fused = x.op == "norm" and x not in self._buffer_of
        source = x.inputs[0] if fused else x
        products = []
        for product in pending:
            if product.node is self._logits:
                target = -1
            elif product.kind == "add":
                target = self._alias(product.result, product.result.inputs[0])
            elif product.kind == "gate":
                target = self._buffer_of[product.result]
            else:
                target = self._take(product.result)
            products.append((product.node.weights, target, product.kind, product.activation))
        emit("linear", self._buffer_of[source], x if fused else None, products)
        for _ in pending:
            self._read(x)
        pending.clear()

    def _norm(self, node: Node, emit: Callable[..., None]) -> None:
        (x,) = node.inputs
        added = self._is_added(node)
        if added:
            (result,) = self._users[node]
            target = self._alias(result, result.inputs[0])
        else:
            target = self._take(node)
        emit("norm", self._buffer_of[x], node, target, added)
        self._read(x)

    def _attention(self, node: Node, emit: Callable[..., None]) -> None:
        q, k, v = node.inputs
        (q, q_norm, table), (k, k_norm, key_table) = _transformed(q), _transformed(k)
        assert table is key_table
        output = self._take(node)
        emit(
            "attention", *(self._buffer_of[source] for source in (q, k, v)), output, table, q_norm, k_norm,
            node.arguments["layer"], node.arguments["attention"],
        )  # fmt: skip
        for x in node.inputs:
            self._read(x)

    def _experts(self, node: Node, emit: Callable[..., None]) -> None:
        assert self._is_added(node)
        (result,) = self._users[node]
        target = self._alias(result, result.inputs[0])
        emit("experts", *(self._buffer_of[x] for x in node.inputs), target, node)
        for x in node.inputs:
            self._read(x)

    def _latent_attention(self, node: Node, emit: Callable[..., None]) -> None:
        """In the buffer of its queries."""
        queries, q_rope, latent, k_rope = node.inputs
        table = q_rope.arguments["table"]
        assert k_rope.arguments["table"] is table
        sources = [queries, q_rope.inputs[0], latent.inputs[0], k_rope.inputs[0]]
        emit("latent_attention", *(self._buffer_of[source] for source in sources), table, latent, node.arguments)
        self._alias(node, queries)
        for x in node.inputs[1:]:
            self._read(x)

    def _take(self, node: Node) -> int:
        """A buffer for its value."""
        free = self._free.setdefault(node.width, [])
        if not free:
            free.append(len(self.widths))
            self.widths.append(node.width)
        buffer = self._buffer_of[node] = free.pop()
        return buffer

    def _alias(self, node: Node, of: Node) -> int:
        """`node`, which reads `of`, lies where that lay."""
        self._unread[of] -= 1
        assert self._unread[of] == 0, f"{of.op} is read after {node.op} has replaced it"
        buffer = self._buffer_of[node] = self._buffer_of[of]
        return buffer

    def _read(self, node: Node) -> None:
        """One of its users has read it. After the last, its buffer is free; what was fused has read its own inputs."""
        self._unread[node] -= 1
        if self._unread[node] > 0:
            return
        if node in self._buffer_of:
            self._free[node.width].append(self._buffer_of[node])
        else:
            for x in node.inputs:
                self._read(x)


def _transformed(x: Node) -> tuple[Node, Node | None, RopeTable | None]:
    """What a head of q or k was before it was normed and rotated, the norm and the table."""
    table = norm = None
    if x.op == "rope":
        table, (x,) = x.arguments["table"], x.inputs
    if x.op == "norm_heads":
        norm, (x,) = x, x.inputs
    return x, norm, table
