"""Every format against the gguf package's own dequantiser, bit for bit."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from random_weights import HALVES_AT

ODD_HALVES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x3C00, 0x7C00, 0xFC00, 0x7E00], dtype="<u2")
"""Zeros, denormals, the largest numbers, infinities, NaN."""


def assert_same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal bit for bit (the sign of zero included), except that any NaN equals any other."""
    assert got.dtype == np.float32
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(got[number].view(np.uint32), wanted[number].view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_block_sizes_are_ggmls(name: str) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (FORMATS[name].block, FORMATS[name].block_bytes)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_equals_gguf_on_random_bytes(name: str) -> None:
    format = FORMATS[name]
    data = np.random.default_rng(1).integers(0, 256, (37, format.row_bytes(512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(data, GGMLQuantizationType[name])
    assert_same_bits(format.dequantize(data), np.asarray(wanted, dtype=np.float32).reshape(37, 512))


@pytest.mark.parametrize("name", HALVES_AT)
def test_dequantize_equals_gguf_on_odd_scales(name: str) -> None:
    format = FORMATS[name]
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (200, format.block_bytes), dtype=np.uint8)
    for at in HALVES_AT[name]:
        data[:, at : at + 2] = rng.choice(ODD_HALVES, 200).view(np.uint8).reshape(200, 2)
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(data, GGMLQuantizationType[name])
    assert_same_bits(format.dequantize(data), wanted)


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.unpack])
def test_unpacked_parts_make_the_values(name: str) -> None:
    format = FORMATS[name]
    data = np.random.default_rng(3).integers(0, 256, (64, format.block_bytes), dtype=np.uint8)
    for at in HALVES_AT[name]:
        data[:, at + 1] &= 0x3B  # finite scales
    assert format.unpack is not None
    parts = format.unpack(data)
    assert parts.codes.dtype == np.int8
    assert parts.codes.shape == (64, format.block // format.group, format.group)
    values = parts.codes.astype(np.float64) * parts.scales[:, :, None].astype(np.float64)
    if parts.minima is not None:
        values -= parts.minima[:, :, None]
    # Two float32 roundings, of the product and of the difference, on terms of at most this size.
    size = np.abs(parts.codes * parts.scales[:, :, None]).max() + (0 if parts.minima is None else parts.minima.max())
    np.testing.assert_allclose(format.dequantize(data), values.reshape(64, -1), rtol=0, atol=2**-23 * size)


def test_large_tensors_are_dequantized_in_chunks_with_the_same_result() -> None:
    format = FORMATS["Q4_K"]
    data = np.random.default_rng(4).integers(0, 256, (3000, format.row_bytes(1024)), dtype=np.uint8)
    whole = format.dequantize(data)  # three chunks
    for row in (0, 1023, 1024, 2999):
        assert_same_bits(format.dequantize(data[row : row + 1]), whole[row : row + 1])


def test_rows_taken_from_a_larger_array_need_no_contiguity() -> None:
    format = FORMATS["Q6_K"]
    data = np.random.default_rng(5).integers(0, 256, (8, format.row_bytes(512)), dtype=np.uint8)
    assert_same_bits(format.dequantize(data[::2, format.block_bytes :]), format.dequantize(data)[::2, 256:])


def test_tensor_keeps_its_shape_and_reorders_rows_exactly() -> None:
    format = FORMATS["Q8_0"]
    data = np.random.default_rng(6).integers(0, 256, (6, format.row_bytes(64)), dtype=np.uint8)
    tensor = Tensor(name="w", format=format, shape=(2, 3, 64), source=data)
    assert tensor.float32().shape == (2, 3, 64)
    order = np.array([5, 0, 3, 1, 2, 4])
    assert_same_bits(tensor.take_rows(order).float32().reshape(6, 64), tensor.float32().reshape(6, 64)[order])
