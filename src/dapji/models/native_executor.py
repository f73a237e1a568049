"""The native executor: the decoder recorded once, replayed in C++ at every step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError, ContextError, UsageError
from dapji.models.adapter import Adapter
from dapji.models.config import ModelConfig
from dapji.models.decoder import decode
from dapji.models.executor import check_batch
from dapji.models.size import kv_shapes
from dapji.ops import native
from dapji.ops.batch import Batch
from dapji.ops.recording import Recorder
from dapji.ops.reference import KvFormat
from dapji.ops.tensor import Tensor

_ONE_PROCESS = "open the model in the process that runs it"


class NativeExecutor:
    """Weights packed for the processor, computed on `threads` threads outside the GIL.

    Raises UnavailableError where the native core was not built, ConfigError for a model that it cannot run, UsageError
    where memory or threads do not suffice.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        context: int,
        n_blocks: int,
        threads: int | None = None,
        kv: KvFormat = "f16",
        cache: native.PanelCache | None = None,
    ) -> None:
        native.module()  # raises where it is missing
        n_threads = native.default_threads() if threads is None else threads
        if n_threads < 1:
            raise UsageError(f"threads ({n_threads}) must be at least 1")
        self.config = config
        self.context = context
        self.n_blocks = n_blocks
        self._cache = cache
        recorder = Recorder(context)
        decoded = decode(config, tensors, recorder)
        try:
            self._program, places = native.build(
                recorder,
                decoded.hidden,
                decoded.logits,
                context=context,
                kv=kv,
                kv_shapes=kv_shapes(config),
                n_blocks=n_blocks,
                threads=n_threads,
                cache=cache,
            )
        except ValueError as error:
            raise ConfigError(
                f"the native executor cannot run this model: {error}", hint="--executor reference (slow) runs it"
            ) from None
        except RuntimeError as error:  # std::system_error
            raise UsageError(f"{n_threads} threads could not be started: {error}", hint="try fewer") from None
        except MemoryError:
            raise UsageError(
                f"there is not enough memory for the weights and a cache of {n_blocks} blocks",
                hint="a shorter --context or a smaller quantisation needs less",
            ) from None

        self._places = {name: places[tensor] for name, tensor in tensors.items() if tensor in places}
        self._numbers = count(1)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, all blocks."""
        size: int = self._program.cache_bytes
        return size

    def step(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        check_batch(batch, self.config, self.context, self.n_blocks)
        logits = np.empty((len(batch.rows), self.config.vocab_size), dtype=np.float32)
        try:
            self._program.step(
                batch.tokens,
                batch.positions,
                batch.starts,
                batch.blocks,
                batch.rows,
                logits,
                None if hidden is None else batch.hidden_rows,
                hidden,
                batch.adapters,
            )
        except MemoryError:
            raise ContextError(
                f"there is not enough memory for a step of {len(batch.tokens)} tokens", hint="use smaller steps"
            ) from None
        except RuntimeError as error:
            raise UsageError(str(error), hint=_ONE_PROCESS) from None
        return logits

    def copy_block(self, source: int, target: int) -> None:
        self._program.copy_block(source, target)

    def add_adapter(self, adapter: Adapter) -> int:
        adapter.check(self.config)
        number = next(self._numbers)
        pairs = [(self._places[name], pair) for name, pair in adapter.pairs.items()]
        try:
            native.add_adapter(self._program, number, pairs)
        except RuntimeError as error:
            raise UsageError(str(error), hint=_ONE_PROCESS) from None
        return number

    def remove_adapter(self, number: int) -> None:
        self._program.remove_adapter(number)

    def close(self) -> None:
        if hasattr(self, "_program"):
            del self._program
        if self._cache is not None:
            self._cache.close()
