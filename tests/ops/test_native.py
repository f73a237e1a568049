"""The native kernels against the formats' own dequantising and numpy in float64; every instruction set gives the same
bits; a token's result does not depend on its company."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from dapji.errors import UsageError
from dapji.ops import native
from dapji.ops.formats import FORMATS
from dapji.ops.reference import round_q8
from dapji.ops.tensor import Tensor
from random_weights import HALVES_AT, random_matrix

Floats = NDArray[np.float32]

ROWS, COLS = 45, 768
"""Two whole panels of 16 rows and a part; 24 blocks of 32 columns, so that prompt kernels cross a stretch of 16."""
TOLERANCE = 1e-6
"""Relative to the largest output: float32 sums of 24 blocks in another order (3e-7 is what occurs)."""


@cache
def random_weight(name: str, rows: int = ROWS, cols: int = COLS) -> Tensor:
    return random_matrix(name, rows, cols, np.random.default_rng(rows))


def pack(tensor: Tensor) -> object:
    module, shape = native.module(), (tensor.format.name, tensor.rows, tensor.cols)
    memory = module.allocate_panels(module.panels_bytes(*shape))
    module.pack(*shape, tensor.stored, tensor.order, memory)
    return module.Panels(*shape, memory)


def multiply(isa: str, panels: object, x: Floats, rows: int = ROWS) -> Floats:
    y = np.empty((len(x), rows), dtype=np.float32)
    native.module().linear(isa, panels, x, y)
    return y


def activations(tokens: int, cols: int = COLS) -> Floats:
    return np.random.default_rng(tokens).standard_normal((tokens, cols), dtype=np.float32)


def test_this_machine_runs_more_than_plain_code() -> None:
    """Otherwise the comparisons below compare nothing. A processor without AVX2 may fail this."""
    assert native.isas()[0] == "generic"
    assert len(native.isas()) > 1


@pytest.mark.parametrize("name", FORMATS)
def test_packing_is_exact(name: str) -> None:
    tensor = random_weight(name)
    panels = pack(tensor)
    row = np.empty(COLS, dtype=np.float32)
    for i, want in enumerate(tensor.float32()):
        panels.dequantize_row(i, row)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(row, want)


LAYOUTS = {1: "a02703f6afbcb7b1ace8d6155b886fa2d90837cfdfa06a153ba7f82298274ed8"}
"""By version: SHA-256 of the same weights in every format, packed."""


def test_a_new_layout_has_a_new_version() -> None:
    """Packed weights are kept in files by the version of their layout: another layout under the same version would be
    read as if it were the old one. Whoever changes it raises kPanelsVersion and adds a line above."""
    digest = hashlib.sha256()
    for name in FORMATS:
        tensor = random_weight(name)
        memory = native.module().allocate_panels(native.module().panels_bytes(name, ROWS, COLS))
        native.module().pack(name, ROWS, COLS, tensor.stored, None, memory)
        digest.update(memory)
    assert LAYOUTS.get(native.panels_version()) == digest.hexdigest()


def test_rows_are_packed_in_the_order_that_is_wanted() -> None:
    tensor = random_weight("Q4_1")
    order = np.random.default_rng(0).permutation(ROWS)
    panels, row = pack(tensor.take_rows(order)), np.empty(COLS, dtype=np.float32)
    for i, want in enumerate(tensor.float32()[order]):
        panels.dequantize_row(i, row)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(row, want)


@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 7, 29])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_reference(name: str, tokens: int) -> None:
    tensor = random_weight(name)
    x = activations(tokens)
    rounded = x if tensor.format.block == 1 else round_q8(x)
    want = rounded.astype(np.float64) @ tensor.float32().astype(np.float64).T
    panels = pack(tensor)
    results = [multiply(isa, panels, x) for isa in native.isas()]
    for result in results:
        np.testing.assert_allclose(result, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
        np.testing.assert_array_equal(result, results[0])
    for isa in native.isas():
        for alone in (0, tokens - 1):
            np.testing.assert_array_equal(multiply(isa, panels, x[alone : alone + 1])[0], results[0][alone])


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64])
@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q6_K"])
def test_any_number_of_rows(name: str, rows: int) -> None:
    tensor = random_weight(name, rows, 256)
    x = activations(5, 256)
    rounded = x if tensor.format.block == 1 else round_q8(x)
    want = rounded.astype(np.float64) @ tensor.float32().astype(np.float64).T
    for isa in native.isas():
        result = multiply(isa, pack(tensor), x, rows)
        np.testing.assert_allclose(result, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K", "IQ4_NL"])
def test_extreme_codes_do_not_overflow(name: str) -> None:
    """All bits of every code (and group scale) set, and activations that round to +127 and to -127."""
    format = FORMATS[name]
    data = np.full((16, format.row_bytes(256)), 0xFF if name != "Q8_0" else 0x80, dtype=np.uint8)
    blocks = data.reshape(16, -1, format.block_bytes)
    for at in HALVES_AT[name]:
        blocks[:, :, at : at + 2] = np.array([1.0], dtype=np.float16).view(np.uint8)
    if name == "Q6_K":
        blocks[:, :, 192:208] = 0x80
    tensor = Tensor(name=name, format=format, shape=(16, 256), source=data)
    for sign in (1, -1):
        x = np.full((3, 256), sign * 12.7, dtype=np.float32)
        want = round_q8(x).astype(np.float64) @ tensor.float32().astype(np.float64).T
        for isa in native.isas():
            np.testing.assert_allclose(multiply(isa, pack(tensor), x, 16), want, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_number_that_is_none_reaches_every_output(bad: float) -> None:
    x = activations(4)
    x[2, 100] = bad
    for isa in native.isas():
        result = multiply(isa, pack(random_weight("Q4_0")), x)
        assert not np.isfinite(result[2]).any()
        assert np.isfinite(result[[0, 1, 3]]).all()


def test_zeros_stay_zeros() -> None:
    for isa in native.isas():
        result = multiply(isa, pack(random_weight("Q4_1")), np.zeros((3, COLS), dtype=np.float32))
        np.testing.assert_array_equal(result, 0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    module = native.module()
    tensor = random_weight("Q4_0")
    memory = module.allocate_panels(module.panels_bytes("Q4_0", 45, COLS))
    with pytest.raises(ValueError, match=r"Q4_0 matrix of 45 x 33: .* a multiple of 32"):
        module.pack("Q4_0", 45, 33, tensor.data, None, memory)
    with pytest.raises(ValueError, match="the data is not 46 x 768 of Q4_0"):
        module.pack("Q4_0", 46, COLS, tensor.data, None, memory)
    with pytest.raises(ValueError, match="unknown weight format Q9_9"):
        module.pack("Q9_9", 45, COLS, tensor.data, None, memory)
    for order, wrong in ((np.arange(44), "the order does not fit"), (np.arange(45) + 1, "the order names no row")):
        with pytest.raises(ValueError, match=wrong):
            module.pack("Q4_0", 45, COLS, tensor.data, order, memory)
    for part in (memory[:-1], memory[1:], memory[64:]):
        with pytest.raises(ValueError, match=f"must be {len(memory)} bytes, aligned to 64"):
            module.pack("Q4_0", 45, COLS, tensor.data, None, part)
        with pytest.raises(ValueError, match=f"must be {len(memory)} bytes, aligned to 64"):
            module.Panels("Q4_0", 45, COLS, part)


def test_dapji_isa_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPJI_ISA", "generic")
    assert native.isa() == "generic"
    monkeypatch.setenv("DAPJI_ISA", "abacus")
    with pytest.raises(UsageError, match="DAPJI_ISA: instruction set abacus is unknown or missing here"):
        native.isa()


def test_the_limits_are_those_of_a_computer() -> None:
    """Not a speed test: only that bytes and operations are counted in the right unit."""
    assert 1e8 < native.read_bandwidth(1) < 1e13
    assert 1e8 < native.int8_peak(1) < 1e15
