"""Random weights in every format: any codes and group scales, and float16 scales that keep the values small."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dapji.models.config import ModelConfig, weight_shapes
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor

HALVES_AT = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip
"""Where a block has its float16 scales; all other bytes may be anything."""


def random_matrix(format_name: str, rows: int, cols: int, rng: np.random.Generator, *, scale: float = 0.01) -> Tensor:
    """scale: standard deviation of the float16 scales, or of the values of a float format."""
    format = FORMATS[format_name]
    if format.block == 1:
        values = rng.normal(0, scale, (rows, cols)).astype(np.float32)
        if format_name == "BF16":
            data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            data = values.astype(np.float16 if format_name == "F16" else np.float32).view(np.uint8)
    else:
        blocks = rng.integers(0, 256, (rows, cols // format.block, format.block_bytes), dtype=np.uint8)
        for at in HALVES_AT[format_name]:
            scales = rng.normal(0, scale, (*blocks.shape[:2], 1)).astype(np.float16)
            blocks[:, :, at : at + 2] = scales.view(np.uint8)
        data = blocks.reshape(rows, -1)
    return Tensor(name=format_name, format=format, shape=(rows, cols), source=np.ascontiguousarray(data))


def random_weights(
    config: ModelConfig, seed: int, *, format: Callable[[str], str] = lambda name: "F32", scale: float = 0.06
) -> dict[str, Tensor]:
    """Every weight of the configuration: norms about what multiplies by 1, other vectors about 0.

    format: of a matrix, by its name. scale: of the values of a matrix in a float format.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            mean = 1 - config.norm_offset if name.endswith("norm") else 0
            tensors[name] = Tensor.from_float32(name, rng.normal(mean, 0.2, shape).astype(np.float32))
        else:
            kind, rows = format(name), math.prod(shape[:-1])
            matrix = random_matrix(kind, rows, shape[-1], rng, scale=scale if FORMATS[kind].block == 1 else 0.002)
            tensors[name] = replace(matrix.reshape(*shape), name=name)
    return tensors
