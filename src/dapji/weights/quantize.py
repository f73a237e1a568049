"""Quantising: float32 rows to ggml's block formats.

A block format stores integer codes and few scales. For given codes the best scale (and minimum) is a weighted
least-squares fit, and for given scales the best codes are the nearest ones; each fit here tries some 20 scales around
the one that spans a group's range and keeps the best fit. Large weights count for more, as they do in a product with
an activation. Everything works on many groups at once in plain numpy, with the group's values along the first axis.
The inverse, and the layouts, are in `ops.formats`. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dapji.errors import FormatError, UsageError
from dapji.ops.formats import Bytes, Floats, Format

_LARGEST = 65504.0 * 127
"""Q8_0 holds nothing larger, nor does any other block format; what it holds has squares that float32 can sum."""
_STEPS = np.arange(-1.0, 1.01, 0.1, dtype=np.float32)
"""Scales tried: those that stretch a group's range over `levels` + step codes."""
_REFINEMENTS = 2
"""Then, for affine groups, rounds of nearest codes for the best fit so far and a fit for these codes."""


def quantize(values: Floats, format: Format) -> Bytes:
    """[rows, cols] float32 -> [rows, row_bytes]. Values must be finite, cols a multiple of the format's block.

    Raises UsageError for a format that we only read, FormatError for values beyond the format's range.
    """
    quantizer = _QUANTIZERS.get(format.name)
    if quantizer is None:
        raise UsageError(f"cannot quantise to {format.name}", hint=f"possible: {', '.join(_QUANTIZERS)}")
    if format.unpack is not None and (largest := np.abs(values).max(initial=0)) > _LARGEST:
        raise FormatError(f"a value of {largest:g} does not fit into {format.name}")
    with np.errstate(over="ignore", invalid="ignore"):  # scales beyond float16: _f16 says so
        return quantizer(values.reshape(-1, format.block)).reshape(len(values), -1)


def _f16(values: Floats) -> Bytes:
    halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise FormatError(f"a value of {np.abs(values).max():g} does not fit into float16, whose largest is 65504")
    return halves.view(np.uint8)


def _bytes_of_halves(scales: Floats) -> Bytes:
    """[n] -> [n, 2]"""
    return _f16(scales[:, None])


def _rounded(scales: Floats) -> Floats:
    """The float16 values that the file will hold, as float32."""
    return scales.astype(np.float16).astype(np.float32)


