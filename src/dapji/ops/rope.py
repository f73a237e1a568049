"""Rotary position embedding: its description and its tables of cosines and sines.

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding". The tables are computed in float32, in
the order of operations of the models' published code, so that a phase at position 100,000 has the same rounding error
as there. Every executor rotates by the same tables. Knows neither models nor files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotation frequencies are stretched beyond the length that the model was trained on.

    linear: Chen et al. 2023, "Extending Context Window of LLMs via Positional Interpolation".
    dynamic: NTK-aware: theta grows with the context that the executor is opened for, and then stays. (Growing with the
    text, as it is also defined, would turn the keys that are cached already by other angles than the new ones.)
    yarn: Peng et al. 2023, "YaRN: Efficient Context Window Extension of LLMs".
    llama3: three bands of wavelengths, as published with Llama 3.1.
    longrope: Ding et al. 2024, "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens": a divisor for each
    frequency, from one list or from another. Which one depends, as with dynamic, on the context that the executor is
    opened for: the long one beyond original_context.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float
    original_context: int
    """Length before scaling, in tokens."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths longer than original_context / this are multiplied by `factor`."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths shorter than original_context / this stay."""
    beta_fast: float = 32.0
    """yarn: a frequency with more rotations than this over original_context stays."""
    beta_slow: float = 1.0
    """yarn: one with fewer is divided by `factor`."""
    attention_factor: float | None = None
    """yarn, longrope: factor on cos and sin; None: `yarn_attention_factor`, `longrope_attention_factor`."""
    truncate: bool = True
    """yarn: round the two band limits outwards to whole dimensions."""
    short_factors: tuple[float, ...] = ()
    """longrope: dim/2 divisors of the frequencies in a context of up to original_context …"""
    long_factors: tuple[float, ...] = ()
    """… and in a longer one."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ConfigError(f"rope scaling {self.kind}: factor ({self.factor}) must be at least 1")
        if self.original_context < 1:
            raise ConfigError(f"rope scaling {self.kind}: original_context ({self.original_context}) must be positive")
        if self.kind == "llama3" and not 0 < self.low_frequency_factor <= self.high_frequency_factor:
            raise ConfigError(
                f"rope scaling llama3: low_frequency_factor ({self.low_frequency_factor}) must be positive and at most "
                f"high_frequency_factor ({self.high_frequency_factor})"
            )
        if self.kind == "longrope" and self.original_context < 2:
            raise ConfigError(f"rope scaling longrope: original_context ({self.original_context}) must be at least 2")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ConfigError(f"rope scaling {self.kind}: attention_factor ({self.attention_factor}) must be positive")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"rope scaling yarn: beta_slow ({self.beta_slow}) must be positive and at most "
                f"beta_fast ({self.beta_fast})"
            )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Pairs (i, i + dim/2) of a head's first `dim` values are rotated by position * frequency_i."""

    theta: float
    dim: int
    """Rotated dimensions of each head, even, <= head_dim."""
    scaling: RopeScaling | None = None
    frequency_factors: tuple[float, ...] | None = None
    """dim/2 explicit divisors of the frequencies (GGUF's rope_freqs tensor), instead of `scaling`."""

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"rope: dim ({self.dim}) must be even and at least 2")
        if self.theta <= 1:
            raise ConfigError(f"rope: theta ({self.theta}) must be greater than 1")
        if self.scaling is not None and self.scaling.kind == "dynamic" and self.dim == 2:
            raise ConfigError("rope: dynamic scaling needs a dim greater than 2")
        if self.frequency_factors is not None:
            if self.scaling is not None:
                raise ConfigError(f"rope: frequency_factors and scaling ({self.scaling.kind}) exclude each other")
            self._check_factors("frequency_factors", self.frequency_factors)
        if self.scaling is not None and self.scaling.kind == "longrope":
            self._check_factors("short_factors", self.scaling.short_factors)
            self._check_factors("long_factors", self.scaling.long_factors)

    def _check_factors(self, name: str, factors: tuple[float, ...]) -> None:
        if len(factors) != self.dim // 2:
            raise ConfigError(f"rope: {len(factors)} {name} for dim/2 ({self.dim // 2})")
        if wrong := [factor for factor in factors if not 0 < factor < math.inf]:
            raise ConfigError(f"rope: {name} must be positive and finite, not {wrong[0]}")


