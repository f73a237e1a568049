"""The native executor's half in Python: ops that record, and the lowering of what they recorded to a `Program`.

The decoder runs once, at load, over `Recorder`: nothing is computed, each op leaves a node. `build` then fuses the
nodes into the few operations that src/native/program.h replays at every step. Also the only door to the extension
module `dapji.ops._native`, which may be missing: everything else asks `available()`. Knows no models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dapji.errors import UnavailableError, UsageError
from dapji.ops.attention import Attention, KvShape, LatentAttention
from dapji.ops.protocol import Activation
from dapji.ops.reference import KvFormat
from dapji.ops.rope import RopeTable, RopeTables
from dapji.ops.routing import Routing
from dapji.ops.tensor import Tensor

_ALIGNMENT = 64
"""Of a matrix within the memory of all."""

# ---- the extension module ----


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("dapji.ops._native"), None
    except ImportError as error:
        return None, f"the native core is not part of this installation ({error})"


def available() -> bool:
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """None where it is available."""
    return _load()[1]


def module() -> Any:
    """The extension module. Raises UnavailableError where it was not built."""
    loaded, reason = _load()
    if loaded is None:
        raise UnavailableError(
            reason or "",
            hint="install a C++17 compiler and then Dapji again, or use --executor reference (slow)",
        )
    return loaded


def isa() -> str:
    """The instruction set whose kernels run: the best that this processor has, or what DAPJI_ISA names.

    Raises UnavailableError, and UsageError where DAPJI_ISA names one that is unknown or missing here.
    """
    try:
        name: str = module().choose_isa()
    except ValueError as error:
        raise UsageError(f"DAPJI_ISA: {error}") from None
    return name


def isas() -> list[str]:
    """Every instruction set that this build has kernels for and this processor can run, best last."""
    names: list[str] = module().available_isas()
    return names


def default_threads() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def panels_version() -> int:
    """Of the layout in memory: what was packed by another version must be packed again."""
    version: int = module().PANELS_VERSION
    return version


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads together read from memory, measured now (half a second)."""
    isa()
    measured: float = module().read_bandwidth(threads)
    return measured


def int8_peak(threads: int) -> float:
    """Operations per second (a multiplication and an addition are two) of the integer dot product, measured now."""
    isa()
    measured: float = module().int8_peak(threads)
    return measured


# ---- recording ----


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

    def softcap(self, x: Node, cap: float) -> Node:
        return self._add("softcap", x, width=x.width, cap=cap)


# ---- lowering ----


@dataclass(frozen=True, kw_only=True)
class _Product:
    node: Node
    """The linear."""
    result: Node
    """Whose value it leaves in its buffer: its own, or that of the add or gate that it is fused with."""
    kind: str
    activation: str


