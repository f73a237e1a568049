"""What is refused of models of experts, beside `test_family_errors`: each is a ConfigError that says what and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_family_errors import changed
from tiny_models import translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.config import ExpertsConfig, ModelConfig
from dapji.ops.attention import Temperature
from dapji.ops.rope import RopeScaling

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
QWEN3 = {**SIZES, "model_type": "qwen3"}
QWEN3_MOE = {**SIZES, "model_type": "qwen3_moe"}
MIXTRAL = {**SIZES, "model_type": "mixtral"}
LLAMA4 = {**SIZES, "model_type": "llama4_text"}
WHOLE = {"model_type": "llama4", "text_config": LLAMA4, "vision_config": {}, "image_token_index": 9}
YARN = {"rope_type": "yarn", "factor": 4.0}


def test_the_bases_of_these_are_right() -> None:
    for base in (QWEN3, QWEN3_MOE, MIXTRAL, LLAMA4, WHOLE):
        assert families.config_from_hf(base).n_layers == 4


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN3, {"num_experts": 8}, "config.json: unknown key num_experts"),
        (QWEN3, {"attention_bias": 0}, "attention_bias must be true or false, not 0"),
        (QWEN3, {"layer_types": ["full_attention"]}, r"1 layer_types for num_hidden_layers \(4\)"),
        (QWEN3_MOE, {"num_experts": 4}, r"n_experts_per_token \(8\) must be 1 to n_experts \(4\)"),
        (QWEN3_MOE, {"num_experts_per_tok": 0}, r"n_experts_per_token \(0\) must be 1 to n_experts \(128\)"),
        (QWEN3_MOE, {"num_experts": 8, "num_local_experts": 8}, "unknown key num_local_experts"),
        (QWEN3_MOE, {"moe_intermediate_size": 0}, r"hidden_dim \(0\) must be positive"),
        (QWEN3_MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, not 'yes'"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, r"decoder_sparse_step \(0\) must be positive"),
        (QWEN3_MOE, {"mlp_only_layers": [4]}, "mlp_only_layers has 4, but there are 4 layers"),
        (QWEN3_MOE, {"mlp_only_layers": [1.5]}, r"mlp_only_layers must be a list of integers, not \[1.5\]"),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size = 32 is not supported"),
        (QWEN3_MOE, {"qkv_bias": True}, "qkv_bias = True is not supported, only False is"),
        (QWEN3_MOE, {"n_group": 2}, "unknown key n_group"),
        (MIXTRAL, {"attention_bias": True}, "unknown key attention_bias"),
        (MIXTRAL, {"num_experts_per_tok": 9}, r"n_experts_per_token \(9\) must be 1 to n_experts \(8\)"),
        (MIXTRAL, {"sliding_window": 0}, r"window \(0\) must be positive"),
        (LLAMA4, {"no_rope_layers": [1, 1, 0]}, r"3 no_rope_layers for num_hidden_layers \(4\)"),
        (LLAMA4, {"no_rope_layers": [1, 1, 2, 0]}, "no_rope_layers must have 0 and 1, not 2"),
        (LLAMA4, {"no_rope_layer_interval": 0}, r"no_rope_layer_interval \(0\) must be positive"),
        (LLAMA4, {"interleave_moe_layer_step": 0}, r"interleave_moe_layer_step \(0\) must be positive"),
        (LLAMA4, {"moe_layers": [1, -1]}, "moe_layers has -1, but there are 4 layers"),
        (LLAMA4, {"layer_types": ["full_attention"]}, r"1 layer_types for num_hidden_layers \(4\)"),
        (LLAMA4, {"layer_types": ["sliding_attention"] * 4}, "layer_types 'sliding_attention' is not supported"),
        (
            LLAMA4,
            {"layer_types": ["chunked_attention"] * 4, "attention_chunk_size": None},
            "layer_types has chunked_attention, but attention_chunk_size is null",
        ),
        (LLAMA4, {"attention_chunk_size": 0}, r"chunk \(0\) must be positive"),
        (LLAMA4, {"floor_scale": 0}, r"temperature: length \(0\) must be positive"),
        (LLAMA4, {"attn_temperature_tuning": "on"}, "attn_temperature_tuning must be true or false, not 'on'"),
        (LLAMA4, {"rope_scaling": YARN}, "rope scaling yarn beside use_qk_norm is not supported"),
        (LLAMA4, {"num_experts_per_tok": 17}, r"n_experts_per_token \(17\) must be 1 to n_experts \(16\)"),
        (WHOLE, {"text_config": None}, "config.json: text_config is missing"),
        (WHOLE, {"text_config": MIXTRAL}, "text_config: model_type = 'mixtral' is not supported, only 'llama4_text'"),
        (WHOLE, {"audio_config": {}}, "config.json: unknown key audio_config"),
        (WHOLE, {"text_config": {**LLAMA4, "logit_scale": 2.0}}, "config.json: text_config: unknown key logit_scale"),
    ],
)
def test_config_json(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.config_from_hf({**base, **changes})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("qwen3", "model.layers.1.self_attn.q_norm.weight", "missing tensor: model.layers.1.self_attn.q_norm.weight"),
        ("qwen3-moe", "model.layers.1.mlp.experts.7.up_proj.weight", "missing tensor: .*experts.7.up_proj.weight"),
        ("mixtral", "model.layers.2.block_sparse_moe.gate.weight", "missing tensor: .*block_sparse_moe.gate.weight"),
        ("llama-4", "model.layers.0.feed_forward.experts.gate_up_proj", "missing tensor: .*experts.gate_up_proj"),
    ],
)
def test_missing_tensors(name: str, tensor: str, message: str) -> None:
    config_json, named = families.to_hf(*translated(name))
    del named[tensor]
    with pytest.raises(ConfigError, match=message):
        families.from_hf(config_json, named)


def test_experts_that_are_not_turned_are_told_by_their_shape() -> None:
    config_json, named = families.to_hf(*translated("llama-4"))
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    named[name] = named[name].transposed()
    with pytest.raises(ConfigError, match=r"shape \[4, 192, 64\], but the configuration says \[4, 64, 192\]"):
        families.from_hf(config_json, named)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3", {"qwen3.expert_count": 4}, r"experts \(expert_count = 4\) are not supported"),
        ("qwen3-moe", {"qwen3moe.expert_count": None}, "GGUF: qwen3moe.expert_count is missing"),
        ("qwen3-moe", {"qwen3moe.expert_feed_forward_length": None}, "expert_feed_forward_length is missing"),
        ("qwen3-moe", {"qwen3moe.expert_count": 6}, r"ffn_gate_inp.weight has shape \[8, 64\], but .* \[6, 64\]"),
        ("qwen3-moe", {"qwen3moe.expert_weights_norm": False}, "expert_weights_norm = False is not supported"),
        ("qwen3-moe", {"qwen3moe.expert_gating_func": 2}, "expert_gating_func = 2 is not supported, only 1 is"),
        ("qwen3-moe", {"qwen3moe.expert_weights_scale": 2.5}, "expert_weights_scale = 2.5 is not supported"),
        ("qwen3-moe", {"qwen3moe.expert_group_count": 2}, "expert_group_count = 2 is not supported, only 1 is"),
        ("qwen3-moe", {"qwen3moe.expert_shared_count": 1}, "missing 9 tensors: blk.0.ffn_gate_shexp.weight"),
        ("mixtral", {"llama.expert_used_count": 0}, r"n_experts_per_token \(0\) must be 1 to n_experts \(8\)"),
        ("mixtral", {"llama.interleave_moe_layer_step": 2}, "unknown key llama.interleave_moe_layer_step"),
        ("llama-4-16", {"llama4.interleave_moe_layer_step": 0}, r"interleave_moe_layer_step \(0\) must be positive"),
        ("llama-4-16", {"llama4.attention.sliding_window": 0}, "unknown key llama4.attention.sliding_window"),
        ("llama-4-16", {"llama4.expert_gating_func": 1}, "expert_gating_func = 1 is not supported, only 2 is"),
    ],
)
def test_gguf_metadata(name: str, changes: dict[str, Any], message: str) -> None:
    metadata, named = families.to_gguf(*translated(name))
    with pytest.raises(ConfigError, match=message):
        families.from_gguf({**metadata, **changes}, named)


Change = Callable[[ModelConfig], ModelConfig]


def attending(layer: int | None = None, **changes: Any) -> Change:
    return lambda config: changed(config, layer, **changes)


def feeding(layer: int | None = None, **changes: Any) -> Change:
    """Of experts where they have such a value, or else of their routing."""

    def change(config: ModelConfig) -> ModelConfig:
        layers = list(config.layers)
        for i, old in enumerate(layers):
            experts = old.feed_forward
            if layer in (None, i) and isinstance(experts, ExpertsConfig):
                own = {key: value for key, value in changes.items() if hasattr(experts, key)}
                routing = {key: value for key, value in changes.items() if key not in own}
                new = replace(experts, routing=replace(experts.routing, **routing), **own)
                layers[i] = replace(old, feed_forward=new)
        return replace(config, layers=tuple(layers))

    return change


def dense(layer: int) -> Change:
    def change(config: ModelConfig) -> ModelConfig:
        layers = list(config.layers)
        layers[layer] = translated("qwen3-moe-dense-layer")[0].layers[1]
        layers[layer] = replace(config.layers[layer], feed_forward=layers[layer].feed_forward)
        return replace(config, layers=tuple(layers))

    return change


def yarn(config: ModelConfig) -> ModelConfig:
    scaling = RopeScaling(kind="yarn", factor=2.0, original_context=256)
    layers = [
        layer
        if layer.attention.rope is None
        else replace(layer, attention=replace(layer.attention, rope=replace(layer.attention.rope, scaling=scaling)))
        for layer in config.layers
    ]
    return replace(config, layers=tuple(layers))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", attending(qk_norm=None), "qwen3 has normed heads and one attention_bias, but qk_norm is None"),
        ("qwen3", attending(qkv_bias=True), "qkv_bias True and out_bias False"),
        ("qwen3-moe", attending(out_bias=True), "qkv_bias False and out_bias True"),
        ("qwen3-moe", attending(1, window=9), "qwen3_moe has no form for windows in some layers only"),
        ("qwen3-moe", attending(1, n_kv_heads=4), "qwen3_moe has no form for layers that differ: 1 is not as 0"),
        ("qwen3-moe", feeding(score="sigmoid"), "no form for experts with score = 'sigmoid', only 'softmax'"),
        ("qwen3-moe", feeding(scale=2.0), "no form for experts with scale = 2.0, only 1.0"),
        ("qwen3-moe", feeding(shared_hidden_dim=8), "no form for experts with shared_hidden_dim = 8, only 0"),
        ("qwen3-moe", feeding(selection_bias=True), "no form for experts with selection_bias = True, only False"),
        ("qwen3-moe", feeding(1, hidden_dim=8), "qwen3_moe has no form for feed-forwards of several sizes or kinds"),
        ("mixtral", feeding(normalized=False), "mixtral has no form for experts with normalized = False, only True"),
        ("mixtral", attending(qkv_bias=True), "config.json of mixtral has no form for biases"),
        ("mixtral", dense(1), "config.json of mixtral has no form for dense layers beside those of experts"),
        ("llama-4", attending(1, chunk=9), "no form for the attention of layer 1 beside that of the others"),
        ("llama-4", attending(1, qk_norm="weighted"), "no form for the attention of layer 1 beside that of the others"),
        ("llama-4", attending(0, temperature=Temperature(scale=0.1, length=9)), "no form for the attention of layer"),
        ("llama-4", attending(rope=None), "no form for a model without rotated layers"),
        ("llama-4", attending(out_bias=True), "qkv_bias is False and out_bias is True"),
        ("llama-4", feeding(weighs="output"), "no form for experts with weighs = 'output', only 'input'"),
        ("llama-4", feeding(shared_hidden_dim=0), "no form for experts with shared_hidden_dim = 0, only 96"),
        ("llama-4", yarn, "rope scaling yarn beside use_qk_norm is not supported"),
    ],
)
def test_what_config_json_cannot_say(name: str, change: Change, message: str) -> None:
    config, tensors = translated(name)
    with pytest.raises(ConfigError, match=message):
        families.to_hf(change(config), tensors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", attending(qkv_bias=True, out_bias=True), "no form for a bias of o .attention_bias. in .* qwen3$"),
        ("qwen3-moe", feeding(normalized=False), "GGUF has no form for experts with normalized = False, only True"),
        ("qwen3-moe", feeding(activation="gelu"), "GGUF has no form for experts with activation = 'gelu'"),
        (
            "qwen3-moe",
            feeding(shared_hidden_dim=64),
            "GGUF has no form for experts with shared_hidden_dim = 64, only 0",
        ),
        ("qwen3-moe", dense(2), "no form for dense layers beside those of experts in the architecture qwen3moe"),
        ("qwen3-moe", attending(window=9), "no form for a window or for heads that are not rotated in .* qwen3moe"),
        ("mixtral", feeding(score="sigmoid"), "GGUF has no form for experts with score = 'sigmoid', only 'softmax'"),
        ("mixtral", feeding(activation="gelu"), "the activation gelu is not supported, only silu is"),
        ("mixtral", attending(rope=None), "GGUF has no form for heads that are not rotated"),
        (
            "llama-4-16",
            attending(3, chunk=8192),
            r"llama4 for chunks = \[True, True, True, True\], only \[True, True, T",
        ),
        ("llama-4-16", attending(3, temperature=None), "for temperature = None, only Temperature"),
        ("llama-4-128", feeding(n_experts=64), "for use_qk_norm with 64 experts = False, only True"),
        ("llama-4-16", dense(2), r"experts in the layers \[0, 1, 3\], which do not follow at equal distance"),
    ],
)
def test_what_gguf_cannot_say(name: str, change: Change, message: str) -> None:
    config, tensors = translated(name)
    with pytest.raises(ConfigError, match=message):
        families.to_gguf(change(config), tensors)
