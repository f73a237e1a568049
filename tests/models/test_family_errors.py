"""What a foreign configuration or its tensors can have wrong: each is a ConfigError that says what and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from dapji.ops.formats import FORMATS
from dapji.ops.rope import RopeConfig, RopeScaling
from dapji.ops.tensor import Tensor

HF = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "config.json: model_type is missing"),
        ({"model_type": "gpt2"}, "config.json: model_type 'gpt2' is not supported\nhint: supported: "),
        ({"sliding_window": 8}, "config.json: unknown key sliding_window\nhint: an unknown key may change"),
        ({"a": 1, "b": 2}, "config.json: unknown keys a, b"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": "64"}, "config.json: hidden_size must be an integer, not '64'"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer, not 64.0"),
        ({"hidden_size": True}, "hidden_size must be an integer, not True"),
        ({"hidden_size": 66}, r"hidden size \(66\) must be divisible by the number of heads \(4\)"),
        ({"hidden_size": 0}, r"rope: dim \(0\) must be even"),
        ({"num_attention_heads": 0}, r"hidden size \(64\) must be divisible by the number of heads \(0\)"),
        ({"num_key_value_heads": 3}, r"n_heads \(4\) must be divisible by n_kv_heads \(3\)"),
        ({"num_key_value_heads": 0}, r"n_kv_heads \(0\) must be positive"),
        ({"num_hidden_layers": 0}, r"n_layers \(0\) must be 1 to 4096"),
        ({"num_hidden_layers": 5000}, r"n_layers \(5000\) must be 1 to 4096"),
        ({"intermediate_size": -1}, r"hidden_dim \(-1\) must be positive"),
        ({"vocab_size": 0}, r"vocab_size \(0\) must be positive"),
        ({"max_position_embeddings": 0}, r"max_context \(0\) must be positive"),
        ({"rms_norm_eps": -1.0}, r"norm_eps \(-1.0\) must not be negative"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, not nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a finite number, not '1e-5'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported\nhint: supported: gelu"),
        ({"hidden_act": 3}, "hidden_act must be a string, not 3"),
        ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        ({"head_dim": 17}, r"rope: dim \(17\) must be even"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported, only 1.0 is"),
        ({"rope_interleaved": True}, "rope_interleaved = True is not supported, only False is"),
        ({"rope_theta": 1.0}, r"rope: theta \(1.0\) must be greater than 1"),
        ({"rope_scaling": 8}, "rope_scaling must be an object, not 8"),
        ({"rope_scaling": YARN, "rope_parameters": YARN}, "rope_parameters and rope_scaling exclude each other"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: short_factor is missing"),
        ({"rope_scaling": {"type": "mrope"}}, "config.json: rope_scaling: type 'mrope' is not supported"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "type = 'linear' is not supported, only 'yarn' is"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, r"rope scaling yarn: factor \(0.5\) must be at least 1"),
        (
            {"rope_scaling": {**YARN, "factor": -1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
            r"rope scaling yarn: factor \(-1.0\) must be at least 1",
        ),
        ({"rope_scaling": {**YARN, "extrapolation_factor": 1.0}}, "rope_scaling: unknown key extrapolation_factor"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, r"attention_factor \(0.0\) must be positive"),
        ({"rope_scaling": {**YARN, "beta_slow": 64}}, r"beta_slow \(64.0\) must be positive and at most beta_fast"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, r"original_context \(0\) must be positive"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, r"low_frequency_factor \(1.0\) must be positive and"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope_scaling: low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "dynamic scaling needs a dim"),
        ({"model_type": "mistral", "attention_bias": True}, "unknown key attention_bias"),
        ({"model_type": "mistral", "sliding_window": 0}, r"window \(0\) must be positive"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope = True is not supported, only False is"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, r"1 layer_types for num_hidden_layers \(2\)"),
        ({"model_type": "qwen2", "layer_types": "full"}, "layer_types must be a list of strings, not 'full'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "linear"]}, "layer_types 'linear' is not supported"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has sliding_attention, but use_sliding_window is false",
        ),
        (
            {"model_type": "qwen2", "dual_chunk_attention_config": {"chunk_size": 64}},
            "dual_chunk_attention_config: original_max_position_embeddings is missing",
        ),
    ],
)
def test_config_json(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.config_from_hf({**HF, **changes})


def test_the_base_of_these_is_right() -> None:
    for model_type in ("llama", "mistral", "qwen2"):
        assert families.config_from_hf({**HF, "model_type": model_type}).n_layers == 2
    for scaling in (YARN, LLAMA3):
        families.config_from_hf({**HF, "rope_scaling": scaling})


Tensors = dict[str, Tensor]


def floats(*shape: int) -> Tensor:
    return Tensor.from_float32("given", np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensor: model.norm.weight"),
        (
            lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)],
            r"missing 3 tensors: model.layers.0.mlp.up_proj.weight, model",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:10]], "missing 10 tensors: .* and 2 more"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": floats(24)}),
            "unexpected tensor: model.layers.0.self_attn.q_norm.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": floats(96)}),
            "unexpected tensor: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({"model.layers.2.self_attn.k_proj.weight": floats(64, 48)}),
            r"model.layers.2.self_attn.k_proj.weight has shape \[64, 48\], but the configuration says \[48, 64\]",
        ),
        (lambda t: t.update({"model.norm.weight": floats(1, 64)}), r"has shape \[1, 64\], .* says \[64\]"),
    ],
)
def test_tensors_of_huggingface(change: Callable[[Tensors], Any], message: str) -> None:
    config, tensors = translated("llama-head-dim")
    config_json, named = families.to_hf(config, tensors)
    change(named)
    with pytest.raises(ConfigError, match=message):
        families.from_hf(config_json, named)


def gguf_of(name: str) -> tuple[dict[str, Any], Tensors]:
    return families.to_gguf(*translated(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": None}, "GGUF: general.architecture is missing"),
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported\nhint: supported: "),
        ({"llama.block_count": None}, "GGUF: llama.block_count is missing"),
        ({"llama.block_count": 1 << 40}, r"n_layers \(1099511627776\) must be 1 to 4096"),
        ({"llama.block_count": 4}, "missing 9 tensors: blk.3.attn_norm.weight"),
        ({"llama.block_count": 2}, "unexpected 9 tensors: blk.2.attn_k.weight"),
        ({"llama.vocab_size": 97}, "GGUF: llama.vocab_size = 97 is not supported, only 96 is"),
        ({"llama.embedding_length": 48}, r"token_embd.weight has shape \[96, 64\], but the .* says \[96, 48\]"),
        ({"llama.attention.head_count": 0, "llama.attention.key_length": None}, "must be divisible by the number of"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, r"head_count_kv must be an integer, not \[2, 2, 2\]"),
        ({"llama.attention.value_length": 8}, "value_length = 8 is not supported, only 16 is"),
        ({"llama.attention.causal": False}, "attention.causal = False is not supported, only True is"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.attention.sliding_window": 7.5}, "sliding_window must be an integer, not 7.5"),
        ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
        ({"llama.logit_scale": 2.0}, "GGUF: unknown key llama.logit_scale"),
        ({"llama.rope.dimension_count": 32}, r"rope: 8 frequency_factors for dim/2 \(16\)"),
        ({"llama.rope.scaling.type": "longrope"}, "missing tensor: rope_factors_long.weight"),
        ({"llama.rope.scaling.type": "yarn"}, "rope: frequency_factors and scaling .yarn. exclude each other"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier = 0.1 is not supported, only 0.0 is"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5 is not supported, only 1.0 is"),
    ],
)
def test_gguf_metadata(changes: dict[str, Any], message: str) -> None:
    metadata, named = gguf_of("llama-3.1")
    with pytest.raises(ConfigError, match=message):
        families.from_gguf({**metadata, **changes}, named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("token_embd.weight"), "missing tensor: token_embd.weight"),
        (lambda t: t.pop("blk.1.ffn_up.weight"), "missing tensor: blk.1.ffn_up.weight"),
        (lambda t: t.update({"blk.0.attn_q_norm.weight": floats(16)}), "unexpected tensor: blk.0.attn_q_norm.weight"),
        (lambda t: t.update({"blk.0.attn_v.bias": floats(32)}), "unexpected tensor: blk.0.attn_v.bias"),
        (lambda t: t.update({"blk.0.attn_v.weight": floats(32)}), r"attn_v.weight has shape \[32\], but .* \[32, 64\]"),
        (lambda t: t.update({"rope_freqs.weight": floats(8)}), "frequency_factors must be positive and finite, not 0"),
        (
            lambda t: t.update({"rope_freqs.weight": Tensor.from_float32("", np.full(8, np.nan, dtype=np.float32))}),
            "frequency_factors must be positive and finite, not nan",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": Tensor.from_float32("", np.ones(7, dtype=np.float32))}),
            r"rope: 7 frequency_factors for dim/2 \(8\)",
        ),
    ],
)
def test_gguf_tensors(change: Callable[[Tensors], Any], message: str) -> None:
    metadata, named = gguf_of("llama-3.1")
    change(named)
    with pytest.raises(ConfigError, match=message):
        families.from_gguf(metadata, named)


def test_no_more_of_a_head_is_rotated_than_there_is() -> None:
    metadata, named = gguf_of("llama-2")
    with pytest.raises(ConfigError, match=r"rope.dim \(32\) must be at most head_dim \(16\)"):
        families.from_gguf({**metadata, "llama.rope.dimension_count": 32}, named)


def test_qwen2_has_no_frequency_factors_in_gguf() -> None:
    metadata, named = gguf_of("qwen2")
    named["rope_freqs.weight"] = floats(8)
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is not supported in the architecture qwen2"):
        families.from_gguf(metadata, named)


def test_a_quantised_bias_is_refused_where_it_would_be_permuted() -> None:
    metadata, named = gguf_of("llama-bias")
    data = np.zeros((1, FORMATS["Q8_0"].row_bytes(64)), dtype=np.uint8)
    named["blk.0.attn_q.bias"] = Tensor(name="blk.0.attn_q.bias", format=FORMATS["Q8_0"], shape=(64,), source=data)
    with pytest.raises(ConfigError, match=r"blk.0.attn_q.bias: the format Q8_0 is not supported for a bias"):
        families.from_gguf(metadata, named)


def changed(config: ModelConfig, layer: int | None = None, **attention: Any) -> ModelConfig:
    """With other values of attention, in one layer or in all."""
    layers = [
        replace(old, attention=replace(old.attention, **attention)) if layer in (None, i) else old
        for i, old in enumerate(config.layers)
    ]
    return replace(config, layers=tuple(layers))


def with_rope(config: ModelConfig, **rope: Any) -> ModelConfig:
    old = config.layers[0].attention.rope
    assert old is not None
    return changed(config, rope=replace(old, **rope))


def with_feed_forward(config: ModelConfig, **values: Any) -> ModelConfig:
    return replace(
        config,
        layers=tuple(replace(layer, feed_forward=replace(layer.feed_forward, **values)) for layer in config.layers),
    )


DYNAMIC = RopeScaling(kind="dynamic", factor=2.0, original_context=100)
LINEAR = RopeScaling(kind="linear", factor=2.0, original_context=512)
RAGGED_YARN = RopeScaling(kind="yarn", factor=2.0, original_context=256, truncate=False)
FACTORS = (1.0,) * 7 + (2.0,)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-2", lambda c: changed(c, rope=None), "no form for heads that are not rotated as a whole"),
        ("llama-2", lambda c: with_rope(c, dim=8), "no form for heads that are not rotated as a whole"),
        ("llama-2", lambda c: changed(c, 1, n_kv_heads=4), "llama has no form for layers that differ: 1 is not as 0"),
        ("llama-2", lambda c: changed(c, qkv_bias=True), "qkv_bias is True and out_bias is False"),
        ("llama-2", lambda c: with_rope(c, frequency_factors=FACTORS), "no form for explicit rope frequency factors"),
        ("llama-2", lambda c: with_rope(c, scaling=DYNAMIC), r"\(100\) by factor \(2.0\) does not give max_context"),
        ("llama-2", lambda c: changed(c, window=8), "config.json of llama has no form for a window"),
        ("mistral", lambda c: changed(c, qkv_bias=True), "config.json of mistral has no form for biases"),
        ("mistral", lambda c: changed(c, 1, window=9), "mistral has no form for windows in some layers only"),
        ("qwen2", lambda c: changed(c, qkv_bias=False), "qwen2 has biases on q, k and v, and no form for others"),
        ("qwen2-window", lambda c: changed(c, 1, window=9), r"qwen2 has one sliding_window, not \[9, 24\]"),
        ("smollm3", lambda c: changed(c, rope=None), "no form for a model without any rotation"),
        ("smollm3", lambda c: changed(c, qkv_bias=True), "smollm3 has no form for biases and windows"),
        ("smollm3", lambda c: changed(c, 1, n_kv_heads=4), "layers that differ but in rotation: 1"),
    ],
)
def test_what_config_json_cannot_say(name: str, change: Callable[[ModelConfig], ModelConfig], message: str) -> None:
    config, tensors = translated(name)
    with pytest.raises(ConfigError, match=message):
        families.to_hf(change(config), tensors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2-window", lambda c: c, "GGUF has no form for windows in some layers only"),
        ("llama-gelu", lambda c: c, "the activation gelu is not supported, only silu is"),
        ("llama-2", lambda c: changed(c, rope=None), "GGUF has no form for heads that are not rotated"),
        ("llama-2", lambda c: with_rope(c, scaling=DYNAMIC), "GGUF has no form for dynamic rope scaling"),
        ("llama-2", lambda c: with_rope(c, scaling=RAGGED_YARN), "GGUF has no form for yarn with truncate = false"),
        ("llama-2", lambda c: changed(c, 2, out_bias=True), "no form for layers that differ: 2 is not as 0"),
        (
            "qwen2",
            lambda c: with_rope(c, frequency_factors=FACTORS),
            "no form for this rope scaling in the architecture qwen2",
        ),
        ("smollm3", lambda c: changed(c, 1, rope=None), "layers without rotation other than every 4th"),
    ],
)
def test_what_gguf_cannot_say(name: str, change: Callable[[ModelConfig], ModelConfig], message: str) -> None:
    config, tensors = translated(name)
    with pytest.raises(ConfigError, match=message):
        families.to_gguf(change(config), tensors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeConfig(theta=1e4, dim=3), r"dim \(3\) must be even"),
        (
            lambda: RopeConfig(theta=1e4, dim=4, scaling=LINEAR, frequency_factors=(1.0, 1.0)),
            r"frequency_factors and scaling \(linear\) exclude each other",
        ),
        (
            lambda: AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=0, rope=None),
            r"head_dim \(0\) must be positive",
        ),
        (
            lambda: ModelConfig(
                family="llama",
                dim=0,
                vocab_size=1,
                max_context=1,
                norm_eps=0.0,
                layers=(
                    LayerConfig(
                        attention=AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=1, rope=None),
                        feed_forward=FeedForwardConfig(hidden_dim=1),
                    ),
                ),
                tied_head=True,
            ),
            r"dim \(0\) must be positive",
        ),
    ],
)
def test_sizes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
