"""`Tensor`: a weight as it lies in a file: bytes, a format, a shape. Mapped; read when its values are asked for.

Knows nothing of models or of files; `formats` says what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dapji.ops.formats import Format


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A weight of shape [..., cols]; cols is a multiple of `format.block`, rows the product of the leading dimensions
    (1 for a vector)."""

    name: str
    """Where it came from, for error messages."""
    format: Format
    shape: tuple[int, ...]
    stored: NDArray[np.uint8]
    """[rows, row_bytes]: rows as raw bytes, in the order of the file."""
    order: NDArray[np.int64] | None = None
    """[rows]: row r of the weight is the stored row order[r]; None: r."""
    release: Callable[[], None] | None = None
    """Gives back the memory that `stored` takes as pages of a mapped file; they are read again when needed."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """[rows, row_bytes], in the order of the weight; a copy where that is not the file's."""
        return self.stored if self.order is None else self.stored[self.order]

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.rows * self.format.row_bytes(self.cols)

    def float32(self) -> NDArray[np.float32]:
        """The values, [*shape] float32, newly allocated (a view where the format is F32 already)."""
        return self.format.dequantize(self.data).reshape(self.shape)

    def take_rows(self, index: NDArray[np.int64]) -> Tensor:
        """The same tensor with its rows in the order of `index`: exact in every format, since blocks lie in rows."""
        return replace(self, order=index if self.order is None else self.order[index])

    @staticmethod
    def from_float32(name: str, values: NDArray[np.float32]) -> Tensor:
        """Wrap float32 values, any shape, C-contiguous."""
        from dapji.ops.formats import FORMATS

        values = np.ascontiguousarray(values, dtype=np.float32)
        rows = int(np.prod(values.shape[:-1], dtype=np.int64))
        return Tensor(
            name=name, format=FORMATS["F32"], shape=values.shape, stored=values.reshape(rows, -1).view(np.uint8)
        )