class _Lowering:
    """Fuses nodes and gives them buffers.

    norm: into every linear that reads it; computed once, where others read it too. add(x, y) of a linear, a norm or
    experts: y is added to x where that lies. gated(linear, linear): the second product multiplies the activation of the
    first where that lies. norm_heads and rope: into attention, which norms and rotates as it reads. Linears that read
    one value next to each other become one operation.
    """

    def __init__(self, nodes: Sequence[Node], output: Node) -> None:
        self._nodes = nodes
        self._capped = output.op == "softcap"
        self._logits = output.inputs[0] if self._capped else output
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
        if node.op == "norm":
            return all(user.op in ("linear", "latent_attention") for user in self._users[node])
        if node.op == "add":
            return node.inputs[1].op in ("linear", "norm", "experts") and self._is_added(node.inputs[1])
        if node.op == "gated":
            return all(x.op == "linear" for x in node.inputs)
        return node.op in ("norm_heads", "rope")

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
        sources = (q, k, v)
        output = self._take(node)
        emit(
            "attention", *(self._buffer_of[source] for source in sources), output, table, q_norm, k_norm,
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


class PanelCache(Protocol):
    """Keeps packed matrices from one process to the next."""

    def read(self, matrices: Sequence[Tensor], n_bytes: int) -> NDArray[np.uint8] | None:
        """What was kept of just these matrices, 64-byte aligned; None where that is not there as n_bytes."""
        ...

    def keep(self, matrices: Sequence[Tensor], packed: NDArray[np.uint8]) -> None:
        """Store these bytes, which stay as they are. May return before it has."""
        ...

    def close(self) -> None:
        """Waits until it has."""
        ...


def build(
    recorder: Recorder,
    output: Node,
    *,
    context: int,
    kv: KvFormat,
    kv_shapes: Sequence[KvShape],
    n_blocks: int,
    threads: int,
    cache: PanelCache | None = None,
) -> Any:
    """The `Program` (src/native/program.h) of what `recorder` recorded, ending in `output`, the logits.

    Packs every matrix, unless the cache has them; the tensors' memory is not needed afterwards. kv_shapes: of
    each layer.
    """
    native = module()
    operations: list[tuple[Any, ...]] = []
    lowering = _Lowering(recorder.nodes, output)
    lowering.run(lambda *operation: operations.append(operation))
    panels = _panels(recorder.nodes, threads, cache)
    program = native.Program(
        isa=isa(),
        threads=threads,
        context=context,
        vocab=output.width,
        kv=kv,
        layers=[(shape.n_kv_heads, shape.key_dim, shape.value_dim) for shape in kv_shapes],
        n_blocks=n_blocks,
        widths=lowering.widths,
    )
    ropes: dict[int, int] = {}

    def rope(table: RopeTable | None) -> int:
        if table is None:
            return -1
        if id(table) not in ropes:
            ropes[id(table)] = program.add_rope(_floats(table.cos), _floats(table.sin))
        return ropes[id(table)]

    for name, *operands in operations:
        if name == "embed":
            weight, *rest = operands
            program.add_embed(panels[weight], *rest)
        elif name == "norm":
            source, norm, buffer, added = operands
            program.add_norm(source, _norm_weight(norm), norm.arguments["eps"], buffer, added)
        elif name == "linear":
            source, norm, products = operands
            program.add_linear(
                source,
                None if norm is None else _norm_weight(norm),
                0.0 if norm is None else norm.arguments["eps"],
                [
                    (panels[weights[0]], _vector(weights[1]) if len(weights) > 1 else None, *rest)
                    for weights, *rest in products
                ],
            )
        elif name == "attention":
            *buffers, table, q_norm, k_norm, layer, attention = operands
            temperature = attention.temperature
            program.add_attention(
                *buffers,
                layer=layer,
                n_heads=attention.n_heads,
                rope=rope(table),
                scale=attention.scale,
                window=attention.window or 0,
                chunk=attention.chunk or 0,
                softcap=attention.softcap or 0.0,
                temperature=None if temperature is None else _floats(temperature.factors(context)),
                q_norm=_head_norm(q_norm),
                k_norm=_head_norm(k_norm),
            )
        elif name == "experts":
            source, logits, buffer, node = operands
            _add_experts(program, source, logits, buffer, node, panels)
        elif name == "softcap":
            program.add_softcap(*operands)
        elif name == "head_linear":
            source, weights, buffer = operands
            program.add_head_linear(source, [panels[weight] for weight in weights], buffer)
        elif name == "latent_attention":
            *buffers, table, norm, arguments = operands
            latent: LatentAttention = arguments["attention"]
            program.add_latent_attention(
                *buffers,
                layer=arguments["layer"],
                n_heads=latent.n_heads,
                rope=rope(table),
                scale=latent.scale,
                norm=(_norm_weight(norm), norm.arguments["eps"]),
            )
        else:
            program.add_select(*operands)
    return program


def _add_experts(program: Any, source: int, logits: int, buffer: int, node: Node, panels: Mapping[Tensor, Any]) -> None:
    routing, bias = node.arguments["routing"], node.arguments["selection_bias"]
    matrices, n = [panels[tensor] for tensor in node.weights], routing.n_experts
    program.add_experts(
        source,
        logits,
        buffer,
        gate=matrices[:n],
        up=matrices[n : 2 * n],
        down=matrices[2 * n :],
        activation=node.arguments["activation"],
        n_per_token=routing.n_experts_per_token,
        sigmoid=routing.score == "sigmoid",
        n_groups=routing.n_groups,
        n_groups_per_token=routing.n_groups_per_token,
        top2=routing.group_score == "top2",
        normalized=routing.normalized,
        scale=routing.scale,
        weighs_input=routing.weighs == "input",
        selection_bias=None if bias is None else _vector(bias),
    )


def _norm_weight(node: Node) -> NDArray[np.float32]:
    """What it multiplies by."""
    return _vector(node.weights[0]) + np.float32(node.arguments["offset"])


def _panels(nodes: Sequence[Node], threads: int, cache: PanelCache | None) -> dict[Tensor, Any]:
    """Every matrix once, side by side in one piece of memory or in the cache's file."""
    native = module()
    matrices = list(dict.fromkeys(matrix for node in nodes for matrix in _matrices(node)))
    shapes = [(tensor.format.name, tensor.rows, tensor.cols) for tensor in matrices]
    sizes = [native.panels_bytes(*shape) for shape in shapes]
    starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    memory = None if cache is None else cache.read(matrices, starts[-1])
    kept = memory is not None
    if memory is None:
        memory = native.allocate_panels(starts[-1])
    places = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    if not kept:
        _pack(matrices, places, threads)
        if cache is not None:
            cache.keep(matrices, memory)
    return {tensor: native.Panels(*shape, place) for tensor, shape, place in zip(matrices, shapes, places, strict=True)}


def _matrices(node: Node) -> tuple[Tensor, ...]:
    """Those of its weights that are packed."""
    if node.op in ("experts", "head_linear"):
        return node.weights
    return node.weights[:1] if node.op in ("embed", "linear") else ()


def _pack(matrices: Sequence[Tensor], places: Sequence[NDArray[np.uint8]], threads: int) -> None:
    """The compiled code releases the GIL."""
    from concurrent.futures import ThreadPoolExecutor  # takes 4 ms, which a start from the cache can do without

    def pack(tensor: Tensor, place: NDArray[np.uint8]) -> None:
        stored, order = tensor.stored, tensor.order
        if order is not None and len(stored) != tensor.rows:  # a part of what is stored
            stored, order = stored[order], None
        module().pack(tensor.format.name, tensor.rows, tensor.cols, stored, order, place)
        if tensor.release is not None:
            tensor.release()  # at once, so that a model never lies in memory twice

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pack, matrices, places))


def _head_norm(node: Node | None) -> tuple[NDArray[np.float32], float] | None:
    """(weight [Dh], eps)"""
    if node is None:
        return None
    arguments = node.arguments
    if not node.weights:
        return np.ones(arguments["head_dim"], dtype=np.float32), arguments["eps"]
    return np.float32(arguments["offset"]) + _vector(node.weights[0]), arguments["eps"]


def _vector(tensor: Tensor) -> NDArray[np.float32]:
    return _floats(tensor.float32().ravel())


def _floats(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, dtype=np.float32)
