"""`Adapter`: a low-rank change of some weights of a model, that sequences choose beside each other on one base.

By canonical names, whatever file it came from or what trained it. Knows neither files nor executors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig, Shape, weight_shapes
from dapji.ops.low_rank import LowRank


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
