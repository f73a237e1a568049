"""Weight formats: how many bytes a block of values takes, and how to turn bytes into float32.

The block layouts are those of ggml (ggml-common.h describes them). Each `dequantize` is plain numpy: the truth that
the packed kernels and the quantisers are compared with. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of values is a sequence of blocks: `block` values in `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int
    dequantize: Callable[[Bytes], Floats]
    """[rows, row_bytes] uint8 -> [rows, cols] float32, exact."""

    def row_bytes(self, cols: int) -> int:
        assert cols % self.block == 0
        return cols // self.block * self.block_bytes

    @property
    def bits_per_value(self) -> float:
        return 8 * self.block_bytes / self.block


def _f32(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view("<f4")


def _f16(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _bf16(data: Bytes) -> Floats:
    return (np.ascontiguousarray(data).view("<u2").astype(np.uint32) << 16).view(np.float32)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="F32", block=1, block_bytes=4, dequantize=_f32),
        Format(name="F16", block=1, block_bytes=2, dequantize=_f16),
        Format(name="BF16", block=1, block_bytes=2, dequantize=_bf16),
    )
}
