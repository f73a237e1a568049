"""The native executor's half in Python: the `Program` of src/native/program.h, built of what the decoder recorded.

`build` packs the weights and hands each operation that `lowering` finds to the program, which replays them at every
step. Also the only door to the extension module `dapji.ops._native`, which may be missing: everything else asks
`available()`. Knows no models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dapji.errors import UnavailableError, UsageError
from dapji.ops.attention import KvShape, LatentAttention
from dapji.ops.low_rank import LowRank
from dapji.ops.lowering import Lowering
from dapji.ops.recording import Node, Recorder
from dapji.ops.reference import KvFormat
from dapji.ops.rope import RopeTable
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


# ---- building ----


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


class Place(NamedTuple):
    """Of a linear's weight in a program."""

    operation: int
    product: int


def build(
    recorder: Recorder,
    hidden: Node,
    logits: Node,
    *,
    context: int,
    kv: KvFormat,
    kv_shapes: Sequence[KvShape],
    n_blocks: int,
    threads: int,
    cache: PanelCache | None = None,
) -> tuple[Any, dict[Tensor, Place]]:
    """The `Program` (src/native/program.h) of what `recorder` recorded, its two outputs; and where each weight of a
    linear is in it.

    Packs every matrix, unless the cache has them; the tensors' memory is not needed afterwards. kv_shapes: of
    each layer.
    """
    native = module()
    operations: list[tuple[Any, ...]] = []
    lowering = Lowering(recorder.nodes, hidden, logits)
    lowering.run(lambda *operation: operations.append(operation))
    matrices = list(dict.fromkeys(matrix for node in recorder.nodes for matrix in _matrices(node)))
    panels = _panels(matrices, threads, cache)
    program = native.Program(
        isa=isa(),
        threads=threads,
        context=context,
        vocab=logits.width,
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

    places: dict[Tensor, Place] = {}
    for index, (name, *operands) in enumerate(operations):
        if name == "embed":
            weight, *rest = operands
            program.add_embed(panels[weight], *rest)
        elif name == "norm":
            source, norm, buffer, added = operands
            program.add_norm(source, _norm_weight(norm), norm.arguments["eps"], buffer, added)
        elif name == "hidden":
            source, norm = operands
            program.add_hidden(source, _norm_weight(norm), norm.arguments["eps"])
        elif name == "linear":
            source, norm, products = operands
            places |= {weights[0]: Place(index, i) for i, (weights, *_) in enumerate(products)}
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
            source, router, buffer, node = operands
            _add_experts(program, source, router, buffer, node, panels)
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
    return program, places


def add_adapter(program: Any, number: int, pairs: Sequence[tuple[Place, LowRank]]) -> None:
    """What sequences of later batches may choose by that number. The matrices are packed in the formats that they have;
    those with one input side by side, so that the input is read once."""
    at: dict[int, list[tuple[Place, LowRank]]] = {}
    for place, pair in sorted(pairs, key=lambda item: item[0]):
        at.setdefault(place.operation, []).append((place, pair))
    changes: list[tuple[int, Tensor, NDArray[np.float32], list[tuple[int, Tensor, int]]]] = []
    for operation, together in at.items():
        shared = {(id(pair.a), pair.scale): pair for _, pair in together}  # a fused matrix has one a for its parts
        starts = dict(zip(shared, accumulate((pair.rank for pair in shared.values()), initial=0), strict=False))
        matrices = [pair.a for pair in shared.values()]
        if len({matrix.format for matrix in matrices}) > 1:
            matrices = [Tensor.from_float32(matrix.name, matrix.float32()) for matrix in matrices]
        a = Tensor.joined("a", matrices, sum(matrix.rows for matrix in matrices), matrices[0].cols)
        scales = np.concatenate([np.full(pair.rank, pair.scale, dtype=np.float32) for pair in shared.values()])
        parts = [(place.product, pair.b, starts[id(pair.a), pair.scale]) for place, pair in together]
        changes.append((operation, a, scales, parts))
    panels = _panels([m for _, a, _, parts in changes for m in (a, *(b for _, b, _ in parts))], 1, None)
    program.add_adapter(
        number,
        [
            (operation, panels[a], scales, [(product, panels[b], start) for product, b, start in parts])
            for operation, a, scales, parts in changes
        ],
    )
    for place, pair in pairs:
        if pair.magnitude is not None:
            program.set_magnitude(number, *place, _floats(pair.magnitude))


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


def _panels(matrices: Sequence[Tensor], threads: int, cache: PanelCache | None) -> dict[Tensor, Any]:
    """Packed, side by side in one piece of memory or in the cache's file."""
    native = module()
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
