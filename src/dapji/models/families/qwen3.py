"""Qwen 3: Qwen 2 with normed heads in place of biases. What its dense models and those of experts share is here too."""

from __future__ import annotations

from dataclasses import replace

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, LayerConfig, ModelConfig
from dapji.models.families.family import (
    HF_IGNORABLE,
    Family,
    GgufFacts,
    Sizes,
    config_from_gguf,
    config_to_gguf,
    sizes_from_hf,
    sizes_to_hf,
    uniform_layer,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF, HF
from dapji.models.families.qwen2 import layer_windows, layer_windows_to_hf


def attention_from_hf(fields: Fields, sizes: Sizes) -> AttentionConfig:
    bias = fields.boolean("attention_bias", False)
    return replace(sizes.attention, qk_norm="weighted", qkv_bias=bias, out_bias=bias)


def attention_to_hf(attention: AttentionConfig, family: str) -> dict[str, object]:
    """The inverse."""
    if attention.qk_norm != "weighted" or attention.qkv_bias != attention.out_bias:
        raise ConfigError(
            f"config.json of {family} has normed heads and one attention_bias, but qk_norm is {attention.qk_norm}, "
            f"qkv_bias {attention.qkv_bias} and out_bias {attention.out_bias}"
        )
    return {"attention_bias": attention.qkv_bias}


def check_gguf_biases(attention: AttentionConfig, architecture: str) -> None:
    """llama.cpp reads no bias of o in these architectures."""
    if attention.out_bias:
        raise ConfigError(f"GGUF has no form for a bias of o (attention_bias) in the architecture {architecture}")


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields.assuming({"num_key_value_heads": 32, "head_dim": 128}))
    attention = attention_from_hf(fields, sizes)
    every = layer_windows(fields, sizes.n_layers)
    fields.finish(HF_IGNORABLE)
    return sizes.model(
        "qwen3",
        tuple(
            LayerConfig(attention=replace(attention, window=window), feed_forward=sizes.feed_forward)
            for window in every
        ),
    )


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = uniform_layer(config)
    return {
        **sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation),
        **attention_to_hf(attention, config.family),
        **layer_windows_to_hf(config),
    }


def _from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    config = config_from_gguf("qwen3", fields, facts)
    attention, _ = uniform_layer(config)
    normed = replace(attention, qk_norm="weighted")
    return replace(config, layers=tuple(replace(layer, attention=normed) for layer in config.layers))


def _to_gguf(config: ModelConfig) -> dict[str, object]:
    attention, _ = uniform_layer(config)
    check_gguf_biases(attention, "qwen3")
    return config_to_gguf(config)


QWEN3 = Family(
    name="qwen3",
    models="Qwen 3, dense",
    licence="Apache-2.0",
    hf_architecture="Qwen3ForCausalLM",
    gguf_architecture="qwen3",
    hf=HF,
    gguf=GGUF,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
