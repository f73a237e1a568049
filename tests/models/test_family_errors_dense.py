"""What EXAONE, Gemma and Phi refuse: everything that their formats or their models do not have."""

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
from dapji.models.config import ModelConfig
from dapji.ops.rope import RopeConfig, RopeScaling
from dapji.ops.tensor import Tensor

LINEAR = RopeScaling(kind="linear", factor=2.0, original_context=512)


def exaone() -> dict[str, Any]:
    return {
        "model_type": "exaone",
        "activation_function": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_layers": 2,
        "vocab_size": 96,
        "max_position_embeddings": 512,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, "config.json: num_layers is missing"),
        ({"num_hidden_layers": 2}, "config.json: unknown key num_hidden_layers"),
        ({"activation_function": "relu"}, "activation_function 'relu' is not supported\nhint: supported: gelu"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be a finite number, not 'small'"),
        ({"attention_bias": True}, "unknown key attention_bias"),
    ],
)
def test_config_json_of_exaone(changes: dict[str, Any], message: str) -> None:
    assert families.config_from_hf(exaone()).n_layers == 2
    with pytest.raises(ConfigError, match=message):
        families.config_from_hf({**exaone(), **changes})


FULL_3 = ["full_attention"] * 3


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "exaone4",
            {"layer_types": ["sliding_attention", *FULL_3[:2]]},
            "has sliding_attention, but sliding_window is",
        ),
        ("exaone4", {"layer_types": FULL_3 * 2}, r"6 layer_types for num_hidden_layers \(3\)"),
        ("exaone4", {"layer_types": [*FULL_3[:2], "linear"]}, "layer_types 'linear' is not supported"),
        (
            "exaone4-hybrid",
            {"layer_types": None, "sliding_window_pattern": "LXG"},
            "sliding_window_pattern 'LXG' is not supported, only L and G are",
        ),
        (
            "exaone4-hybrid",
            {"layer_types": None, "sliding_window_pattern": 0},
            r"sliding_window_pattern \(0\) must be positive",
        ),
        ("exaone4-hybrid", {"sliding_window": 0}, r"window \(0\) must be positive"),
        ("gemma2", {"attention_bias": True}, "attention_bias = True is not supported, only False is"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act = 'silu' is not supported, only 'gelu_pytorch_tanh' is"),
        ("gemma2", {"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar \(0.0\) must be positive"),
        ("gemma2", {"sliding_window": None}, "layers of sliding_attention need a sliding_window"),
        ("gemma2", {"sliding_window_size": 7}, "sliding_window_size = 7 is not supported, only 24 is"),
        ("gemma2", {"attn_logit_softcapping": -1}, r"softcap \(-1.0\) must be positive"),
        ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping must be a finite number, not '30'"),
        ("gemma2", {"rope_local_base_freq": 1e4}, "unknown key rope_local_base_freq"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters: unknown key rope_theta"),
        ("gemma3", {"rope_parameters": {"full_attention": {}}}, "rope_parameters: sliding_attention is missing"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": -2}, r"sliding_window_pattern \(-2\) must be pos"),
        ("phi3", {"mlp_bias": True}, "mlp_bias = True is not supported, only False is"),
        ("phi3", {"interpolate_factor": 2}, "interpolate_factor = 2 is not supported, only 1 is"),
        ("phi3", {"partial_rotary_factor": 0.32}, r"rope: dim \(5\) must be even"),
        ("phi3", {"partial_rotary_factor": 1.5}, r"rope.dim \(24\) must be at most head_dim \(16\)"),
        ("phi3-longrope", {"partial_rotary_factor": 0.5}, r"rope: 8 short_factors for dim/2 \(4\)"),
        ("phi3-longrope", {"original_max_position_embeddings": 1}, r"original_context \(1\) must be at least 2"),
        ("phi3-longrope", {"original_max_position_embeddings": 0}, r"original_context \(0\) must be at least 2"),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}, r"3 no_rope_layers for num_hidden_layers \(5\)"),
        ("smollm3", {"no_rope_layers": [1, 1, 2, 0, 1]}, "no_rope_layers must have 0 and 1, not 2"),
        ("smollm3", {"no_rope_layer_interval": 0}, r"no_rope_layer_interval \(0\) must be positive"),
    ],
)
def test_config_json(name: str, changes: dict[str, Any], message: str) -> None:
    config_json, _ = families.to_hf(*translated(name))
    with pytest.raises(ConfigError, match=message):
        families.config_from_hf({**config_json, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_factor": None}, "rope_scaling: short_factor is missing"),
        ({"long_factor": 2.0}, "long_factor must be a list of finite numbers, not 2.0"),
        ({"long_factor": [True] * 8}, "long_factor must be a list of finite numbers"),
        ({"long_factor": [1.0] * 7}, r"rope: 7 long_factors for dim/2 \(8\)"),
        ({"short_factor": [0.0] * 8}, "short_factors must be positive and finite, not 0.0"),
        ({"factor": 0.5}, r"rope scaling longrope: factor \(0.5\) must be at least 1"),
        ({"attention_factor": -1.0}, r"attention_factor \(-1.0\) must be positive"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings = 64 is not supported, only 32"),
        ({"low_freq_factor": 1.0}, "rope_scaling: unknown key low_freq_factor"),
    ],
)
def test_longrope(changes: dict[str, Any], message: str) -> None:
    config_json, _ = families.to_hf(*translated("phi3-longrope"))
    scaling = config_json["rope_scaling"]
    assert isinstance(scaling, dict)
    with pytest.raises(ConfigError, match=message):
        families.config_from_hf({**config_json, "rope_scaling": {**scaling, **changes}})


def test_the_first_name_of_longrope() -> None:
    config_json, _ = families.to_hf(*translated("phi3-longrope"))
    scaling = config_json["rope_scaling"]
    assert isinstance(scaling, dict)
    su = {**config_json, "rope_scaling": {**scaling, "type": "su"}}
    assert families.config_from_hf(su) == translated("phi3-longrope")[0]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "exaone4-hybrid",
            {"exaone4.attention.sliding_window_pattern": np.array([True, False])},
            r"sliding_window_pattern has 2 values for block_count \(5\)",
        ),
        (
            "exaone4-hybrid",
            {"exaone4.attention.sliding_window_pattern": np.array([1, 0], dtype=np.int32)},
            "sliding_window_pattern must be a list of true and false",
        ),
        ("exaone4", {"exaone4.attention.sliding_window_pattern": 4}, "unknown key exaone4.attention.sliding_window_p"),
        ("gemma2", {"gemma2.rope.freq_base_swa": 1e4}, "unknown key gemma2.rope.freq_base_swa"),
        ("gemma2", {"gemma2.attn_logit_softcapping": 0.0}, r"softcap \(0.0\) must be positive"),
        ("gemma3", {"gemma3.attn_logit_softcapping": 50.0}, "unknown key gemma3.attn_logit_softcapping"),
        ("phi3", {"phi3.rope.scaling.type": "longrope"}, "missing tensor: rope_factors_long.weight"),
        ("phi3", {"phi3.rope.scaling.attn_factor": 1.2}, "unknown key phi3.rope.scaling.attn_factor"),
    ],
)
def test_gguf_metadata(name: str, changes: dict[str, Any], message: str) -> None:
    metadata, named = families.to_gguf(*translated(name))
    with pytest.raises(ConfigError, match=message):
        families.from_gguf({**metadata, **changes}, named)


