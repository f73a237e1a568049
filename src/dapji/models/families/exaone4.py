"""EXAONE 4.0: normed heads, norms after attention and feed-forward, and in the hybrid models a window in most layers,
of which those without it do not rotate."""

from __future__ import annotations

from dataclasses import replace

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
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
from dapji.models.families.layout import GGUF, HF
from dapji.models.families.patterns import (
    all_but_every,
    limited_from_hf,
    two_kinds,
    windowed_from_gguf,
    windows_to_gguf,
    windows_to_hf,
)
from dapji.models.families.rope import ROPE_FREQS

_HF = replace(
    HF,
    parts={
        **HF.parts,
        "attention.post_norm": "post_attention_layernorm",
        "feed_forward.post_norm": "post_feedforward_layernorm",
    },
)
_PERIOD = 4
"""Of the layers without a window, where a configuration does not say it."""


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields.assuming({"rms_norm_eps": 1e-5}))
    window = fields.optional_integer("sliding_window", 4096)
    windowed = limited_from_hf(fields, _by_pattern(fields, sizes.n_layers, window is not None))
    if window is None and any(windowed):
        raise ConfigError("config.json: layer_types has sliding_attention, but sliding_window is null")
    fields.finish((*HF_IGNORABLE, "sliding_window_pattern"))
    return sizes.model("exaone4", _layers(sizes, window, windowed))


def _by_pattern(fields: Fields, n_layers: int, hybrid: bool) -> list[bool]:
    """A period, or L (with a window) and G over and over; as published, the last layer then has none."""
    key = "sliding_window_pattern"
    if not hybrid:
        return [False] * n_layers
    if not fields.holds(key, str):
        return all_but_every(fields.integer(key, _PERIOD), n_layers)
    pattern = fields.string(key)
    if not pattern or set(pattern) - {"L", "G"}:
        raise ConfigError(f"config.json: {key} {pattern!r} is not supported, only L and G are")
    return [pattern[i % len(pattern)] == "L" and i != n_layers - 1 for i in range(n_layers)]


def _layers(sizes: Sizes, window: int | None, windowed: list[bool]) -> tuple[LayerConfig, ...]:
    """window None: the model is not a hybrid."""
    attention = replace(sizes.attention, qk_norm="weighted")
    full = attention if window is None else replace(attention, rope=None)
    kinds = (full, replace(attention, window=window))
    return tuple(
        LayerConfig(attention=kinds[kind], feed_forward=sizes.feed_forward, norms="after") for kind in windowed
    )


def _rotated(config: ModelConfig) -> tuple[AttentionConfig, FeedForwardConfig]:
    """Of a layer with a rope. Raises ConfigError unless the layers are as `_layers` makes them."""
    windowed, full = two_kinds(config)
    layer = windowed or full
    assert layer is not None
    attention, feed_forward = layer.attention, layer.feed_forward
    assert isinstance(attention, AttentionConfig)
    assert isinstance(feed_forward, FeedForwardConfig)
    unrotated = replace(attention, window=None, rope=None)
    if attention.rope is None or (windowed is not None and full is not None and full.attention != unrotated):
        raise ConfigError("exaone4 rotates all layers, or in a model with windows just those that have one")
    return attention, feed_forward


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = _rotated(config)
    return {
        **sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation),
        **windows_to_hf(config),
    }


def _from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    sizes = sizes_from_gguf(fields, facts)
    window = fields.integer("attention.sliding_window", 0) or None
    windowed = [False] * sizes.n_layers if window is None else windowed_from_gguf(fields, sizes.n_layers, _PERIOD)
    fields.finish(GGUF_IGNORABLE)
    return sizes.model("exaone4", _layers(sizes, window, windowed))


def _to_gguf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = _rotated(config)
    require_gguf_activation(feed_forward.activation)
    assert attention.rope is not None
    written = sizes_to_gguf(config, attention, attention.rope, feed_forward.hidden_dim)
    return written if attention.window is None else {**written, **windows_to_gguf(config)}


EXAONE4 = Family(
    name="exaone4",
    models="EXAONE 4.0",
    licence="EXAONE AI Model License 1.2 - NC",
    hf_architecture="Exaone4ForCausalLM",
    gguf_architecture="exaone4",
    hf=_HF,
    gguf=GGUF,
    rope_tensors=(ROPE_FREQS,),
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
