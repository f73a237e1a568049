"""Which layers have a window, a chunk or a rope, as foreign configurations say it: layer by layer, or every so many.

Knows no model; sits beside the families that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, LayerConfig, ModelConfig
from dapji.models.families.family import windows
from dapji.models.families.fields import Fields

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Of a layer without a window, and of one with it."""
_PATTERN = "attention.sliding_window_pattern"


def all_but_every(period: int, n_layers: int, key: str = "sliding_window_pattern") -> list[bool]:
    """True but for every period-th. Raises ConfigError, which names the key, unless the period is positive."""
    if period < 1:
        raise ConfigError(f"{key} ({period}) must be positive")
    return [(i + 1) % period != 0 for i in range(n_layers)]


def limited_from_hf(fields: Fields, otherwise: Sequence[bool], types: tuple[str, str] = LAYER_TYPES) -> list[bool]:
    """Of every layer, whether it is of the second of `types`, by layer_types. otherwise: where the file has none."""
    if "layer_types" not in fields:
        return list(otherwise)
    stated = fields.strings("layer_types")
    _check_length("layer_types", stated, len(otherwise))
    if unknown := sorted(set(stated) - set(types)):
        raise ConfigError(f"config.json: layer_types {unknown[0]!r} is not supported")
    return [kind == types[1] for kind in stated]


def rotated_from_hf(fields: Fields, n_layers: int) -> list[bool]:
    """Of every layer, whether it has a rope: by no_rope_layers, where, in spite of the name, 1 is a layer that has one;
    where that is absent or empty, all but every no_rope_layer_interval-th."""
    period = fields.integer("no_rope_layer_interval", 4)
    by_period = all_but_every(period, n_layers, "no_rope_layer_interval")
    stated = fields.integers("no_rope_layers") if "no_rope_layers" in fields else []
    if not stated:
        return by_period
    if other := set(stated) - {0, 1}:
        raise ConfigError(f"config.json: no_rope_layers must have 0 and 1, not {min(other)}")
    _check_length("no_rope_layers", stated, n_layers)
    return [flag == 1 for flag in stated]


def windows_to_hf(config: ModelConfig) -> dict[str, object]:
    """The inverse, with the window itself."""
    types = [LAYER_TYPES[window is not None] for window in windows(config)]
    return {"sliding_window": _one_window(config), "layer_types": types}


def windowed_from_gguf(fields: Fields, n_layers: int, period: int) -> list[bool]:
    """Of every layer, whether it has a window, by `<architecture>.*`: a list, or a period. period: where the file has
    neither."""
    if not fields.holds(_PATTERN, list, np.ndarray):
        return all_but_every(fields.integer(_PATTERN, period), n_layers)
    windowed = fields.booleans(_PATTERN)
    if len(windowed) != n_layers:
        raise ConfigError(f"GGUF: {_PATTERN} has {len(windowed)} values for block_count ({n_layers})")
    return windowed


def windows_to_gguf(config: ModelConfig, period: int | None = None) -> dict[str, object]:
    """The inverse, with the window itself. period: that need not be said."""
    windowed = [window is not None for window in windows(config)]
    written: dict[str, object] = {"attention.sliding_window": _one_window(config)}
    if period is None or windowed != all_but_every(period, config.n_layers):
        written[_PATTERN] = windowed
    return written


def two_kinds(config: ModelConfig) -> tuple[LayerConfig | None, LayerConfig | None]:
    """The layer that all with a window are equal to, and the one without: equal but for window and rope. None: no layer
    is of that kind. Raises ConfigError where layers differ otherwise."""
    kinds: dict[bool, LayerConfig] = {}
    for i, layer in enumerate(config.layers):
        first = kinds.setdefault(_attention(layer).window is not None, layer)
        if layer != first:
            raise ConfigError(
                f"{config.family} has no form for layers that differ: {i} is not as {config.layers.index(first)}"
            )
    windowed, full = kinds.get(True), kinds.get(False)
    if windowed is not None and full is not None:
        attention = replace(_attention(windowed), window=None, rope=_attention(full).rope)
        if replace(windowed, attention=attention) != full:
            raise ConfigError(f"{config.family} has no form for layers that differ in more than window and rope")
    return windowed, full


def _check_length(key: str, stated: Sequence[object], n_layers: int) -> None:
    if len(stated) != n_layers:
        raise ConfigError(f"config.json: {len(stated)} {key} for num_hidden_layers ({n_layers})")


def _attention(layer: LayerConfig) -> AttentionConfig:
    assert isinstance(layer.attention, AttentionConfig)
    return layer.attention


def _one_window(config: ModelConfig) -> int | None:
    sizes = sorted({window for window in windows(config) if window is not None})
    if len(sizes) > 1:
        raise ConfigError(f"{config.family} has one sliding_window, not {sizes}")
    return sizes[0] if sizes else None
