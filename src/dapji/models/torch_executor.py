"""The decoder in torch: an executor for CPUs, CUDA and MPS, and logits that can be differentiated.

Needs torch (the extra `train`); `open_executor` imports this on use. Weights are dequantised to one type when they are
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from dapji.errors import UnavailableError, UsageError
from dapji.models.adapter import Adapter
from dapji.models.config import ModelConfig
from dapji.models.decoder import Decoded, decode
from dapji.models.executor import AdapterTable, check_batch
from dapji.models.size import kv_shapes
from dapji.ops.batch import Batch
from dapji.ops.low_rank import LowRank
from dapji.ops.reference import KvFormat
from dapji.ops.tensor import Tensor
from dapji.ops.torch import CachedTorchOps, TorchCache, TorchLowRank, TorchTables, UncachedTorchOps
from dapji.ops.torch_kernels import row_factors, row_lengths

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which makes a new plan for each length of a text: some 50 ms at every token."""
_SHORTEST = 256
"""Steps of single tokens on shorter texts are recorded as on texts of this length."""


@dataclass(frozen=True)
class _Recorded:
    """A step of single tokens as one CUDA graph."""

    graph: torch.cuda.CUDAGraph
    ops: CachedTorchOps
    """Their tensors are its input."""
    logits: torch.Tensor
    """Its output, until any recorded step runs again."""


class TorchExecutor:
    """The decoder over a cache on the device."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        context: int,
        n_blocks: int,
        kv: KvFormat = "f16",
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self.config = config
        self.context = context
        self.n_blocks = n_blocks
        self._device = find_device(device)
        used = {name: tensor for name, tensor in tensors.items() if not name.startswith("predictors.")}
        self._dtype = _DTYPES[dtype]
        self._weights = load_weights(used, device=self._device, dtype=self._dtype)
        self._adapters: AdapterTable[torch.Tensor, TorchLowRank] = AdapterTable()
        self._cache = TorchCache(kv_shapes(config), n_blocks, kv, self._device)
        self._tables = TorchTables(context, self._device)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    @torch.inference_mode()
    def step(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        check_batch(batch, self.config, self.context, self.n_blocks)
        single = len(batch.tokens) == len(batch.starts) - 1 == len(batch.rows)
        with sdpa_kernel(_KERNELS):
            if single and hidden is None and batch.adapters is None and self._device.type == "cuda":
                logits = self._replay(batch)
            else:
                decoded = self._decode(self._ops(batch))
                logits = decoded.logits
                if hidden is not None:
                    hidden[:] = decoded.hidden.float().cpu().numpy()
        host: NDArray[np.float32] = logits[: len(batch.rows)].float().cpu().numpy()
        return host

    def _ops(self, batch: Batch, length: int | None = None) -> CachedTorchOps:
        adapters = None if batch.adapters is None else self._adapters.pairs
        return CachedTorchOps(batch, self._cache, self._tables, self._device, adapters=adapters, length=length)

    def _decode(self, ops: CachedTorchOps) -> Decoded[torch.Tensor]:
        return decode(self.config, self._weights, ops)

    def _replay(self, batch: Batch) -> torch.Tensor:
        """Logits of one token of each sequence and of the last sequence again, up to a power of two. The kernels of
        such a step take less time than Python takes to start them one by one, so that they are recorded once for each
        number of sequences and length, both rounded up to a power of two, and then started together."""
        n, length = (1 << (size - 1).bit_length() for size in (len(batch.tokens), int(batch.positions.max()) + 1))
        length = min(max(length, _SHORTEST), self.context)
        filled = np.minimum(np.arange(n), len(batch.tokens) - 1)
        padded = Batch(
            tokens=batch.tokens[filled],
            positions=batch.positions[filled],
            starts=np.arange(n + 1, dtype=np.int32),
            blocks=batch.blocks[filled],
            rows=np.arange(n, dtype=np.int32),
        )
        ops = self._ops(padded, length)
        if (n, length) in self._recorded:
            recorded = self._recorded[n, length]
            recorded.ops.take(ops)
            recorded.graph.replay()
            return recorded.logits
        result = self._decode(ops).logits  # loads kernels and tables too, which cannot be recorded
        with torch.cuda.device(self._device):
            graph, ops = torch.cuda.CUDAGraph(), self._ops(padded, length)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._decode(ops).logits
        self._recorded[n, length] = _Recorded(graph, ops, logits)
        return result

    @torch.inference_mode()
    def copy_block(self, source: int, target: int) -> None:
        self._cache.copy_block(source, target)

    def add_adapter(self, adapter: Adapter) -> int:
        adapter.check(self.config)
        pairs = load_pairs(adapter, self._weights, dtype=self._dtype)
        return self._adapters.add({self._weights[name]: pair for name, pair in pairs.items()})

    def remove_adapter(self, number: int) -> None:
        self._adapters.remove(number)

    def close(self) -> None:
        self._recorded.clear()
        self._weights.clear()
        self._cache.keys.clear()
        self._cache.values.clear()


def sequence_logits(
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    tables: TorchTables,
    adapter: Mapping[str, TorchLowRank] | None = None,
) -> torch.Tensor:
    """Logits [B, S, V] of whole sequences, tokens [B, S] int64, without a cache: what training differentiates.

    weights: by canonical name, as `load_weights` gives them. tables: of a context of at least S, on the same device.
    adapter: of all sequences, by the same names, as `load_pairs` gives it.
    """
    adapters = {weights[name]: {1: pair} for name, pair in (adapter or {}).items()}
    n, length = tokens.shape
    ops = UncachedTorchOps(tokens.flatten(), [length] * n, tables, adapters=adapters)
    logits = decode(config, weights, ops).logits
    return logits.view(*tokens.shape, config.vocab_size)


def load_weights(tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every weight dequantised to `dtype` on the device, under the same name; what chooses experts to float32, since
    bfloat16 would round away the differences between them."""

    def load(name: str, tensor: Tensor) -> torch.Tensor:
        kept = torch.float32 if name.endswith((".router", ".selection_bias")) else dtype
        return torch.tensor(tensor.float32(), dtype=kept, device=device)

    return {name: load(name, tensor) for name, tensor in tensors.items()}


def load_pairs(adapter: Adapter, weights: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> dict[str, TorchLowRank]:
    """An adapter's matrices where the weights are that it changes, under the same names. weights: as `load_weights`
    gives them."""

    def load(pair: LowRank, weight: torch.Tensor) -> TorchLowRank:
        a, b = (torch.tensor(each.float32(), dtype=dtype, device=weight.device) for each in (pair.a, pair.b))
        if pair.magnitude is None:
            return TorchLowRank(a=a, b=b, scale=pair.scale)
        lengths = row_lengths(weight, a, b, pair.scale)
        magnitude = torch.tensor(pair.magnitude, device=weight.device)
        return TorchLowRank(a=a, b=b, scale=pair.scale, factors=row_factors(magnitude, lengths))

    return {name: load(pair, weights[name]) for name, pair in adapter.pairs.items()}


def find_device(name: str) -> torch.device:
    """ "cpu", "cuda", "cuda:1", "mps" … Raises UsageError for another name, UnavailableError where it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"unknown device {name!r}", hint="one of: cpu, cuda, cuda:N, mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= count:
        raise UnavailableError(
            f"there is no device {name}: torch {torch.__version__} sees {count} of type {device.type}",
            hint="use --device cpu, or install a build of torch for this machine's GPU",
        )
    return device
