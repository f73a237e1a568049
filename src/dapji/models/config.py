"""`ModelConfig`: what a decoder is made of. Fields name mechanisms, never models; sizes are checked on creation.

Knows neither config.json nor GGUF (`families` translates those) and no executor.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapji.errors import ConfigError
from dapji.ops.protocol import Activation
from dapji.ops.rope import RopeConfig


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
        _positive(n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})")
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ConfigError(f"rope.dim ({self.rope.dim}) must be at most head_dim ({self.head_dim})")
        if self.window is not None:
            _positive(window=self.window)


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """down(activation(gate(x)) * up(x))."""

    hidden_dim: int
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(hidden_dim=self.hidden_dim)


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

    def __post_init__(self) -> None:
        _positive(dim=self.dim, vocab_size=self.vocab_size, max_context=self.max_context, n_layers=self.n_layers)
        if not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps ({self.norm_eps}) must not be negative")

    @property
    def n_layers(self) -> int:
        return len(self.layers)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight that a model of this configuration has: canonical name -> shape, matrices as [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, config.dim)}

    def linear(name: str, bias: bool, rows: int, cols: int) -> None:
        shapes[name] = (rows, cols)
        if bias:
            shapes[f"{name}_bias"] = (rows,)

    for i, layer in enumerate(config.layers):
        attention, feed_forward = layer.attention, layer.feed_forward
        q_dim, kv_dim = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
        shapes[f"layers.{i}.attention.norm"] = (config.dim,)
        linear(f"layers.{i}.attention.q", attention.qkv_bias, q_dim, config.dim)
        linear(f"layers.{i}.attention.k", attention.qkv_bias, kv_dim, config.dim)
        linear(f"layers.{i}.attention.v", attention.qkv_bias, kv_dim, config.dim)
        linear(f"layers.{i}.attention.o", attention.out_bias, config.dim, q_dim)
        shapes[f"layers.{i}.feed_forward.norm"] = (config.dim,)
        linear(f"layers.{i}.feed_forward.gate", feed_forward.bias, feed_forward.hidden_dim, config.dim)
        linear(f"layers.{i}.feed_forward.up", feed_forward.bias, feed_forward.hidden_dim, config.dim)
        linear(f"layers.{i}.feed_forward.down", feed_forward.bias, config.dim, feed_forward.hidden_dim)
    shapes["norm"] = (config.dim,)
    if not config.tied_head:
        shapes["head"] = (config.vocab_size, config.dim)
    return shapes


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} ({size}) must be positive")