Tensors = dict[str, Tensor]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("exaone4", lambda t: t.update({"blk.0.attn_norm.weight": floats(64)}), "unexpected tensor: blk.0.attn_norm"),
        ("gemma2", lambda t: t.update({"rope_freqs.weight": floats(12)}), "rope_freqs.weight is not supported in the"),
        ("gemma3", lambda t: t.pop("blk.2.post_ffw_norm.weight"), "missing tensor: blk.2.post_ffw_norm.weight"),
        ("phi3", lambda t: t.update({"blk.0.attn_qkv.weight": floats(96, 64)}), r"says \[192, 64\]"),
        ("phi3-longrope", lambda t: t.pop("rope_factors_short.weight"), "missing tensor: rope_factors_short.weight"),
        ("phi3-longrope", lambda t: t.update({"rope_freqs.weight": floats(8)}), "rope_freqs.weight is not supported"),
    ],
)
def test_gguf_tensors(name: str, change: Callable[[Tensors], Any], message: str) -> None:
    metadata, named = families.to_gguf(*translated(name))
    change(named)
    with pytest.raises(ConfigError, match=message):
        families.from_gguf(metadata, named)


def with_activation(config: ModelConfig, activation: Any) -> ModelConfig:
    layers = [
        replace(layer, feed_forward=replace(layer.feed_forward, activation=activation)) for layer in config.layers
    ]
    return replace(config, layers=tuple(layers))