@dataclass(frozen=True, kw_only=True, eq=False)
class RopeTable:
    """cos and sin of every angle up to a context, already multiplied by the scaling's attention factor."""

    cos: Floats
    """[context, dim/2]"""
    sin: Floats
    """[context, dim/2]"""

    @property
    def dim(self) -> int:
        return 2 * int(self.cos.shape[1])


class RopeTables:
    """The tables of every rope of a model for one context, each computed once."""

    def __init__(self, context: int) -> None:
        self.context = context
        self._tables: dict[RopeConfig, RopeTable] = {}

    def __getitem__(self, rope: RopeConfig) -> RopeTable:
        if rope not in self._tables:
            self._tables[rope] = rope_table(rope, self.context)
        return self._tables[rope]


def rope_table(rope: RopeConfig, context: int) -> RopeTable:
    """cos and sin, [context, dim/2] float32 each, of the angles position * frequency."""
    positions = np.arange(context, dtype=np.float32)
    angles = positions[:, None] * rope_frequencies(rope, context)  # [context, dim/2]
    factor = np.float32(_attention_factor(rope.scaling))
    return RopeTable(cos=np.cos(angles) * factor, sin=np.sin(angles) * factor)


def rope_frequencies(rope: RopeConfig, context: int) -> Floats:
    """Radians per token of each pair, [dim/2] float32, for an executor of this context (dynamic and longrope
    scaling need it)."""
    scaling = rope.scaling
    theta = rope.theta
    if scaling is not None and scaling.kind == "dynamic":
        length = max(context, scaling.original_context)
        stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
        theta *= stretch ** (rope.dim / (rope.dim - 2))
    wavelengths: Floats = np.power(
        np.float32(theta), np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    )
    factors = rope.frequency_factors
    if scaling is not None and scaling.kind == "longrope":
        factors = scaling.long_factors if context > scaling.original_context else scaling.short_factors
    if factors is not None:
        wavelengths = np.array(factors, dtype=np.float32) * wavelengths
    frequencies: Floats = np.float32(1) / wavelengths
    if scaling is None or scaling.kind in ("dynamic", "longrope"):
        return frequencies
    if scaling.kind == "linear":
        frequencies /= np.float32(scaling.factor)
        return frequencies
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(wavelengths, rope.theta, scaling)


def yarn_attention_factor(factor: float) -> float:
    """What yarn multiplies cos and sin by, where the model does not say otherwise."""
    return 0.1 * math.log(factor) + 1.0


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """The same of longrope."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0


def _attention_factor(scaling: RopeScaling | None) -> float:
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return yarn_attention_factor(scaling.factor)
    return longrope_attention_factor(scaling.factor, scaling.original_context)


def _llama3(frequencies: Floats, scaling: RopeScaling) -> Floats:
    """Short waves stay, long ones are stretched by `factor`, those between are blended."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    waves = np.float32(2 * math.pi) / frequencies
    stretched = frequencies / np.float32(scaling.factor)
    if low == high:  # a step instead of a ramp
        return np.where(waves < scaling.original_context / high, frequencies, stretched)
    keep = (np.float32(scaling.original_context) / waves - np.float32(low)) / np.float32(high - low)
    blended = (1 - keep) * frequencies / np.float32(scaling.factor) + keep * frequencies
    blended = np.where(waves > scaling.original_context / low, stretched, blended)
    return np.where(waves < scaling.original_context / high, frequencies, blended)


def _yarn(wavelengths: Floats, theta: float, scaling: RopeScaling) -> Floats:
    """A ramp over the dimensions from the unscaled frequency (fast) to the one divided by `factor` (slow)."""
    dim = 2 * len(wavelengths)

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns so often over the original context."""
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as published: a step instead of a ramp
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - ramp
    blended: Floats = 1 / (np.float32(scaling.factor) * wavelengths) * (1 - keep) + 1 / wavelengths * keep
    return blended
