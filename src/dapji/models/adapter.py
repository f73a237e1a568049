"""`Adapter`: a low-rank change of some weights of a model, that sequences choose beside each other on one base.

By canonical names, whatever file it came from or what trained it. Knows neither files nor executors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig, Shape, weight_shapes
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """Fits a model if `check` does not raise."""

    pairs: Mapping[str, LowRank]
    """By canonical name of the weight."""

    @property
    def nbytes(self) -> int:
        return sum(pair.nbytes for pair in self.pairs.values())

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError where it changes what the model does not have or what no adapter can, or has another
        shape."""
        shapes = adaptable(config)
        for name, pair in self.pairs.items():
            if name not in shapes:
                raise ConfigError(
                    f"the adapter changes {name}, which is no matrix of this model that adapters can change"
                )
            rows, cols = shapes[name]
            wanted = (pair.rank, cols), (rows, pair.rank)
            if (pair.a.shape, pair.b.shape) != wanted:
                raise ConfigError(
                    f"the adapter's matrices for {name} are {list(pair.a.shape)} and {list(pair.b.shape)}, "
                    f"but the model's {list(shapes[name])} wants {list(wanted[0])} and {list(wanted[1])}"
                )
            if pair.magnitude is not None and pair.magnitude.shape != (rows,):
                raise ConfigError(
                    f"the adapter's magnitude for {name} is {list(pair.magnitude.shape)}, "
                    f"but the model's {[rows, cols]} wants {[rows]}"
                )
            for tensor in (pair.a, pair.b):
                if tensor.format.block > 1:
                    raise ConfigError(f"the adapter's matrix {tensor.name} is {tensor.format.name}, not of floats")


def adaptable(config: ModelConfig) -> dict[str, Shape]:
    """The weights that the decoder applies by `linear`: canonical name -> shape [out, in]. Embeddings, routed experts
    and the absorbed matrices of latent attention are none."""
    return {
        name: shape
        for name, shape in weight_shapes(config).items()
        if len(shape) == 2 and name != "embed" and not name.startswith("predictors.")
    }


def combined(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One that changes a model as all of them together, each times its factor: their ranks side by side, as float32.

    Raises ConfigError of magnitudes, which are of one change as it is.
    """
    if len(adapters) == 1 and adapters[0][1] == 1:
        return adapters[0][0]
    if any(pair.magnitude is not None for adapter, _ in adapters for pair in adapter.pairs.values()):
        raise ConfigError(
            "an adapter with magnitudes (DoRA) makes rows as long as they say, and cannot be added up with others or "
            "taken times a factor",
            hint="merge it alone; then merge others into the result",
        )
    pairs: dict[str, LowRank] = {}
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter.pairs):
        parts = [(adapter.pairs[name], factor) for adapter, factor in adapters if name in adapter.pairs]
        a = np.concatenate([pair.a.float32() for pair, _ in parts])
        b = np.concatenate([np.float32(factor * pair.scale) * pair.b.float32() for pair, factor in parts], axis=1)
        pairs[name] = LowRank(a=Tensor.from_float32(f"{name} a", a), b=Tensor.from_float32(f"{name} b", b), scale=1.0)
    return Adapter(pairs=pairs)
