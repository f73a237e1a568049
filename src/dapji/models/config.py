"""`ModelConfig`: what a decoder is made of. Fields name mechanisms, never models; sizes are checked on creation.

Knows neither config.json nor GGUF (`families` translates those) and no executor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapji.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotation frequencies are stretched beyond the length that the model was trained on.

    linear: Chen et al. 2023, "Extending Context Window of LLMs via Positional Interpolation".
    dynamic: NTK-aware, base grows with the context that the executor is opened for.
    yarn: Peng et al. 2023, "YaRN: Efficient Context Window Extension of LLMs".
    llama3: three bands of wavelengths, as published with Llama 3.1.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_context: int
    """Length before scaling, in tokens."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths longer than original_context / this are divided by `factor`."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths shorter than original_context / this stay."""
    beta_fast: float = 32.0
    """yarn: rotations over original_context above which a frequency stays."""
    beta_slow: float = 1.0
    """yarn: rotations below which it is divided by `factor`."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None: computed as 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: round the two band limits outwards to whole dimensions."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), pairs (i, i + dim/2) rotated by position * frequency_i."""

    theta: float
    dim: int
    """Rotated dimensions of each head, even, <= head_dim."""
    scaling: RopeScaling | None = None
    frequency_factors: tuple[float, ...] | None = None
    """dim/2 explicit divisors of the frequencies (GGUF's rope_freqs tensor), instead of `scaling`."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention: n_heads query heads share n_kv_heads key/value heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all."""
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})")


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """down(activation(gate(x)) * up(x))."""

    hidden_dim: int
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    attention: AttentionConfig
    feed_forward: FeedForwardConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole decoder: embedding, layers, norm, head."""

    family: str
    """Which entry of `families` reads and writes it; for names and messages, never for dispatch in the decoder."""
    dim: int
    vocab_size: int
    max_context: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    tied_head: bool
    """The head is the embedding matrix."""

    @property
    def n_layers(self) -> int:
        return len(self.layers)
