"""Weight formats: how many bytes a block of values takes, and how to turn bytes into float32.

The block layouts are those of ggml (ggml-common.h describes them). Every quantised format is the same sum: codes of at
most 8 bits, a float32 scale for each group of codes, and for some a float32 minimum for each group. `unpack` gives
these parts, `dequantize` the values: plain numpy, the truth that the packed kernels and the quantisers are compared
with. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_VALUES = 1 << 20
"""`dequantize` works on about this many values at a time, so that its scratch memory stays at a few MB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """n blocks taken apart into groups: value = scale * code - minimum, in float32 arithmetic, in that order."""

    codes: NDArray[np.int8]
    """[n, groups, group]"""
    scales: Floats
    """[n, groups]"""
    minima: Floats | None = None
    """[n, groups]; None: all zero."""

    def values(self) -> Floats:
        """[n, groups * group] float32."""
        out = self.codes.astype(np.float32)
        with np.errstate(invalid="ignore"):  # a hostile scale may be infinite or NaN; the value then is too
            out *= self.scales[:, :, None]
            if self.minima is not None:
                out -= self.minima[:, :, None]
        return out.reshape(len(out), -1)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of values is a sequence of blocks: `block` values in `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int
    unpack: Callable[[Bytes], Codes] | None = None
    """[n, block_bytes] uint8 -> codes, scales, minima, exact; None for the float formats."""
    group: int = 1
    """Values that share one scale (and minimum)."""

    def row_bytes(self, cols: int) -> int:
        assert cols % self.block == 0
        return cols // self.block * self.block_bytes

    def dequantize(self, data: Bytes) -> Floats:
        """[rows, row_bytes] uint8 -> [rows, cols] float32, exact. F32 is a view of `data` where that is contiguous."""
        rows, row_bytes = data.shape
        if self.unpack is None:
            return _FLOATS[self.name](np.ascontiguousarray(data))
        out = np.empty((rows, row_bytes // self.block_bytes * self.block), dtype=np.float32)
        step = max(1, _CHUNK_VALUES // max(1, out.shape[1]))
        for start in range(0, rows, step):
            blocks = np.ascontiguousarray(data[start : start + step]).reshape(-1, self.block_bytes)
            out[start : start + step] = self.unpack(blocks).values().reshape(-1, out.shape[1])
        return out


def _bf16(data: Bytes) -> Floats:
    out = data.view("<u2").astype(np.uint32)
    out <<= np.uint32(16)
    return out.view(np.float32)


def _f16(data: Bytes) -> Floats:
    with np.errstate(invalid="ignore"):  # a signalling NaN is still only a NaN
        return data.view("<f2").astype(np.float32)


def _f8_e4m3_values() -> Floats:
    """Of all bytes: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities (Micikevicius et al. 2022, "FP8
    Formats for Deep Learning")."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    sizes = np.where(exponents == 0, np.ldexp(mantissas, -9), np.ldexp(8 + mantissas, exponents - 10))
    sizes[codes & 127 == 127] = np.nan
    values: Floats = np.where(codes < 128, sizes, -sizes).astype(np.float32)
    return values


_F8_E4M3_VALUES = _f8_e4m3_values()

_FLOATS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": lambda data: data.view("<f4"),
    "F16": _f16,
    "BF16": _bf16,
    "F8_E4M3": lambda data: _F8_E4M3_VALUES[data],
}


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of every block, [n, 1] float32."""
    return _f16(np.ascontiguousarray(blocks[:, start : start + 2]))


def _fields(data: Bytes, bits: int, run: int) -> Bytes:
    """Fields of `bits` bits, `run` bytes at a time: lowest of each byte, then the next … -> [n, bytes * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = data.reshape(len(data), -1, 1, run) >> shifts
    fields &= np.uint8((1 << bits) - 1)
    return fields.reshape(len(data), -1)


def _signed(codes: Bytes, offset: int, group: int) -> NDArray[np.int8]:
    """Unsigned codes [n, block] minus `offset`, [n, groups, group] int8."""
    return (codes.view(np.int8) - np.int8(offset)).reshape(len(codes), -1, group)


def _q4_0(b: Bytes) -> Codes:
    """half scale | 16 bytes of codes + 8"""
    return Codes(codes=_signed(_fields(b[:, 2:], 4, 16), 8, 32), scales=_half(b, 0))


def _q4_1(b: Bytes) -> Codes:
    """half scale | half -minimum | 16 bytes of codes"""
    return Codes(codes=_signed(_fields(b[:, 4:], 4, 16), 0, 32), scales=_half(b, 0), minima=-_half(b, 2))


def _q5_0(b: Bytes) -> Codes:
    """half scale | 4 bytes: bit 4 of each code | 16 bytes: bits 0-3 of codes + 16"""
    codes = _fields(b[:, 6:], 4, 16) | _fields(b[:, 2:6], 1, 1) << np.uint8(4)
    return Codes(codes=_signed(codes, 16, 32), scales=_half(b, 0))


def _q5_1(b: Bytes) -> Codes:
    """half scale | half -minimum | 4 bytes: bit 4 | 16 bytes: bits 0-3"""
    codes = _fields(b[:, 8:], 4, 16) | _fields(b[:, 4:8], 1, 1) << np.uint8(4)
    return Codes(codes=_signed(codes, 0, 32), scales=_half(b, 0), minima=-_half(b, 2))


def _q8_0(b: Bytes) -> Codes:
    """half scale | 32 signed bytes"""
    return Codes(codes=_signed(b[:, 2:], 0, 32), scales=_half(b, 0))


def _q2_k(b: Bytes) -> Codes:
    """16 bytes: scale and minimum of 4 bits | 64 bytes of codes | half scale of scales | half scale of minima"""
    return Codes(
        codes=_signed(_fields(b[:, 16:80], 2, 32), 0, 16),
        scales=_times(_half(b, 80), b[:, :16] & 15),
        minima=_times(_half(b, 82), b[:, :16] >> 4),
    )


def _q3_k(b: Bytes) -> Codes:
    """32 bytes: bit 2 of codes + 4 | 64 bytes: bits 0-1 | 12 bytes: 16 scales + 32 of 6 bits | half scale of scales"""
    codes = _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << np.uint8(2)
    scales = _fields(b[:, 96:104], 4, 8) | _fields(b[:, 104:108], 2, 4) << np.uint8(4)
    return Codes(codes=_signed(codes, 4, 16), scales=_times(_half(b, 108), _signed(scales, 32, 16)[:, 0]))


def _scales_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 12 bytes of Q4_K and Q5_K that hold 8 scales and 8 minima of 6 bits -> two [n, 8] uint8.

    Bytes 0-3: scales 0-3 and, on top, bits 4-5 of scales 4-7; bytes 4-7: the same of the minima; bytes 8-11: bits 0-3
    of scales 4-7 and of minima 4-7.
    """
    low, high, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, mixed & 15 | low >> 2 & 48], axis=1)
    minima = np.concatenate([high & 63, mixed >> 4 | high >> 2 & 48], axis=1)
    return scales, minima


def _q4_k(b: Bytes) -> Codes:
    """half scale of scales | half scale of minima | 12 bytes of scales and minima | 128 bytes of codes"""
    scales, minima = _scales_minima(b[:, 4:16])
    return Codes(
        codes=_signed(_fields(b[:, 16:], 4, 32), 0, 32),
        scales=_times(_half(b, 0), scales),
        minima=_times(_half(b, 2), minima),
    )


def _q5_k(b: Bytes) -> Codes:
    """As Q4_K, with 32 bytes of bit 4 before the 128 bytes of bits 0-3"""
    scales, minima = _scales_minima(b[:, 4:16])
    return Codes(
        codes=_signed(_fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << np.uint8(4), 0, 32),
        scales=_times(_half(b, 0), scales),
        minima=_times(_half(b, 2), minima),
    )


def _q6_k(b: Bytes) -> Codes:
    """128 bytes: bits 0-3 of codes + 32 | 64 bytes: bits 4-5 | 16 signed scales | half scale of scales"""
    codes = _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << np.uint8(4)
    return Codes(codes=_signed(codes, 32, 16), scales=_times(_half(b, 208), b[:, 192:208].view(np.int8)))


IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
"""What the 4-bit codes of IQ4_NL and IQ4_XS stand for."""


def _iq4_nl(b: Bytes) -> Codes:
    """half scale | 16 bytes of indices into IQ4_LEVELS"""
    return Codes(codes=IQ4_LEVELS[_fields(b[:, 2:], 4, 16)].reshape(-1, 1, 32), scales=_half(b, 0))


def _iq4_xs(b: Bytes) -> Codes:
    """half scale of scales | 2 bytes: bits 4-5 of 8 scales + 32 | 4 bytes: bits 0-3 | 128 bytes of indices"""
    scales = _fields(b[:, 4:8], 4, 1) | _fields(b[:, 2:4], 2, 1) << np.uint8(4)
    return Codes(
        codes=IQ4_LEVELS[_fields(b[:, 8:], 4, 16)].reshape(-1, 8, 32),
        scales=_times(_half(b, 0), _signed(scales, 32, 8)[:, 0]),
    )


def _times(half: Floats, scales: NDArray[np.integer]) -> Floats:
    """The scale of the scales [n, 1] times the scales [n, groups], float32."""
    with np.errstate(invalid="ignore"):
        return half * scales.astype(np.float32)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="F32", block=1, block_bytes=4),
        Format(name="F16", block=1, block_bytes=2),
        Format(name="BF16", block=1, block_bytes=2),
        Format(name="Q4_0", block=32, block_bytes=18, group=32, unpack=_q4_0),
        Format(name="Q4_1", block=32, block_bytes=20, group=32, unpack=_q4_1),
        Format(name="Q5_0", block=32, block_bytes=22, group=32, unpack=_q5_0),
        Format(name="Q5_1", block=32, block_bytes=24, group=32, unpack=_q5_1),
        Format(name="Q8_0", block=32, block_bytes=34, group=32, unpack=_q8_0),
        Format(name="Q2_K", block=256, block_bytes=84, group=16, unpack=_q2_k),
        Format(name="Q3_K", block=256, block_bytes=110, group=16, unpack=_q3_k),
        Format(name="Q4_K", block=256, block_bytes=144, group=32, unpack=_q4_k),
        Format(name="Q5_K", block=256, block_bytes=176, group=32, unpack=_q5_k),
        Format(name="Q6_K", block=256, block_bytes=210, group=16, unpack=_q6_k),
        Format(name="IQ4_NL", block=32, block_bytes=18, group=32, unpack=_iq4_nl),
        Format(name="IQ4_XS", block=256, block_bytes=136, group=32, unpack=_iq4_xs),
    )
}

F8_E4M3 = Format(name="F8_E4M3", block=1, block_bytes=1)
"""What checkpoints may hold beside FORMATS, always with scales in other tensors: nothing computes on it."""
