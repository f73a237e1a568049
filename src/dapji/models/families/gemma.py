"""Gemma 2 and the text of Gemma 3: norms before and after, scaled embeddings, GELU, a window in most layers.

Norms multiply by 1 + weight in a Hugging Face folder; GGUF files hold the sum. llama.cpp infers from the number of
layers what its files do not say: in the models of 27B, scores are scaled by dim / n_heads in place of head_dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from dapji.models.families.family import (
    GGUF_IGNORABLE,
    HF_IGNORABLE,
    Family,
    GgufFacts,
    Sizes,
    Wrapper,
    require_gguf_activation,
    sizes_from_gguf,
    sizes_from_hf,
    sizes_to_gguf,
    sizes_to_hf,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF, HF, shifted_norms
from dapji.models.families.patterns import (
    LAYER_TYPES,
    all_but_every,
    limited_from_hf,
    two_kinds,
    windowed_from_gguf,
    windows_to_gguf,
    windows_to_hf,
)
from dapji.models.families.rope import rope_from_hf, rope_of
from dapji.ops.rope import RopeConfig

_NAMES = {"hidden_act": "hidden_activation"}
_PARTS = {
    **HF.parts,
    "attention.post_norm": "post_attention_layernorm",
    "feed_forward.norm": "pre_feedforward_layernorm",
    "feed_forward.post_norm": "post_feedforward_layernorm",
}
_HF = replace(HF, parts=_PARTS)
_HF_SHIFTED = replace(_HF, rules=lambda config: shifted_norms(_HF, config, 1.0))
_GGUF_SHIFTED = replace(GGUF, rules=lambda config: shifted_norms(GGUF, config, 0.0))
_IGNORABLE = (*HF_IGNORABLE, "cache_implementation")
_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}
"""What transformers means by absent keys."""


def _layers(
    sizes: Sizes, attention: AttentionConfig, ropes: tuple[RopeConfig, RopeConfig], window: int | None,
    windowed: list[bool],
) -> tuple[LayerConfig, ...]:  # fmt: skip
    """ropes: of layers without a window, and of those with it."""
    kinds = [replace(attention, window=size, rope=rope) for size, rope in zip((None, window), ropes, strict=True)]
    return tuple(LayerConfig(attention=kinds[kind], feed_forward=sizes.feed_forward, norms="both") for kind in windowed)


def _model(family: str, sizes: Sizes, layers: tuple[LayerConfig, ...], *, offset: float) -> ModelConfig:
    return replace(sizes.model(family, layers), norm_offset=offset, embed_scale=math.sqrt(sizes.dim))


def _attention_from_hf(fields: Fields, sizes: Sizes) -> AttentionConfig:
    fields.require("attention_bias", False)
    fields.require("use_bidirectional_attention", False)
    fields.require("hidden_act", fields.string("hidden_activation"))
    divisor = fields.number("query_pre_attn_scalar")
    if not divisor > 0:
        raise ConfigError(f"config.json: query_pre_attn_scalar ({divisor}) must be positive")
    return replace(sizes.attention, scale=None if divisor == sizes.head_dim else divisor**-0.5)


def _windowed_from_hf(fields: Fields, n_layers: int, period: int) -> tuple[int | None, list[bool]]:
    window = fields.optional_integer("sliding_window", 4096)
    windowed = limited_from_hf(fields, all_but_every(period, n_layers))
    if window is None and any(windowed):
        raise ConfigError("config.json: layers of sliding_attention need a sliding_window")
    if window is not None:  # the same again, in files of Gemma 2
        fields.require("sliding_window_size", window)
    return window, windowed


def _kinds(config: ModelConfig) -> tuple[AttentionConfig, FeedForwardConfig, RopeConfig, RopeConfig]:
    """What the layers share, and the ropes of those without and of those with a window. Raises ConfigError unless the
    model is of the kind that `_model` makes."""
    windowed, full = two_kinds(config)
    layer = full or windowed
    assert layer is not None
    attention, feed_forward = layer.attention, layer.feed_forward
    assert isinstance(attention, AttentionConfig)
    assert isinstance(feed_forward, FeedForwardConfig)
    local = layer.attention if windowed is None else windowed.attention
    assert isinstance(local, AttentionConfig)
    if attention.rope is None or local.rope is None:
        raise ConfigError(f"{config.family} has no form for heads that are not rotated")
    if config.embed_scale != math.sqrt(config.dim):
        raise ConfigError(f"{config.family} scales embeddings by sqrt(dim), not by {config.embed_scale}")
    return attention, feed_forward, attention.rope, local.rope


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward, _, _ = _kinds(config)
    scale = attention.scale
    return {
        **sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation, names=_NAMES),
        **windows_to_hf(config),
        "query_pre_attn_scalar": attention.head_dim if scale is None else _whole(scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _whole(value: float) -> float:
    """An integer where that is what it was before it became a scale."""
    nearest = round(value)
    return nearest if math.isclose(nearest, value, rel_tol=1e-12) else value


def _sizes_from_gguf(fields: Fields, facts: GgufFacts, layers_of_27b: int) -> tuple[Sizes, AttentionConfig]:
    sizes = replace(sizes_from_gguf(fields, facts), activation="gelu_tanh")
    return sizes, replace(sizes.attention, scale=_gguf_scale(sizes.attention, sizes.dim, sizes.n_layers, layers_of_27b))


def _gguf_scale(attention: AttentionConfig, dim: int, n_layers: int, layers_of_27b: int) -> float | None:
    divisor = dim // attention.n_heads
    return None if n_layers != layers_of_27b or divisor == attention.head_dim else divisor**-0.5


def _to_gguf(config: ModelConfig, layers_of_27b: int, period: int) -> dict[str, object]:
    attention, feed_forward, rope, _ = _kinds(config)
    require_gguf_activation(feed_forward.activation, "gelu_tanh")
    expected = _gguf_scale(attention, config.dim, config.n_layers, layers_of_27b)
    if attention.scale != expected:
        raise ConfigError(
            f"GGUF has no form for scores scaled by {attention.scale} in a {config.family} of {config.n_layers} layers"
        )
    return {
        **sizes_to_gguf(config, attention, rope, feed_forward.hidden_dim),
        **windows_to_gguf(config, period),
    }


# ---- Gemma 2 ----

_PERIOD_2, _LAYERS_OF_27B_2 = 2, 46


def _gemma2_from_hf(fields: Fields) -> ModelConfig:
    fields = fields.assuming(_DEFAULTS)
    sizes = sizes_from_hf(fields, names=_NAMES)
    attention = replace(
        _attention_from_hf(fields, sizes), softcap=fields.optional_number("attn_logit_softcapping", 50.0)
    )
    window, windowed = _windowed_from_hf(fields, sizes.n_layers, _PERIOD_2)
    softcap = fields.optional_number("final_logit_softcapping", 30.0)
    fields.finish(_IGNORABLE)
    layers = _layers(sizes, attention, (sizes.rope, sizes.rope), window, windowed)
    return replace(_model("gemma2", sizes, layers, offset=1.0), logit_softcap=softcap)


def _gemma2_from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    sizes, attention = _sizes_from_gguf(fields, facts, _LAYERS_OF_27B_2)
    attention = replace(attention, softcap=fields.number("attn_logit_softcapping", 50.0))
    window = fields.integer("attention.sliding_window", 4096)
    windowed = windowed_from_gguf(fields, sizes.n_layers, _PERIOD_2)
    softcap = fields.number("final_logit_softcapping", 30.0)
    fields.finish(GGUF_IGNORABLE)
    layers = _layers(sizes, attention, (sizes.rope, sizes.rope), window, windowed)
    return replace(_model("gemma2", sizes, layers, offset=0.0), logit_softcap=softcap)


def _gemma2_to_hf(config: ModelConfig) -> dict[str, object]:
    _one_rope(config)
    return _to_hf(config)


def _gemma2_to_gguf(config: ModelConfig) -> dict[str, object]:
    attention = _one_rope(config)
    if attention.softcap is None or config.logit_softcap is None:
        raise ConfigError(
            f"GGUF: gemma2 has softcaps of scores and of logits, not {attention.softcap} and {config.logit_softcap}"
        )
    if not config.tied_head:
        raise ConfigError("GGUF has no form for a head of its own in gemma2")
    return {
        **_to_gguf(config, _LAYERS_OF_27B_2, _PERIOD_2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _one_rope(config: ModelConfig) -> AttentionConfig:
    attention, _, rope, local = _kinds(config)
    if rope != local:
        raise ConfigError("gemma2 rotates layers with a window as those without")
    return attention


GEMMA2 = Family(
    name="gemma2",
    models="Gemma 2",
    licence="Gemma Terms of Use",
    hf_architecture="Gemma2ForCausalLM",
    gguf_architecture="gemma2",
    hf=_HF_SHIFTED,
    gguf=_GGUF_SHIFTED,
    from_hf=_gemma2_from_hf,
    to_hf=_gemma2_to_hf,
    from_gguf=_gemma2_from_gguf,
    to_gguf=_gemma2_to_gguf,
)


# ---- Gemma 3 ----

_PERIOD_3, _LAYERS_OF_27B_3 = 6, 62
_DEFAULTS_3 = {
    **_DEFAULTS,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def _gemma3_from_hf(fields: Fields) -> ModelConfig:
    fields = fields.assuming(_DEFAULTS_3)
    sizes = sizes_from_hf(fields, names=_NAMES, read_rope=_global_rope)
    local = _local_rope(fields, head_dim=sizes.head_dim, stated_context=sizes.max_context)
    attention = replace(
        _attention_from_hf(fields, sizes),
        qk_norm="weighted",
        softcap=fields.optional_number("attn_logit_softcapping", None),
    )
    period = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", _PERIOD_3))
    window, windowed = _windowed_from_hf(fields, sizes.n_layers, period)
    softcap = fields.optional_number("final_logit_softcapping", None)
    fields.finish(_IGNORABLE)
    layers = _layers(sizes, attention, (sizes.rope, local), window, windowed)
    return replace(_model("gemma3_text", sizes, layers, offset=1.0), logit_softcap=softcap)


def _global_rope(fields: Fields, *, head_dim: int, stated_context: int) -> RopeConfig:
    """Of layers without a window; transformers 5 writes one object for each kind of layer."""
    if "rope_parameters" not in fields:
        return rope_from_hf(fields, head_dim=head_dim, stated_context=stated_context)
    theta = fields.number("rope_theta")
    rope = _rope_parameters(fields, LAYER_TYPES[False])
    return rope_of(fields, rope, theta=theta, head_dim=head_dim, stated_context=stated_context)


def _local_rope(fields: Fields, *, head_dim: int, stated_context: int) -> RopeConfig:
    """Of layers with a window."""
    theta = fields.number("rope_local_base_freq")
    if "rope_parameters" not in fields:
        return RopeConfig(theta=theta, dim=head_dim)
    rope = _rope_parameters(fields, LAYER_TYPES[True])
    return rope_of(fields, rope, theta=theta, head_dim=head_dim, stated_context=stated_context)


def _rope_parameters(fields: Fields, kind: str) -> Fields:
    both = fields.mapping("rope_parameters")
    both.finish(LAYER_TYPES)
    return both.mapping(kind)


def _gemma3_to_hf(config: ModelConfig) -> dict[str, object]:
    _, _, _, local = _kinds(config)
    if local.scaling is not None:
        raise ConfigError("config.json of gemma3_text has no form for a scaled rope in layers with a window")
    return {**_to_hf(config), "rope_local_base_freq": local.theta}


def _gemma3_from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    sizes, attention = _sizes_from_gguf(fields, facts, _LAYERS_OF_27B_3)
    attention = replace(attention, qk_norm="weighted")
    window = fields.integer("attention.sliding_window", 0) or None
    windowed = [False] * sizes.n_layers if window is None else windowed_from_gguf(fields, sizes.n_layers, _PERIOD_3)
    local = RopeConfig(theta=fields.number("rope.freq_base_swa", 10_000.0), dim=sizes.rope.dim)
    softcap = fields.number("final_logit_softcapping", 0.0) or None
    fields.finish(GGUF_IGNORABLE)
    layers = _layers(sizes, attention, (sizes.rope, local), window, windowed)
    return replace(_model("gemma3_text", sizes, layers, offset=0.0), logit_softcap=softcap)


def _gemma3_to_gguf(config: ModelConfig) -> dict[str, object]:
    attention, _, _, local = _kinds(config)
    if attention.softcap is not None:
        raise ConfigError("GGUF has no form for a softcap of scores in gemma3")
    if local.scaling is not None:
        raise ConfigError("GGUF has no form for a scaled rope in layers with a window in gemma3")
    written = {**_to_gguf(config, _LAYERS_OF_27B_3, _PERIOD_3), "rope.freq_base_swa": local.theta}
    return written if config.logit_softcap is None else {**written, "final_logit_softcapping": config.logit_softcap}


GEMMA3 = Family(
    name="gemma3_text",
    models="Gemma 3",
    licence="Gemma Terms of Use",
    hf_architecture="Gemma3ForCausalLM",
    gguf_architecture="gemma3",
    hf=_HF_SHIFTED,
    gguf=_GGUF_SHIFTED,
    from_hf=_gemma3_from_hf,
    to_hf=_gemma3_to_hf,
    from_gguf=_gemma3_from_gguf,
    to_gguf=_gemma3_to_gguf,
    wrapper=Wrapper(
        model_type="gemma3",
        prefix="language_model.",
        left_out=("vision_tower.", "multi_modal_projector."),
        ignorable=(
            "vision_config",
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
            "mm_tokens_per_image",
            # the text's own decides
            "tie_word_embeddings",
        ),
    ),
)
