"""Quantisers against the gguf package, against ggml's own errors, and against torch's rounding."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from dapji.errors import FormatError, UsageError
from dapji.ops.formats import FORMATS
from dapji.weights.quantize import quantize

QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
GGML_ERRORS = {
    "normal": {
        "Q4_0": 0.0862337, "Q4_1": 0.0782025, "Q5_0": 0.0427822, "Q5_1": 0.0380368, "Q8_0": 0.00536863,
        "Q4_K": 0.0714658, "Q5_K": 0.0362879, "Q6_K": 0.0177766,
    },
    "heavy tails": {
        "Q4_0": 0.129133, "Q4_1": 0.100676, "Q5_0": 0.0665126, "Q5_1": 0.0488328, "Q8_0": 0.00841099,
        "Q4_K": 0.0935362, "Q5_K": 0.0472845, "Q6_K": 0.0256661,
    },
}  # fmt: skip
"""Relative root mean square errors of ggml 0.25.3's ggml_quantize_chunk, without importances, on `sample`."""


def sample(kind: str) -> np.ndarray:
    r = np.random.default_rng(0)
    values = r.standard_normal((64, 1024)) if kind == "normal" else r.standard_t(3, (64, 1024))
    return values.astype(np.float32)


def read_back(values: np.ndarray, name: str) -> np.ndarray:
    """Quantised by us, read by the gguf package."""
    data = quantize(values, FORMATS[name])
    assert data.dtype == np.uint8
    return np.asarray(quants.dequantize(data, GGMLQuantizationType[name]), dtype=np.float32)


def relative_error(got: np.ndarray, values: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got.astype(np.float64) - values) ** 2) / np.mean(values.astype(np.float64) ** 2)))


@pytest.mark.parametrize("kind", GGML_ERRORS)
@pytest.mark.parametrize("name", QUANTISED)
def test_the_error_is_no_larger_than_ggmls(name: str, kind: str) -> None:
    values = sample(kind)
    assert relative_error(read_back(values, name), values) <= GGML_ERRORS[kind][name]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_error_is_no_larger_than_the_gguf_packages(name: str) -> None:
    values = sample("heavy tails")
    theirs = quants.dequantize(quants.quantize(values, GGMLQuantizationType[name]), GGMLQuantizationType[name])
    assert relative_error(read_back(values, name), values) <= relative_error(theirs, values)


@pytest.mark.parametrize("name", QUANTISED)
def test_values_that_a_format_can_hold_keep_their_error_small(name: str) -> None:
    """Quantising what was quantised before: the codes are on a grid, so a fit of the same grid exists."""
    once = read_back(sample("normal"), name)
    again = read_back(once, name)
    # Nearly all blocks come back as they were; K-quants round scales, which cannot always be found again.
    assert relative_error(again, once) < 0.2 * GGML_ERRORS["normal"][name]


@pytest.mark.parametrize("name", QUANTISED)
def test_odd_values(name: str) -> None:
    r = np.random.default_rng(1)
    rows = {
        "zeros": np.zeros(256),
        "one value": np.full(256, 0.7),
        "one negative value": np.full(256, -0.7),
        "all positive": r.uniform(1, 2, 256),
        "all negative": -r.uniform(1, 2, 256),
        "one outlier": np.r_[np.zeros(255), 1000.0],
        "tiny": r.standard_normal(256) * 1e-9,
        "denormal": r.standard_normal(256) * 1e-40,
        "large": r.standard_normal(256) * 1e4,
    }
    for what, row in rows.items():
        values = row.astype(np.float32)[None]
        error = np.abs(read_back(values, name) - values).max()
        # Half a step of the coarsest format (7 levels each side of zero), or below float16's smallest scales.
        assert error <= max(np.abs(values).max() / 14 * 1.02, 2e-6), what


def test_floats_are_rounded_as_torch_rounds() -> None:
    r = np.random.default_rng(2)
    bits = r.integers(0, 2**32, 20_000, dtype=np.uint32)
    bits[:2000] &= 0xFFFF8000  # in the middle between two bfloat16
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3.38e38)][None]
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
    np.testing.assert_array_equal(quantize(values, FORMATS["BF16"]), wanted)
    values = values[np.abs(values) < 65504][None]
    wanted = torch.from_numpy(values).to(torch.float16).view(torch.int16).numpy().view(np.uint8)
    np.testing.assert_array_equal(quantize(values, FORMATS["F16"]), wanted)
    np.testing.assert_array_equal(quantize(values, FORMATS["F32"]), values.view(np.uint8))


@pytest.mark.parametrize("name", ["F16", *QUANTISED])
def test_what_does_not_fit_is_an_error_not_an_infinity(name: str) -> None:
    for value in (-3e38, 8e6 * 2, 65520 * 127):
        with pytest.raises(FormatError, match="does not fit into"):
            quantize(np.full((1, 256), value, dtype=np.float32), FORMATS[name])


def test_formats_that_are_only_read_say_so() -> None:
    with pytest.raises(UsageError, match="cannot quantise to IQ4_XS"):
        quantize(np.zeros((1, 256), dtype=np.float32), FORMATS["IQ4_XS"])