THETA = RopeConfig(theta=3e4, dim=24)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("exaone4-hybrid", lambda c: changed(c, 1, window=9), "no form for layers that differ: 1 is not as 0"),
        ("exaone4-hybrid", lambda c: changed(c, 3, n_heads=2), "differ in more than window and rope"),
        ("exaone4-hybrid", lambda c: changed(c, rope=c.layers[0].attention.rope), "rotates all layers, or in a model"),
        ("exaone4", lambda c: changed(c, rope=None), "exaone4 rotates all layers, or in a model with windows"),
        ("gemma2", lambda c: replace(c, embed_scale=1.0), "gemma2 scales embeddings by sqrt.dim., not by 1.0"),
        ("gemma2", lambda c: changed(c, 1, rope=THETA), "no form for layers that differ: 3 is not as 1"),
        ("gemma2", lambda c: changed(changed(c, 1, rope=THETA), 3, rope=THETA), "gemma2 rotates layers with a window"),
        ("gemma3", lambda c: changed(c, 5, rope=None), "gemma3_text has no form for heads that are not rotated"),
        ("phi3", lambda c: changed(c, qkv_bias=True), "phi3 has no form for biases"),
        ("phi3", lambda c: changed(c, 1, window=9), "phi3 has no form for windows in some layers only"),
    ],
)
def test_what_neither_form_can_say(name: str, change: Callable[[ModelConfig], ModelConfig], message: str) -> None:
    config, tensors = translated(name)
    for write in (families.to_hf, families.to_gguf):
        with pytest.raises(ConfigError, match=message):
            write(change(config), tensors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("exaone4", lambda c: with_activation(c, "gelu"), "the activation gelu is not supported, only silu is"),
        ("gemma2", lambda c: with_activation(c, "silu"), "the activation silu is not supported, only gelu_tanh is"),
        ("gemma2", lambda c: replace(c, tied_head=False), "no form for a head of its own in gemma2"),
        ("gemma2", lambda c: replace(c, logit_softcap=None), "softcaps of scores and of logits, not 2.0 and None"),
        ("gemma2", lambda c: changed(c, scale=0.5), "no form for scores scaled by 0.5 in a gemma2 of 4 layers"),
        ("gemma3", lambda c: changed(c, softcap=9.0), "no form for a softcap of scores in gemma3"),
        ("phi3", lambda c: with_activation(c, "gelu"), "the activation gelu is not supported, only silu is"),
    ],
)
def test_what_gguf_cannot_say(name: str, change: Callable[[ModelConfig], ModelConfig], message: str) -> None:
    config, tensors = translated(name)
    families.to_hf(change(config), {**tensors, "head": tensors["embed"]})
    with pytest.raises(ConfigError, match=message):
        families.to_gguf(change(config), tensors)


def test_scaled_ropes_of_gemma_3_are_those_of_layers_without_a_window() -> None:
    config, tensors = translated("gemma3")
    local = replace(config.layers[0].attention.rope, scaling=LINEAR)
    layers = [
        replace(layer, attention=replace(layer.attention, rope=local)) if layer.attention.window else layer
        for layer in config.layers
    ]
    with pytest.raises(ConfigError, match="gemma3_text has no form for a scaled rope in layers with a window"):
        families.to_hf(replace(config, layers=tuple(layers)), tensors)
    with pytest.raises(ConfigError, match="GGUF has no form for a scaled rope in layers with a window in gemma3"):
        families.to_gguf(replace(config, layers=tuple(layers)), tensors)
