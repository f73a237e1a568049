"""`LowRank`: what an adapter adds to a linear (Hu et al. 2021, LoRA). Knows no models."""

from __future__ import annotations

from dataclasses import dataclass

from dapji.ops.tensor import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """linear(x) becomes linear(x) + scale * (x @ a.T) @ b.T, of x before any rounding."""

    a: Tensor
    """[rank, in], a format without blocks."""
    b: Tensor
    """[out, rank], the same."""
    scale: float

    @property
    def rank(self) -> int:
        return self.a.rows

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes
