"""Rope frequencies and tables against transformers, at the sizes and settings of published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from dapji.models.families import config_from_hf
from dapji.ops.rope import RopeConfig, rope_frequencies, rope_table

PUBLISHED = Path(__file__).parent.parent / "models" / "published"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("theta", "head_dim", "context", "rope"),
    [
        pytest.param(1e4, 128, 4096, {"rope_type": "default"}, id="Llama-2"),
        pytest.param(5e5, 128, 131_072, LLAMA3, id="Llama-3.1"),
        pytest.param(5e5, 64, 131_072, {**LLAMA3, "factor": 32.0}, id="Llama-3.2"),
        pytest.param(5e5, 128, 131_072, {**LLAMA3, "factor": 16.0, "high_freq_factor": 1.0}, id="Llama-4-Scout"),
        pytest.param(1e6, 128, 131_072, YARN, id="Qwen2.5-yarn"),
        pytest.param(1e6, 64, 131_072, {**YARN, "truncate": False}, id="yarn-not-truncated"),
        pytest.param(1e4, 128, 65_536, {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}, id="yarn-mscale"),
        pytest.param(1e4, 128, 65_536, {**YARN, "mscale": 0.707}, id="yarn-half-an-mscale"),
        pytest.param(1e4, 64, 65_536, {**YARN, "attention_factor": 1.25, "beta_fast": 64.0}, id="yarn-factor"),
        pytest.param(1e4, 128, 16_384, {"rope_type": "linear", "factor": 4.0}, id="linear"),
    ],
)
def test_tables_are_those_of_transformers(theta: float, head_dim: int, context: int, rope: dict[str, Any]) -> None:
    """To the last position: frequencies to a few units in the last place, and a table of our own frequencies is what
    their module makes of the same."""
    hf = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": theta, **rope},
    )
    config = config_from_hf(hf.to_diff_dict()).layers[0].attention.rope
    assert config is not None
    module = LlamaRotaryEmbedding(hf)
    frequencies = rope_frequencies(config, context)
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=5e-7)

    module.inv_freq = torch.tensor(frequencies)
    cos, sin = module(torch.zeros(1), torch.arange(context)[None])
    table = rope_table(config, context)
    assert table.dim == head_dim
    np.testing.assert_allclose(table.cos, cos[0, :, : head_dim // 2].numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(table.sin, sin[0, :, : head_dim // 2].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["phi-3.5-mini-instruct", "phi-4-mini-instruct"])
@pytest.mark.parametrize("context", [4096, 4097, 131_072])
def test_longrope_tables_are_those_of_transformers(name: str, context: int) -> None:
    """The same in a context of the original length, and beyond it."""
    config_json = json.loads((PUBLISHED / f"{name}.json").read_text())
    rope = config_from_hf(config_json).layers[0].attention.rope
    assert rope is not None
    module = Phi3RotaryEmbedding(transformers.Phi3Config(**config_json))
    positions = torch.arange(context)[None]
    module(torch.zeros(1), positions)
    frequencies = rope_frequencies(rope, context)
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=5e-7)

    module.original_inv_freq = module.long_inv_freq = torch.tensor(frequencies)
    cos, sin = module(torch.zeros(1), positions)
    table = rope_table(rope, context)
    np.testing.assert_allclose(table.cos, cos[0, :, : table.dim // 2].numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(table.sin, sin[0, :, : table.dim // 2].numpy(), rtol=0, atol=1e-6)


def test_frequency_factors_divide() -> None:
    plain = RopeConfig(theta=1e4, dim=8)
    factors = (1.0, 2.0, 3.0, 4.0)
    divided = RopeConfig(theta=1e4, dim=8, frequency_factors=factors)
    np.testing.assert_allclose(
        rope_frequencies(divided, 1), [1e4 ** (-i / 4) / factor for i, factor in enumerate(factors)], rtol=3e-7
    )
    np.testing.assert_array_equal(rope_frequencies(plain, 1), rope_frequencies(plain, 99))
