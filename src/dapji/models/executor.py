"""Executors: run the decoder on batches, one step after another, with keys and values cached in between.

All three state the same model by the same `decode`; what differs is the ops and where the cache lies. Knows neither
files nor requests: the engine allocates blocks and composes batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError, ContextError, RequestError, UnavailableError, UsageError
from dapji.models.adapter import Adapter
from dapji.models.config import ModelConfig
from dapji.models.decoder import decode
from dapji.models.size import kv_shapes
from dapji.ops import native
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.reference import (
    Activations,
    KvFormat,
    ReferenceCache,
    ReferenceLowRank,
    ReferenceOps,
    ReferenceWeight,
)
from dapji.ops.rope import RopeTables
from dapji.ops.tensor import Tensor

ExecutorKind = Literal["reference", "torch", "native"]

W = TypeVar("W")
P = TypeVar("P")


class Executor(Protocol):
    config: ModelConfig
    context: int
    """Longest sequence in tokens, fixed when opened: the rope tables reach this far."""
    n_blocks: int
    """KV blocks of KV_BLOCK tokens."""

    def step(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Logits [R, V] of the batch's rows, valid until the next step; the batch's keys and values are cached.

        hidden: [N, D], filled with the final norm's output of the batch's `hidden_rows`; None where there are none.
        Raises ContextError where a position is beyond the context, RequestError where a token is beyond the vocabulary.
        """
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in all layers."""
        ...

    def add_adapter(self, adapter: Adapter) -> int:
        """Its number in batches from now on, never used again. Any thread, between steps or during one.

        Raises ConfigError where it does not fit the model.
        """
        ...

    def remove_adapter(self, number: int) -> None:
        """Frees it; no later batch may have it. As `add_adapter`."""
        ...

    def close(self) -> None:
        """Free what it holds. May be repeated; nothing else afterwards."""
        ...


def open_executor(
    kind: ExecutorKind,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    context: int,
    n_blocks: int | None = None,
    threads: int | None = None,
    kv: KvFormat = "f16",
    device: str = "cpu",
    activations: Activations = "f32",
    dtype: Literal["float32", "bfloat16"] = "float32",
    cache: native.PanelCache | None = None,
) -> Executor:
    """An executor of a model, for sequences of up to `context` tokens.

    tensors: by canonical name. n_blocks: default, one sequence of `context`. threads: native only; default, the
    processors that this process may use. device and dtype: torch only. activations: reference only. cache: keeps packed
    weights from one process to the next; others than native have none.

    Raises ConfigError where the context is longer than the model's, UnavailableError where this installation lacks
    the executor.
    """
    if not 1 <= context <= config.max_context:
        raise ConfigError(f"a context of {context} tokens was asked for, but the model has {config.max_context}")
    for name, given, owner in (
        ("threads", threads is not None, "native"),
        ("device", device != "cpu", "torch"),
        ("dtype", dtype != "float32", "torch"),
        ("activations", activations != "f32", "reference"),
    ):
        if given and kind != owner:
            raise UsageError(f"{name} is an option of the {owner} executor, not of {kind}")
    blocks = -(-context // KV_BLOCK) if n_blocks is None else n_blocks
    if kind == "torch":
        try:
            from dapji.models.torch_executor import TorchExecutor
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UnavailableError("torch is not installed", hint="pip install 'dapji[train]'") from error
        return TorchExecutor(config, tensors, context=context, n_blocks=blocks, kv=kv, device=device, dtype=dtype)
    if kind == "native":
        from dapji.models.native_executor import NativeExecutor

        return NativeExecutor(config, tensors, context=context, n_blocks=blocks, threads=threads, kv=kv, cache=cache)
    if kind == "reference":
        return ReferenceExecutor(config, tensors, context=context, n_blocks=blocks, kv=kv, activations=activations)
    raise UsageError(f"unknown executor {kind!r}", hint="one of: reference, torch, native")


def default_kind() -> ExecutorKind:
    """Native where this installation has it, else the reference."""
    return "native" if native.available() else "reference"


def check_batch(batch: Batch, config: ModelConfig, context: int, n_blocks: int) -> None:
    """Raises where a step would read or write beyond the vocabulary, the context or the cache."""
    if batch.positions.max(initial=0) >= context:
        raise ContextError(f"position {batch.positions.max()} is beyond the context of {context} tokens")
    if batch.tokens.min(initial=0) < 0 or batch.tokens.max(initial=0) >= config.vocab_size:
        beyond = batch.tokens[(batch.tokens < 0) | (batch.tokens >= config.vocab_size)]
        raise RequestError(f"token id {beyond[0]} is beyond the vocabulary of {config.vocab_size}")
    assert batch.blocks.max(initial=-1) < n_blocks


class AdapterTable(Generic[W, P]):
    """Pairs by the weight that they change, then by number. Replaced as a whole at each change, so that a step goes on
    with what it began with."""

    def __init__(self) -> None:
        self.pairs: Mapping[W, Mapping[int, P]] = {}
        self._numbers = count(1)

    def add(self, pairs: Mapping[W, P]) -> int:
        number = next(self._numbers)
        self.pairs = {**self.pairs, **{w: {**self.pairs.get(w, {}), number: pair} for w, pair in pairs.items()}}
        return number

    def remove(self, number: int) -> None:
        kept = {w: {n: pair for n, pair in own.items() if n != number} for w, own in self.pairs.items()}
        self.pairs = {w: own for w, own in kept.items() if own}


class ReferenceExecutor:
    """The decoder in numpy."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        context: int,
        n_blocks: int,
        kv: KvFormat = "f32",
        activations: Activations = "f32",
    ) -> None:
        self.config = config
        self.context = context
        self.n_blocks = n_blocks
        self._activations: Activations = activations
        self._weights = {
            name: ReferenceWeight.load(tensor) for name, tensor in tensors.items() if not name.startswith("predictors.")
        }
        self._cache = ReferenceCache(kv_shapes(config), n_blocks, kv)
        self._tables = RopeTables(context)
        self._adapters: AdapterTable[ReferenceWeight, ReferenceLowRank] = AdapterTable()

    def step(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        check_batch(batch, self.config, self.context, self.n_blocks)
        ops = ReferenceOps(
            batch=batch,
            cache=self._cache,
            tables=self._tables,
            activations=self._activations,
            adapters=self._adapters.pairs,
        )
        decoded = decode(self.config, self._weights, ops)
        if hidden is not None:
            hidden[:] = decoded.hidden
        return decoded.logits

    def copy_block(self, source: int, target: int) -> None:
        self._cache.copy_block(source, target)

    def add_adapter(self, adapter: Adapter) -> int:
        adapter.check(self.config)
        return self._adapters.add(
            {
                self._weights[name]: ReferenceLowRank.load(pair, self._weights[name])
                for name, pair in adapter.pairs.items()
            }
        )

    def remove_adapter(self, number: int) -> None:
        self._adapters.remove(number)

    def close(self) -> None:
        self._weights.clear()
        self._cache.keys.clear()
        self._cache.values.clear()
