"""`LowRank`: what an adapter makes of a linear (Hu et al. 2021, LoRA; Liu et al. 2024, DoRA). Knows no models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapji.ops.tensor import Tensor


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
        if self.magnitude is None:
            return None
        lengths = np.linalg.norm(weight + np.float32(self.scale) * (self.b.float32() @ self.a.float32()), axis=1)
        factors: NDArray[np.float32] = np.zeros_like(lengths)
        np.divide(self.magnitude, lengths, out=factors, where=lengths > 0)
        return factors
