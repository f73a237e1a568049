"""Weights in 8-bit floats with a scale for each block of a matrix, as DeepSeek V3 is published; read, never written.

The values are those of transformers' dequantisation: the float32 product of an exact F8_E4M3 value and its block's
scale. They are made when they are asked for, one matrix at a time. Knows no family.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dapji.errors import ConfigError
from dapji.models.families.fields import Fields
from dapji.ops.formats import F8_E4M3, FORMATS, Bytes
from dapji.ops.tensor import Tensor

KEY = "quantization_config"
_SCALE = "_scale_inv"
"""What the name of a matrix's scales has at its end, beyond the matrix's own."""


def dequantized(config_json: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without scales, those in 8-bit floats as float32.

    Raises ConfigError where `quantization_config` describes anything else, and where a scale is missing, belongs to
    nothing or has not a value for each block.
    """
    block = _block(config_json)
    given = dict(tensors)
    scales = {} if block is None else {name: given.pop(name) for name in list(given) if name.endswith(_SCALE)}
    for name, tensor in given.items():
        scale = scales.pop(name + _SCALE, None)
        if tensor.format is not F8_E4M3:
            if scale is not None:
                raise ConfigError(f"{name} has the format {tensor.format.name}, but scales: {name}{_SCALE}")
            continue
        if block is None:
            raise ConfigError(f"{name} has the format {F8_E4M3.name}, but config.json has no {KEY}")
        if scale is None:
            raise ConfigError(f"missing tensor: {name}{_SCALE}, the scales of {name}")
        given[name] = _scaled(tensor, scale, *block)
    if scales:
        name = min(scales)
        raise ConfigError(f"unexpected tensor: {name}, scales of {name.removesuffix(_SCALE)}, which is missing")
    return given


def _block(config_json: Mapping[str, object]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: weights are not quantised."""
    outer = Fields(config_json, where="config.json")
    holder = next((part for part in (outer, *_inner(outer)) if KEY in part), None)
    if holder is None:
        return None
    fields = holder.mapping(KEY)
    fields.choice("quant_method", {"fp8": None})
    fields.choice("fmt", {"e4m3": None}, "e4m3")
    fields.choice("activation_scheme", {"dynamic": None}, "dynamic")
    size = fields.integers("weight_block_size")
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"config.json: {KEY}: weight_block_size must be two positive integers, not {size}")
    # tensors themselves say which of them are quantised; scales of any format are numbers
    fields.finish(ignorable=("modules_to_not_convert", "scale_fmt"))
    return size[0], size[1]


def _inner(outer: Fields) -> list[Fields]:
    return [outer.mapping("text_config")] if "text_config" in outer else []


def _scaled(weight: Tensor, scale: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """The last block of a row or column may be a part of one."""
    if len(weight.shape) != 2:
        raise ConfigError(f"{weight.name} has shape {list(weight.shape)}; scales of blocks are supported for matrices")
    rows, cols = weight.shape
    expected = (-(-rows // block_rows), -(-cols // block_cols))
    if scale.shape != expected:
        raise ConfigError(
            f"{scale.name} has shape {list(scale.shape)}, but {weight.name} {list(weight.shape)} has "
            f"{list(expected)} blocks of {block_rows} x {block_cols}"
        )

    def make() -> Bytes:
        values = weight.float32()
        for start, scales in zip(range(0, rows, block_rows), scale.float32(), strict=True):
            values[start : start + block_rows] *= np.repeat(scales, min(block_cols, cols))[:cols]
        return values.view(np.uint8)

    return Tensor(name=weight.name, format=FORMATS["F32"], shape=weight.shape, source=make, release=weight.release)
