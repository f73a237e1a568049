"""`LowRank`: what an adapter makes of a linear (Hu et al. 2021, LoRA; Liu et al. 2024, DoRA). Knows no models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapji.ops.tensor import Tensor

_CHUNK_VALUES = 1 << 22
"""Values of b @ a that are held at a time, beside the sum."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """linear(x) becomes linear(x) + scale * (x @ a.T) @ b.T, of x before any rounding; all that times `factors` where
    there is a magnitude."""

    a: Tensor
    """[rank, in], a format without blocks."""
    b: Tensor
    """[out, rank], the same."""
    scale: float
    magnitude: NDArray[np.float32] | None = None
    """[out] DoRA: how long each row of weight + scale * b @ a is made; None: it stays as it is."""

    @property
    def rank(self) -> int:
        return self.a.rows

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)

    def factors(self, weight: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """[out] by which all that the linear gives is multiplied, before a bias; None: by nothing. A row of zeros stays
        one. weight: [out, in] as the executor multiplies by it, since rounded rows have other lengths."""
        return None if self.magnitude is None else _ratios(self.magnitude, _sum(weight, self))


def merged(weight: NDArray[np.float32], pair: LowRank) -> NDArray[np.float32]:
    """[out, in], a new array: the weight with which linear(x) alone is what it is with the pair beside `weight`."""
    result = _sum(weight, pair)
    if pair.magnitude is not None:
        result *= _ratios(pair.magnitude, result)[:, None]
    return result


def _sum(weight: NDArray[np.float32], pair: LowRank) -> NDArray[np.float32]:
    """[out, in] weight + scale * b @ a."""
    a, b = pair.a.float32(), np.float32(pair.scale) * pair.b.float32()
    result = weight.copy()
    step = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        result[start : start + step] += b[start : start + step] @ a
    return result


def _ratios(magnitude: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """[out] of magnitudes to the lengths of rows; 0 of a row of zeros."""
    lengths = np.linalg.norm(rows, axis=1)
    ratios: NDArray[np.float32] = np.zeros_like(lengths)
    np.divide(magnitude, lengths, out=ratios, where=lengths > 0)
    return ratios
