"""`Tensor`: a weight as it lies in a file: bytes, a format, a shape. Mapped; read when its values are asked for.

Knows nothing of models or of files; `formats` says what the bytes mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError
from dapji.ops.formats import FORMATS, Format

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A weight of shape [..., cols]; cols is a multiple of `format.block`, rows the product of the leading dimensions
    (1 for a vector)."""

    name: str
    """Where it came from, for error messages; different for different values of one model."""
    format: Format
    shape: tuple[int, ...]
    source: Bytes | Callable[[], Bytes]
    """[rows, row_bytes]: rows as raw bytes, in the order of the file; or what makes them each time they are asked for,
    so that a weight that no file holds as such takes memory only while it is used."""
    order: NDArray[np.int64] | None = None
    """[rows]: row r of the weight is the stored row order[r]; None: r."""
    parts: tuple[Tensor, ...] = ()
    """Tensors whose rows, one after another, are the source."""
    release: Callable[[], None] | None = None
    """Gives back the memory that the source takes as pages of a mapped file; they are read again when needed."""

    @property
    def stored(self) -> Bytes:
        return self.source() if callable(self.source) else self.source

    @property
    def data(self) -> Bytes:
        """[rows, row_bytes], in the order of the weight; a copy where that is not the file's."""
        return self.stored if self.order is None else self.stored[self.order]

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.format.row_bytes(self.cols)

    def float32(self) -> NDArray[np.float32]:
        """The values, [*shape] float32, newly allocated (a view where the format is F32 already)."""
        return self.format.dequantize(self.data).reshape(self.shape)

    def reshape(self, *shape: int) -> Tensor:
        """The same rows under other leading dimensions."""
        assert math.prod(shape[:-1]) == self.rows
        assert shape[-1] == self.cols
        return replace(self, shape=shape)

    def take_rows(self, index: NDArray[np.int64], name: str | None = None) -> Tensor:
        """The rows `index`, in its order, [len(index), cols], or in the same shape where all are taken: exact in every
        format, since blocks lie in rows."""
        shape = self.shape if len(index) == self.rows else (len(index), self.cols)
        order = index if self.order is None else self.order[index]
        if self.parts:
            ends = np.cumsum([part.rows for part in self.parts])
            first, last = np.searchsorted(ends, [order.min(), order.max()], side="right")
            if first == last:  # of one part: the others need not be made
                part: Tensor = self.parts[int(first)]
                return part.take_rows(order - (ends[first] - part.rows), name or self.name).reshape(*shape)
        return replace(self, name=name or self.name, shape=shape, order=order)

    def pieces(self) -> Iterator[Tensor]:
        """Tensors whose rows, one after another, are the weight's: where it is made of parts these, so that only one of
        them needs to be in memory."""
        if self.order is not None or not self.parts:
            yield self
        else:
            for part in self.parts:
                yield from part.pieces()

    def split(self) -> tuple[Tensor, ...]:
        """[n, rows, cols] as n matrices [rows, cols]."""
        n, rows, cols = self.shape
        if self.order is None and len(self.parts) == n:
            return tuple(part.reshape(rows, cols) for part in self.parts)
        everything = np.arange(self.rows, dtype=np.int64).reshape(n, rows)
        if self.order is None and not callable(self.source):
            stored = self.source.reshape(n, rows, -1)
            return tuple(
                replace(self, name=f"{self.name}[{i}]", shape=(rows, cols), source=stored[i], parts=())
                for i in range(n)
            )
        return tuple(self.take_rows(everything[i], f"{self.name}[{i}]") for i in range(n))

    @staticmethod
    def from_float32(name: str, values: NDArray[np.float32]) -> Tensor:
        """Wrap float32 values, any shape, C-contiguous."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        rows = math.prod(values.shape[:-1])
        return Tensor(
            name=name, format=FORMATS["F32"], shape=values.shape, source=values.reshape(rows, -1).view(np.uint8)
        )

    @staticmethod
    def joined(name: str, parts: Sequence[Tensor], *shape: int) -> Tensor:
        """The rows of all parts, one after another. Raises ConfigError where their formats differ."""
        if different := [part for part in parts if part.format is not parts[0].format]:
            first, other = parts[0], different[0]
            raise ConfigError(
                f"{name} would hold {first.name} ({first.format.name}) beside {other.name} ({other.format.name}), but "
                "a tensor has one format"
            )

        def release() -> None:
            for part in parts:
                if part.release is not None:
                    part.release()

        return Tensor(
            name=name,
            format=parts[0].format,
            shape=shape,
            source=lambda: np.concatenate([part.data for part in parts]),
            parts=tuple(parts),
            release=release,
        )

    def without_blocks(self) -> Tensor:
        """The same values in a format whose values can change places: for one of blocks F32, made when asked for."""
        return self if self.format.block == 1 else self.in_float32()

    def in_float32(self) -> Tensor:
        """The same values as F32, made when asked for."""
        if self.format is FORMATS["F32"]:
            return self
        return replace(
            self,
            name=f"{self.name} as F32",
            format=FORMATS["F32"],
            source=lambda: np.ascontiguousarray(self.format.dequantize(self.data)).view(np.uint8),
            order=None,
            parts=(),
        )

    def transposed(self) -> Tensor:
        """[rows, cols] -> [cols, rows], or each matrix of [n, rows, cols]; made when asked for, `without_blocks`."""
        if len(self.shape) == 3:
            n, rows, cols = self.shape
            return Tensor.joined(self.name, [part.transposed() for part in self.split()], n, cols, rows)
        plain = self.without_blocks()
        rows, cols = plain.shape
        size = plain.format.block_bytes

        def make() -> Bytes:
            return np.ascontiguousarray(plain.data.reshape(rows, cols, size).swapaxes(0, 1)).reshape(cols, -1)

        return Tensor(
            name=f"{self.name} transposed", format=plain.format, shape=(cols, rows), source=make,
            release=self.release,
        )  # fmt: skip
