"""Plans of models too large for any machine here, against what their publishers say and against written files.

DeepSeek-AI 2024 ("DeepSeek-V3"): 671 G parameters, 37 G of them active, and 70 kB of cache per token. Moonshot 2025
("Kimi K2"): 1.04 T and 32 G. Meta's model card of Llama 4 Scout: 17 G active.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapji.errors import ConfigError
from dapji.models.config import weight_shapes
from dapji.models.families import config_from_hf, to_gguf
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import read_gguf, write_gguf
from dapji.weights.plan import Plan, plan
from dapji.weights.quantize import quantize
from dapji.weights.schemes import SCHEMES, choose_formats

PUBLISHED = Path(__file__).parent.parent / "models" / "published"


def planned(name: str) -> Plan:
    return plan(config_from_hf(json.loads((PUBLISHED / f"{name}.json").read_text())))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v3", 671e9, 37e9),
        ("kimi-k2-instruct", 1.03e12, 32e9),
        ("deepseek-v2", 236e9, 21e9),
        ("deepseek-v2-lite", 15.7e9, 2.4e9),
        ("llama-4-scout-17b-16e-instruct", 108e9, 17e9),
        ("qwen3-235b-a22b", 235e9, 22e9),
        ("mixtral-8x7b-v0.1", 46.7e9, 12.9e9),
    ],
)
def test_parameters_are_those_of_the_publishers(name: str, total: float, active: float) -> None:
    """Of the active ones publishers count the embedding or not."""
    model = planned(name)
    assert model.parameters == pytest.approx(total, rel=0.005)
    assert model.active_parameters == pytest.approx(active, rel=0.06)


def test_deepseek_v3() -> None:
    model = planned("deepseek-v3")
    latent = "latent attention 128 heads (latent 512, rope 64)"
    assert model.layers == {
        f"{latent}, feed-forward 18432": 3,
        f"{latent}, 256 experts of 2048, 8 per token + shared 2048": 58,
    }
    assert (model.predictors, model.predictor_parameters) == (1, 13_463_426_304)
    assert model.cache["f16"].per_token == 70_272 == 61 * 576 * 2
    assert model.cache["q8"].per_token == 61 * (576 + 4 * 18)
    assert model.cache["f16"].whole_context == 70_272 * 163_840
    # two bytes a weight, but for vectors and routers; of the 685 G
    router = 256 * 7168
    assert model.weights["BF16"].bytes == pytest.approx(2 * (684_489_845_504 + 59 * router), rel=1e-4)
    assert model.weights["BF16"].read_per_token == pytest.approx(2 * (model.active_parameters + 58 * router), rel=1e-4)
    assert model.weights["Q8_0"].bytes == pytest.approx(1.0625 * 684_489_845_504, rel=1e-3)


def test_layers_that_differ_are_told_apart() -> None:
    assert set(planned("mistral-7b-v0.1").layers) == {
        "attention 32 heads of 128 (keys 8) window 4096, feed-forward 14336"
    }
    scout = planned("llama-4-scout-17b-16e-instruct").layers
    assert {text.partition(")")[2].partition(",")[0].strip(): n for text, n in scout.items()} == {
        "chunk 8192": 36,
        "not rotated": 12,
    }


TINY: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 512, "vocab_size": 96, "max_position_embeddings": 512,
    "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 256,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["BF16", "Q8_0", "Q4_K_M"])
def test_a_file_has_the_planned_size(scheme: str, tmp_path: Path) -> None:
    """Written with weights, and read back; what a token reads is counted expert by expert."""
    config = config_from_hf(TINY)
    rng = np.random.default_rng(0)
    weights = {
        name: Tensor.from_float32(name, rng.standard_normal(shape, dtype=np.float32))
        for name, shape in weight_shapes(config).items()
    }
    metadata, named = to_gguf(config, weights)
    # as from a folder in bfloat16: what a scheme leaves as it is stays two bytes
    halves = {name: tensor if len(tensor.shape) == 1 else as_format(tensor, "BF16") for name, tensor in named.items()}
    written = []
    for name, format in choose_formats(halves, SCHEMES[scheme]).items():
        written.append(TensorToWrite.of(name, as_format(halves[name], format.name)))
    write_gguf(tmp_path / "model.gguf", metadata, written)
    stored = read_gguf(tmp_path / "model.gguf").tensors.stored
    expected = plan(config, (scheme,)).weights[scheme]
    assert expected.bytes == sum(len(tensor.data) for tensor in stored.values())
    read = 0
    for name, tensor in stored.items():
        if name == "token_embd.weight" or name.startswith("blk.3."):
            continue  # a row, and the predictor
        read += len(tensor.data) * 2 // 8 if "_exps" in name else len(tensor.data)
    assert expected.read_per_token == read


def as_format(tensor: Tensor, name: str) -> Tensor:
    format = FORMATS[name]
    data = quantize(tensor.float32().reshape(tensor.rows, tensor.cols), format)
    return Tensor(name=tensor.name, format=format, shape=tensor.shape, source=data)


def test_absurd_sizes_are_refused_before_anything_is_made_of_them() -> None:
    config_json = json.loads((PUBLISHED / "qwen3-30b-a3b.json").read_text())
    config = config_from_hf({**config_json, "head_dim": 2**40})
    with pytest.raises(ConfigError, match=r"attention\.q would be \[35184372088832, 2048\]"):
        plan(config)
