"""SmolLM3: Llama without rotation in every fourth layer."""

from __future__ import annotations

from dataclasses import replace

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from dapji.models.families.family import (
    GGUF_IGNORABLE,
    HF_IGNORABLE,
    Family,
    GgufFacts,
    Sizes,
    require_gguf_activation,
    sizes_from_gguf,
    sizes_from_hf,
    sizes_to_gguf,
    sizes_to_hf,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF_INTERLEAVED, HF
from dapji.models.families.patterns import all_but_every, rotated_from_hf

_STEP = 4
"""GGUF says nothing of the layers without rotation: they are every fourth, counted from 1."""


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields.assuming({"tie_word_embeddings": True, "rope_theta": 2_000_000.0}))
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        fields.require(key, False)
    rotated = rotated_from_hf(fields, sizes.n_layers)
    fields.finish((*HF_IGNORABLE, "layer_types", "sliding_window", "max_window_layers"))
    return _model(sizes, rotated)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward, rotated = _parts(config)
    written = sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation)
    return written | {"no_rope_layers": [int(flag) for flag in rotated]}


def _from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    sizes = sizes_from_gguf(fields, facts)
    fields.finish(GGUF_IGNORABLE)
    return _model(sizes, all_but_every(_STEP, sizes.n_layers))


def _to_gguf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward, rotated = _parts(config)
    if rotated != all_but_every(_STEP, config.n_layers):
        raise ConfigError(f"GGUF has no form for layers without rotation other than every {_STEP}th in smollm3")
    require_gguf_activation(feed_forward.activation)
    assert attention.rope is not None
    return sizes_to_gguf(config, attention, attention.rope, feed_forward.hidden_dim)


def _model(sizes: Sizes, rotated: list[bool]) -> ModelConfig:
    layer = sizes.layer()
    still = replace(layer, attention=replace(sizes.attention, rope=None))
    return sizes.model("smollm3", tuple(layer if flag else still for flag in rotated))


def _parts(config: ModelConfig) -> tuple[AttentionConfig, FeedForwardConfig, list[bool]]:
    """Attention of the layers with a rope, feed-forward of all, and which layers have one."""
    rotated = [layer.attention.rope is not None for layer in config.layers]
    if not any(rotated):
        raise ConfigError("smollm3 has no form for a model without any rotation")
    first = config.layers[rotated.index(True)]
    attention, feed_forward = first.attention, first.feed_forward
    assert isinstance(attention, AttentionConfig)
    assert isinstance(feed_forward, FeedForwardConfig)
    still = replace(first, attention=replace(attention, rope=None))
    for i, layer in enumerate(config.layers):
        if layer != (first if rotated[i] else still):
            raise ConfigError(f"smollm3 has no form for layers that differ but in rotation: {i}")
    if attention.qkv_bias or attention.out_bias or feed_forward.bias or attention.window is not None:
        raise ConfigError("smollm3 has no form for biases and windows")
    return attention, feed_forward, rotated


SMOLLM3 = Family(
    name="smollm3",
    models="SmolLM3",
    licence="Apache-2.0",
    hf_architecture="SmolLM3ForCausalLM",
    gguf_architecture="smollm3",
    hf=HF,
    gguf=GGUF_INTERLEAVED,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
