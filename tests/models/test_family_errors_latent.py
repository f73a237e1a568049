"""What configurations and tensors of DeepSeek V2, V3 and Kimi K2 can have wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_family_errors import changed, floats
from tiny_models import translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.config import ExpertsConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from dapji.ops.formats import FORMATS
from dapji.ops.rope import RopeScaling
from dapji.ops.tensor import Tensor

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
V2 = {**V3, "model_type": "deepseek_v2"}
YARN = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def test_the_base_of_these_is_right() -> None:
    for config_json in (V3, V2, {**V3, "model_type": "kimi_k2"}, {**V3, "rope_scaling": YARN}):
        assert families.config_from_hf(config_json).n_layers == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": None}, "config.json: qk_rope_head_dim is missing"),
        ({"qk_rope_head_dim": 7}, r"rope: dim \(7\) must be even"),
        ({"qk_nope_head_dim": 0}, r"nope_dim \(0\) must be positive"),
        ({"kv_lora_rank": -1}, r"latent_dim \(-1\) must be positive"),
        ({"q_lora_rank": 0}, r"query_dim \(0\) must be positive"),
        ({"q_lora_rank": "24"}, "q_lora_rank must be an integer, not '24'"),
        ({"v_head_dim": None}, "v_head_dim is missing"),
        ({"head_dim": 24}, "head_dim = 24 is not supported, only 8 is"),
        ({"qk_head_dim": 25}, "qk_head_dim = 25 is not supported, only 24 is"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads \(2\) must be num_attention_heads \(4\): each head has"),
        ({"attention_bias": True}, "attention_bias = True is not supported, only False is"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported, only 1 is"),
        ({"first_k_dense_replace": 4}, r"leading dense layers \(4\) must be 0 to n_layers \(3\)"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
        ({"num_nextn_predict_layers": 1 << 40}, r"predictors \(1099511627776\) must be 0 to 4096"),
        ({"n_routed_experts": None}, "n_routed_experts is missing"),
        ({"num_experts_per_tok": 17}, r"n_experts_per_token \(17\) must be 1 to n_experts \(16\)"),
        ({"n_shared_experts": None}, "n_shared_experts is missing"),
        ({"n_group": 3}, r"n_experts \(16\) must be divisible by n_groups \(3\)"),
        ({"n_group": 16, "topk_group": 3}, "groups of 1 expert cannot be scored by their two best"),
        ({"topk_group": 5}, r"n_groups_per_token \(5\) must be 1 to n_groups \(4\)"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported, only 'sigmoid' is"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy' is not supported, only 'noaux_tc' is"),
        ({"rope_interleave": 1}, "rope_interleave must be true or false, not 1"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": "1"}}, "mscale_all_dim must be a finite number, not '1'"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_scaling: unknown keys mscale, mscale_all_dim"),
        ({"index_topk": 2048, "index_n_heads": 64}, "unknown keys index_n_heads, index_topk"),
        ({"model_type": "deepseek_v32"}, "model_type 'deepseek_v32' is not supported"),
        ({"model_type": "deepseek_v4"}, "model_type 'deepseek_v4' is not supported"),
        ({"model_type": "kimi_k2", "scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ({"model_type": "deepseek_v2", "scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported"),
        (
            {"model_type": "deepseek_v2", "topk_method": "noaux_tc"},
            "topk_method 'noaux_tc' is not supported\nhint: ",
        ),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ({"model_type": "deepseek_v2", "mlp_bias": True}, "mlp_bias = True is not supported"),
    ],
)
def test_config_json(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.config_from_hf({**V3, **changes})


Weights = dict[str, Tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.15.up_proj.weight"),
            "missing tensor: model.layers.1.mlp.experts.15.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.16.up_proj.weight": floats(20, 64)}),
            "unexpected tensor: model.layers.1.mlp.experts.16.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.3.up_proj.weight": floats(20, 65)}),
            r"experts.3.up_proj.weight has shape \[20, 65\], but the configuration says \[20, 64\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.kv_b_proj.weight": floats(113, 32)}),
            r"kv_b_proj.weight has shape \[113, 32\], but the configuration says \[112, 32\]",
        ),
        (
            lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
            "missing tensor: model.layers.1.mlp.gate.e_score_correction_bias",
        ),
        (
            lambda t: t.update({"model.layers.3.enorm.weight": floats(64)}),
            "unexpected tensor: model.layers.3.enorm.weight",
        ),
    ],
)
def test_tensors_of_huggingface(change: Callable[[Weights], Any], message: str) -> None:
    config_json, named = families.to_hf(*translated("deepseek-v3"))
    change(named)
    with pytest.raises(ConfigError, match=message):
        families.from_hf(config_json, named)


def test_a_predictor_is_there_as_a_whole_or_not_at_all() -> None:
    config_json, named = families.to_hf(*translated("deepseek-v3"))
    named["model.layers.3.enorm.weight"] = floats(64)
    with pytest.raises(ConfigError, match=r"missing 6\d tensors: model.layers.3.embed_tokens.weight, model"):
        families.from_hf({**config_json, "num_nextn_predict_layers": 1}, named)


def test_experts_of_one_layer_have_one_format() -> None:
    config_json, named = families.to_hf(*translated("deepseek-v3"))
    key = "model.layers.1.mlp.experts.7.gate_proj.weight"
    halves = named[key].float32().astype(np.float16).view(np.uint8)
    named[key] = Tensor(name=key, format=FORMATS["F16"], shape=named[key].shape, source=halves)
    with pytest.raises(ConfigError, match=r"beside model.layers.1.mlp.experts.7.gate_proj.weight \(F16\), but a"):
        families.from_hf(config_json, named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.kv_lora_rank": None}, "GGUF: deepseek2.attention.kv_lora_rank is missing"),
        ({"attention.key_length": 41}, "attention.key_length = 41 is not supported, only 40 is"),
        ({"attention.key_length_mla": 8}, r"nope_dim \(0\) must be positive"),
        ({"attention.value_length_mla": None}, "value_length_mla is missing"),
        ({"attention.head_count_kv": 4}, "head_count_kv = 4 is not supported, only 1 is"),
        ({"rope.dimension_count": None}, "rope.dimension_count is missing"),
        ({"rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier is missing, without which yarn is not"),
        ({"expert_gating_func": 3}, "expert_gating_func 3 is not supported"),
        ({"expert_count": None}, "expert_count is missing"),
        ({"leading_dense_block_count": 9}, r"leading dense layers \(9\) must be 0 to n_layers \(3\)"),
        ({"nextn_predict_layers": 3}, r"n_layers \(0\) must be 1 to 4096"),
        ({"attention.temperature_scale": 0.1}, "unknown key deepseek2.attention.temperature_scale"),
        ({"expert_gating_func": 1}, "unexpected 2 tensors: blk.1.exp_probs_b.bias, blk.2.exp_probs_b.bias"),
    ],
)
def test_gguf_metadata(changes: dict[str, Any], message: str) -> None:
    metadata, named = families.to_gguf(*translated("deepseek-v3"))
    with pytest.raises(ConfigError, match=message):
        families.from_gguf({**metadata, **{f"deepseek2.{key}": value for key, value in changes.items()}}, named)


def with_experts(config: ModelConfig, change: Callable[[ExpertsConfig], ExpertsConfig]) -> ModelConfig:
    def of(layer: LayerConfig) -> LayerConfig:
        experts = layer.feed_forward
        return replace(layer, feed_forward=change(experts)) if isinstance(experts, ExpertsConfig) else layer

    return replace(config, layers=tuple(map(of, config.layers)))


def with_dense(config: ModelConfig, **values: Any) -> ModelConfig:
    first = config.layers[0]
    return replace(
        config, layers=(replace(first, feed_forward=replace(first.feed_forward, **values)), *config.layers[1:])
    )


def with_rope(config: ModelConfig, **values: Any) -> ModelConfig:
    attention = config.layers[0].attention
    assert isinstance(attention, LatentAttentionConfig)
    return changed(config, rope=replace(attention.rope, **values))


RAGGED = RopeScaling(kind="yarn", factor=16.0, original_context=32, attention_factor=1.0, truncate=False)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_context=32)
BOTH: list[tuple[str, Callable[[ModelConfig], ModelConfig], str]] = [
    ("deepseek-v3", lambda c: changed(c, 1, value_dim=13), "no form for layers that differ: 1 is not as the last"),
    ("deepseek-v3", lambda c: changed(c, norm_eps=1e-5), "has 1e-06 as norm_eps of latent vectors, not 1e-05"),
    ("deepseek-v3", lambda c: replace(c, predictors=c.layers[:1]), "no form for predictors that differ from the last"),
    ("deepseek-v3", lambda c: replace(c, layers=c.layers[::-1]), "no form for dense layers after layers of experts"),
    ("deepseek-v3", lambda c: replace(c, layers=c.layers[:1]), "no form for a model without experts"),
    ("deepseek-v3", lambda c: with_dense(c, bias=True), "no form for dense layers with biases or an activation of"),
    (
        "deepseek-v3",
        lambda c: with_dense(c, activation="gelu"),
        "no form for dense layers with biases or an activation",
    ),
    ("moonlight", lambda c: changed(c, scale=0.5), "a form for scores scaled by 0.5, only by 1 / sqrt"),
    (
        "deepseek-v3",
        lambda c: with_experts(c, lambda e: replace(e, shared_hidden_dim=21)),
        r"\(21\) that is no",
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *BOTH,
        (
            "deepseek-v3",
            lambda c: with_experts(c, lambda e: replace(e, selection_bias=False)),
            "config.json of deepseek_v3 has a form only for sigmoid routing with a selection bias",
        ),
        (
            "deepseek-v2",
            lambda c: with_experts(c, lambda e: replace(e, routing=replace(e.routing, normalized=True))),
            "config.json of deepseek_v2 has a form only for softmax routing",
        ),
    ],
)
def test_what_config_json_cannot_say(name: str, change: Callable[[ModelConfig], ModelConfig], message: str) -> None:
    config, weights = translated(name)
    with pytest.raises(ConfigError, match=message):
        families.to_hf(change(config), weights)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *BOTH,
        ("deepseek-v3-halves", lambda c: c, "only where mscale and mscale_all_dim are equal, and not 0"),
        ("deepseek-v3", lambda c: with_rope(c, scaling=RAGGED), "no form for yarn with truncate = false"),
        (
            "moonlight",
            lambda c: with_rope(c, scaling=LLAMA3),
            "no form for this rope scaling in the architecture deeps",
        ),
        (
            "deepseek-v2",
            lambda c: with_experts(c, lambda e: replace(e, routing=replace(e.routing, group_score="top2"))),
            "no form for experts with group_score = 'top2'",
        ),
    ],
)
def test_what_gguf_cannot_say(name: str, change: Callable[[ModelConfig], ModelConfig], message: str) -> None:
    config, weights = translated(name)
    with pytest.raises(ConfigError, match=message):
        families.to_gguf(change(config), weights)
