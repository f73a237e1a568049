"""Merging an adapter into weights, and what is left of a change of weights in the file that was written.

A merged weight is W' = W + scale B A, in float32; a quantised W is dequantised for it. What is written of W' is rounded
once more, which is compared here with the change itself: of any weights, whether an adapter or training changed them.
Knows neither files nor engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dapji.models.adapter import Adapter
from dapji.ops import low_rank
from dapji.ops.formats import FORMATS, Bytes
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor

_CHUNK_VALUES = 1 << 20
"""Values compared at a time, in float64."""


def merged(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights that the adapter changes, by canonical name, with its change in them: F32, made when they are read,
    so that one at a time is in memory. tensors: the model's, which the adapter fits."""
    return {name: _merged(tensors[name], pair) for name, pair in adapter.pairs.items()}


def _merged(weight: Tensor, pair: LowRank) -> Tensor:
    def make() -> Bytes:
        return low_rank.merged(weight.float32(), pair).view(np.uint8)

    name = f"{weight.name} merged"
    return replace(weight, name=name, format=FORMATS["F32"], source=make, order=None, parts=())


@dataclass(frozen=True, kw_only=True)
class Survival:
    """What is left of a change, of a weight or of several together.

    With W the base's weight, D = W' - W the change that is wanted and R = S - W that which the stored weight S makes.
    """

    wanted: float
    """|D|^2, the sum of squares."""
    projection: float
    """<R, D>, the sum of products."""
    error: float
    """|R - D|^2 = |S - W'|^2: what rounding did."""

    @property
    def share(self) -> float | None:
        """<R, D> / |D|^2: how much of the change is there on average. 1: all; 0: it was rounded away. None: D = 0."""
        return self.projection / self.wanted if self.wanted else None

    @property
    def bits(self) -> float | None:
        """log2(|D| / |R - D|): the ratio of change to rounding, as signal to noise. Below 0 rounding is the larger one.
        None where nothing was rounded, or D = 0."""
        return 0.5 * math.log2(self.wanted / self.error) if self.wanted and self.error else None

    @staticmethod
    def total(parts: Iterable[Survival]) -> Survival:
        every = list(parts)
        return Survival(
            wanted=math.fsum(each.wanted for each in every),
            projection=math.fsum(each.projection for each in every),
            error=math.fsum(each.error for each in every),
        )


def survival(
    base: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Survival]:
    """Of each weight in `wanted`, W', what `stored` has kept of its difference from `base`; all by canonical name.

    progress: called with the name of each that is done.
    """
    found = {}
    for name, tensor in wanted.items():
        found[name] = _survival(base[name], tensor, stored[name])
        progress(name)
    return found


def _survival(base: Tensor, wanted: Tensor, stored: Tensor) -> Survival:
    ours = [tensor.float32().reshape(tensor.rows, -1) for tensor in (base, wanted, stored)]
    step = max(1, _CHUNK_VALUES // base.cols)
    parts = []
    for start in range(0, base.rows, step):
        w, new, kept = (values[start : start + step].astype(np.float64).ravel() for values in ours)
        d, r = new - w, kept - w
        parts.append(
            Survival(wanted=float(d @ d), projection=float(r @ d), error=float(np.square(r - d).sum())),
        )
    return Survival.total(parts)
