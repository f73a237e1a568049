"""`Network`: a model as training sees it: its weights as parameters under their canonical names, run by the decoder.

Whole windows go in, sequences beside each other that do not see each other; what comes out is decided by who asks, from
the hidden states of the rows that matter. Knows neither losses nor optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dapji.models.config import ModelConfig, weight_shapes
from dapji.models.decoder import head_name, hidden_states
from dapji.ops.tensor import Tensor as StoredTensor
from dapji.ops.torch import SharedPrefixes, TorchTables, UncachedTorchOps
from dapji.ops.torch_kernels import linear, low_rank_linear, row_lengths
from dapji.training.data.stream import Window
from dapji.training.settings import LoraSettings

Head = Callable[[Tensor, Tensor, float | None], Tensor]
"""Of hidden [R, D], the head's weight [V, D], and the cap of logits: what a method makes of a window."""

A, B, MAGNITUDE = "_lora_a", "_lora_b", "_lora_magnitude"
"""What the names of an adapter's parameters end in, after the name of the weight that they change."""


_WORTH = 0.97
"""Share of distinct tokens above which nothing is gained: to gather the others for attention takes 3 to 4 % of a
window's time."""

_ROWS = 16
"""Distinct tokens become a multiple of it by the last one again: oneDNN keeps what it has compiled for each number of
rows, some 3 MB of SmolLM2-135M."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix as its file has it, often quantised; dequantised each time that it is multiplied by."""

    tensor: StoredTensor
    device: torch.device

    def __call__(self) -> Tensor:
        return torch.from_numpy(np.require(self.tensor.float32(), requirements="W")).to(self.device)


@dataclass(frozen=True, eq=False)
class _Adapted:
    """A weight and what changes it, as `low_rank_linear` takes them."""

    weight: Tensor | Stored
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    dropout: float
    """Of the change's input."""


class _Ops(UncachedTorchOps):
    def linear(self, x: Tensor, weight: Tensor | Stored | _Adapted, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Stored):
            return linear(x, weight, bias)
        if isinstance(weight, Tensor):
            return super().linear(x, weight, bias)
        base, a, b, scale, magnitude = weight.weight, weight.a, weight.b, weight.scale, weight.magnitude
        if not weight.dropout:
            y = low_rank_linear(x, base, a, b, scale, magnitude)
            return y if bias is None else y + bias
        kept = F.dropout(x, weight.dropout)
        if magnitude is None:
            term = scale * F.linear(F.linear(kept.to(a.dtype), a), b)
            return self.linear(x, base, bias) + term.to(x.dtype)
        # As PEFT has it, the base's own product is of all, and what the adapter makes different of what was kept.
        return self.linear(x - kept, base, bias) + low_rank_linear(kept, base, a, b, scale, magnitude)


class _Weights(Mapping[str, Any]):
    """A network's weights as they are now: sharded ones are whole only while their layer runs. A tensor, or what
    `_Ops.linear` takes instead."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getitem__(self, name: str) -> Any:
        path, _, leaf = name.rpartition(".")
        parameters = self._network.get_submodule(path)._parameters
        lora, weight = self._network.lora, self._network.stored.get(name, parameters.get(leaf))
        if weight is None:
            raise KeyError(name)
        a, b = parameters.get(leaf + A), parameters.get(leaf + B)
        if lora is None or a is None or b is None:
            return weight
        dropout = lora.dropout if self._network.training else 0.0
        return _Adapted(weight, a, b, lora.scale, parameters.get(leaf + MAGNITUDE), dropout)

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.names)

    def __len__(self) -> int:
        return len(self._network.names)


class _Layer(nn.Module):
    """The unit of recomputing and of sharding."""

    def forward(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run(x)


class Network(nn.Module):
    """Parameters are named as weights are: layers.0.attention.q, and layers.0.attention.q_lora_a of an adapter."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor | Stored],
        *,
        context: int,
        lora: LoraSettings | None = None,
        seed: int = 0,
        recompute: bool = False,
    ) -> None:
        """weights: by canonical name, on one device; matrices that are not trained may stay stored. context: of the
        longest sequence. lora: train an adapter, whose beginning `seed` decides; None: train all weights. recompute:
        keep of a layer only what it takes, and compute the rest again for its gradients.

        Raises ConfigError where the adapter's targets are no weights of the model.
        """
        super().__init__()
        self.config = config
        self.lora = lora
        self.names = [name for name in weight_shapes(config) if not name.startswith("predictors.")]
        self._recompute = recompute
        self.stored = {name: weight for name, weight in weights.items() if isinstance(weight, Stored)}
        for name in self.names:
            weight = weights[name]
            if isinstance(weight, Tensor):
                self._register(name, nn.Parameter(weight, requires_grad=lora is None))
        self.device = self.get_parameter("embed").device
        self._tables = TorchTables(context, self.device)
        if lora is not None:
            generator = torch.Generator().manual_seed(seed)
            for name in lora.chosen(config):
                rows, cols = weight_shapes(config)[name]
                bound = 1 / math.sqrt(cols)  # kaiming_uniform_ with a = sqrt(5), as a linear of torch begins
                a = torch.empty(lora.rank, cols).uniform_(-bound, bound, generator=generator)
                a = a.to(self.device)
                self._register(name + A, nn.Parameter(a))
                b = torch.zeros(rows, lora.rank, device=self.device)
                self._register(name + B, nn.Parameter(b))
                if lora.dora:
                    self._register(name + MAGNITUDE, nn.Parameter(row_lengths(weights[name], a, b, lora.scale)))

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self
        for depth, part in enumerate(path.split(".") if path else []):
            if part not in module._modules:
                module.add_module(part, _Layer() if depth == 1 else nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, parameter)

    def forward(self, window: Window, head: Head) -> Tensor:
        """What `head` makes of the rows before the window's learned tokens, in their order."""
        tokens = torch.as_tensor(window.tokens, dtype=torch.int64, device=self.device)
        rows = torch.as_tensor(window.learned, device=self.device).nonzero().squeeze(1) - 1
        lengths = (window.starts[1:] - window.starts[:-1]).tolist()
        ops = _Ops(tokens, lengths, self._tables, hidden_rows=rows, shared=self._shared(window))
        weights = _Weights(self)
        hidden = hidden_states(self.config, weights, ops, self._run)
        return head(hidden, weights[head_name(self.config)], self.config.logit_softcap)

    def _shared(self, window: Window) -> SharedPrefixes | None:
        first, places = window.prefixes
        if len(first) > _WORTH * len(places):
            return None
        first = np.concatenate([first, np.repeat(first[-1:], -len(first) % _ROWS)])
        return SharedPrefixes(*(torch.from_numpy(each).to(self.device) for each in (first, places)))

    def _run(self, index: int, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        module = self.get_submodule(f"layers.{index}")
        result: Any
        if self._recompute and torch.is_grad_enabled():
            result = checkpoint(module, layer, x, use_reentrant=False)
        else:
            result = module(layer, x)
        assert isinstance(result, Tensor)
        return result

    def trained(self) -> dict[str, nn.Parameter]:
        """By name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