def _pack(codes: Bytes, bits: int, run: int) -> Bytes:
    """[n, block] codes below 2**bits -> [n, block * bits / 8]: the layout of `ops.formats`, `run` bytes at a time."""
    fields = codes.reshape(len(codes), -1, 8 // bits, run)
    packed = fields[:, :, 0].copy()
    for index in range(1, 8 // bits):
        packed |= fields[:, :, index] << np.uint8(bits * index)
    return packed.reshape(len(codes), -1)


def _inverse(scales: Floats) -> Floats:
    """1 / scales; 0 where a scale is 0, so that all codes become 0 there."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _codes(x: Floats, scales: Floats, low: int, high: int) -> Floats:
    """The nearest codes of x [group, n] for scales [n]."""
    codes = x * _inverse(scales)
    np.rint(codes, out=codes)
    return np.clip(codes, low, high, out=codes)


def _dot(a: Floats, b: Floats) -> Floats:
    """Sums over the first axis of a * b."""
    sums: Floats = np.einsum("ij,ij->j", a, b)
    return sums


def _fit_symmetric(x: Floats, weights: Floats, levels: int) -> Floats:
    """Scales [n] for codes -levels … levels - 1 that (nearly) minimise sum(weights * (x - scale * code)**2).

    The value of largest magnitude is near code -levels, which has no positive twin.
    """
    peak: Floats = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    inverse_peak = _inverse(peak)
    best = np.zeros_like(peak)
    scales = np.zeros_like(peak)
    codes, weighted = np.empty_like(x), np.empty_like(x)
    for step in _STEPS:
        np.multiply(x, -(levels + step) * inverse_peak, out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, -levels, levels - 1, out=codes)
        np.multiply(codes, weights, out=weighted)
        sum_cx, sum_cc = _dot(weighted, x), _dot(weighted, codes)
        fitted = sum_cx * _inverse(sum_cc)
        gain = fitted * sum_cx  # how much smaller the error is than with scale 0
        np.copyto(scales, fitted, where=gain > best)
        np.maximum(best, gain, out=best)
    return scales


def _fit_affine(x: Floats, weights: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scales and minima [n], both >= 0, for codes 0 … levels, that (nearly) minimise

    sum(weights * (x - scale * code + minimum)**2).
    """
    low = np.minimum(x.min(axis=0), 0)
    span = x.max(axis=0) - low
    scales, minima = span / levels, -low
    best = np.full_like(span, -np.inf)
    sum_w, sum_x = weights.sum(axis=0), _dot(weights, x)
    codes, weighted = np.empty_like(x), np.empty_like(x)

    def fit() -> None:
        """Keep the fit for `codes`, rounded, where it is the best so far."""
        np.rint(codes, out=codes)
        np.clip(codes, 0, levels, out=codes)
        np.multiply(codes, weights, out=weighted)
        sum_c, sum_cx, sum_cc = weighted.sum(axis=0), _dot(weighted, x), _dot(weighted, codes)
        inverse = _inverse(np.maximum(sum_w * sum_cc - sum_c * sum_c, 0))
        scale = (sum_w * sum_cx - sum_x * sum_c) * inverse
        offset = (sum_cc * sum_x - sum_c * sum_cx) * inverse
        positive = offset > 0  # a minimum cannot be negative: fit the scale alone
        np.copyto(scale, sum_cx * _inverse(sum_cc), where=positive)
        np.copyto(offset, 0, where=positive)
        gain = np.where(inverse > 0, scale * sum_cx + offset * sum_x, -np.inf)
        better = gain > best
        np.copyto(scales, scale, where=better)
        np.copyto(minima, -offset, where=better)
        np.copyto(best, gain, where=better)

    shifted = x - low
    inverse_span = _inverse(span)
    for step in _STEPS:
        np.multiply(shifted, (levels + step) * inverse_span, out=codes)
        fit()
    for _ in range(_REFINEMENTS):
        np.multiply(x + minima, _inverse(scales), out=codes)
        fit()
    return scales, minima


def _groups(blocks: Floats, group: int) -> Floats:
    """[n, block] -> [group, n * block / group], contiguous."""
    return np.ascontiguousarray(blocks.reshape(-1, group).T)


def _blocks(codes: Floats, block: int) -> Bytes:
    """Codes [group, n * block / group] -> [n, block] uint8."""
    return np.ascontiguousarray(codes.astype(np.uint8).T).reshape(-1, block)


def _magnitude_weights(x: Floats) -> Floats:
    """|x| + 1.5 times the group's root mean square.

    The factor trades the plain error for that of the large weights; at 1.5 no format's plain error exceeds ggml's.
    """
    weights = np.abs(x)
    weights += np.float32(1.5) * np.sqrt(_dot(x, x) / np.float32(len(x)))
    return weights


def _q8_0(blocks: Floats) -> Bytes:
    scales = _rounded(np.abs(blocks).max(axis=1) / np.float32(127))
    codes = _codes(_groups(blocks, 32), scales, -127, 127)
    return np.hstack([_bytes_of_halves(scales), codes.astype(np.int8).T.view(np.uint8)])


def _symmetric(blocks: Floats, levels: int) -> tuple[Bytes, Bytes]:
    """Scales as bytes and codes + levels, of groups of 32."""
    x = _groups(blocks, 32)
    scales = _rounded(_fit_symmetric(x, _magnitude_weights(x), levels))
    return _bytes_of_halves(scales), _blocks(_codes(x, scales, -levels, levels - 1) + levels, 32)


def _affine(blocks: Floats, levels: int) -> tuple[Bytes, Bytes]:
    """Scales and negative minima as bytes and codes, of groups of 32."""
    x = _groups(blocks, 32)
    scales, minima = map(_rounded, _fit_affine(x, _magnitude_weights(x), levels))
    codes = _codes(x + minima, scales, 0, levels)
    return np.hstack([_bytes_of_halves(scales), _bytes_of_halves(-minima)]), _blocks(codes, 32)


def _q4_0(blocks: Floats) -> Bytes:
    scales, codes = _symmetric(blocks, 8)
    return np.hstack([scales, _pack(codes, 4, 16)])


def _q4_1(blocks: Floats) -> Bytes:
    scales, codes = _affine(blocks, 15)
    return np.hstack([scales, _pack(codes, 4, 16)])


def _q5_0(blocks: Floats) -> Bytes:
    scales, codes = _symmetric(blocks, 16)
    return np.hstack([scales, _pack(codes >> np.uint8(4), 1, 1), _pack(codes & np.uint8(15), 4, 16)])


def _q5_1(blocks: Floats) -> Bytes:
    scales, codes = _affine(blocks, 31)
    return np.hstack([scales, _pack(codes >> np.uint8(4), 1, 1), _pack(codes & np.uint8(15), 4, 16)])


def _of_63(values: Floats, unit: Floats) -> Bytes:
    """Values >= 0 as multiples 0 … 63 of `unit` [n], [n, 8]."""
    codes: Floats = np.rint(values.reshape(-1, 8) * _inverse(unit)[:, None])
    return np.minimum(codes, 63).astype(np.uint8)


def _unit_of_63(values: Floats) -> Floats:
    """The float16 of which the largest of 8 values is 63 times, [n]."""
    return _rounded(values.reshape(-1, 8).max(axis=1) / np.float32(63))


def _affine_of_256(blocks: Floats, levels: int) -> tuple[Bytes, Bytes]:
    """The first 16 bytes of Q4_K and Q5_K, and the codes."""
    x = _groups(blocks, 32)
    weights = _magnitude_weights(x)
    scales, minima = _fit_affine(x, weights, levels)
    scale_unit, minimum_unit = _unit_of_63(scales), _unit_of_63(minima)
    scale_codes = _of_63(scales, scale_unit)
    scales = (scale_unit[:, None] * scale_codes).ravel()
    # The rounded scale has another best minimum.
    minima = _dot(weights, _codes(x + minima, scales, 0, levels) * scales - x) * _inverse(weights.sum(axis=0))
    minimum_codes = _of_63(np.maximum(minima, 0), minimum_unit)
    minima = (minimum_unit[:, None] * minimum_codes).ravel()
    codes = _codes(x + minima, scales, 0, levels)
    top_scales, top_minima = scale_codes[:, 4:], minimum_codes[:, 4:]
    head = [
        _bytes_of_halves(scale_unit),
        _bytes_of_halves(minimum_unit),
        scale_codes[:, :4] | top_scales >> 4 << 6,
        minimum_codes[:, :4] | top_minima >> 4 << 6,
        top_scales & 15 | (top_minima & 15) << 4,
    ]
    return np.hstack(head), _blocks(codes, 256)


def _q4_k(blocks: Floats) -> Bytes:
    head, codes = _affine_of_256(blocks, 15)
    return np.hstack([head, _pack(codes, 4, 32)])


def _q5_k(blocks: Floats) -> Bytes:
    head, codes = _affine_of_256(blocks, 31)
    return np.hstack([head, _pack(codes >> np.uint8(4), 1, 32), _pack(codes & np.uint8(15), 4, 32)])


def _q6_k(blocks: Floats) -> Bytes:
    x = _groups(blocks, 16)
    scales = _fit_symmetric(x, _magnitude_weights(x), 32).reshape(-1, 16)
    peak = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)
    unit = _rounded(peak / np.float32(-128))  # [n, 1]
    scale_codes = np.clip(np.rint(scales * _inverse(unit)), -128, 127)
    codes = _blocks(_codes(x, (unit * scale_codes).ravel(), -32, 31) + 32, 256)
    return np.hstack(
        [
            _pack(codes & np.uint8(15), 4, 64),
            _pack(codes >> np.uint8(4), 2, 32),
            scale_codes.astype(np.int8).view(np.uint8),
            _bytes_of_halves(unit[:, 0]),
        ]
    )


def _bf16(values: Floats) -> Bytes:
    """The upper halves, rounded to the nearest, to even in the middle."""
    bits = values.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    if not np.isfinite(bits.view(np.float32)).all():
        raise FormatError(f"a value of {np.abs(values).max():g} does not fit into bfloat16")
    return (bits >> np.uint32(16)).astype("<u2").view(np.uint8)


_QUANTIZERS: dict[str, Callable[[Floats], Bytes]] = {
    "F32": lambda values: values.view(np.uint8),
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""[n, block] float32 -> [n, block_bytes]."""
