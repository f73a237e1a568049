"""`Tensor`: a weight as it lies in a file: bytes, a format, a shape. Mapped, never copied by this class.

Knows nothing of models or of files; `formats` says what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapji.ops.formats import Format


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A weight of shape [..., cols]; `data` is its rows as raw bytes, [rows, row_bytes] uint8.

    cols is a multiple of `format.block`; rows is the product of the leading dimensions (1 for a vector).
    """

    name: str
    """Where it came from, for error messages."""
    format: Format
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

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

    def take_rows(self, index: NDArray[np.integer]) -> Tensor:
        """The same tensor with its rows in the order of `index`: exact in every format, since blocks lie in rows."""
        return Tensor(name=self.name, format=self.format, shape=self.shape, data=self.data[index])

    @staticmethod
    def from_float32(name: str, values: NDArray[np.float32]) -> Tensor:
        """Wrap float32 values, any shape, C-contiguous."""
        from dapji.ops.formats import FORMATS

        values = np.ascontiguousarray(values, dtype=np.float32)
        rows = int(np.prod(values.shape[:-1], dtype=np.int64))
        return Tensor(
            name=name, format=FORMATS["F32"], shape=values.shape, data=values.reshape(rows, -1).view(np.uint8)
        )
