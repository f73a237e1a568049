"""Which layers have a window, as foreign configurations say it: by the layers' types, or every so many.

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


def all_but_every(period: int, n_layers: int) -> list[bool]:
    """True but for every period-th. Raises ConfigError unless the period is positive."""
    if period < 1:
        raise ConfigError(f"sliding_window_pattern ({period}) must be positive")
    return [(i + 1) % period != 0 for i in range(n_layers)]


def windowed_from_hf(fields: Fields, otherwise: Sequence[bool]) -> list[bool]:
    """Of every layer, whether it has a window, by layer_types. otherwise: where the file has none."""
    if "layer_types" not in fields:
        return list(otherwise)
    types = fields.strings("layer_types")
    if len(types) != len(otherwise):
        raise ConfigError(f"config.json: {len(types)} layer_types for num_hidden_layers ({len(otherwise)})")
    if unknown := sorted(set(types) - set(LAYER_TYPES)):
        raise ConfigError(f"config.json: layer_types {unknown[0]!r} is not supported")
    return [type == "sliding_attention" for type in types]


def windows_to_hf(config: ModelConfig) -> dict[str, object]:
    """The inverse, with the window itself."""
    types = [LAYER_TYPES[window is not None] for window in windows(config)]
    return {"sliding_window": _one_window(config), "layer_types": types}


def windowed_from_gguf(fields: Fields, n_layers: int, period: int) -> list[bool]:
    """The same of `<architecture>.*`: a list, or a period. period: where the file has neither."""
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


def _attention(layer: LayerConfig) -> AttentionConfig:
    assert isinstance(layer.attention, AttentionConfig)
    return layer.attention


def _one_window(config: ModelConfig) -> int | None:
    sizes = sorted({window for window in windows(config) if window is not None})
    if len(sizes) > 1:
        raise ConfigError(f"{config.family} has one sliding_window, not {sizes}")
    return sizes[0] if sizes else None
