"""What an attention op is asked for, and the small functions of positions that every implementation shares.

Knows neither models nor caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Queries at position p are multiplied by 1 + scale ln(1 + floor((p + 1) / length)), so that attention over long
    texts stays sharp (Nakanishi 2025, "Scalable-Softmax Is Superior for Attention")."""

    scale: float
    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"temperature: length ({self.length}) must be positive")

    def factors(self, context: int) -> NDArray[np.float32]:
        """[context] float32, by position."""
        positions = np.arange(1, context + 1, dtype=np.float32)
        steps = np.floor(positions / np.float32(self.length))
        factors: NDArray[np.float32] = np.log1p(steps) * np.float32(self.scale) + np.float32(1)
        return factors


@dataclass(frozen=True, kw_only=True)
class Attention:
    """softmax(scale q k) v, causal, with H query heads over K kv heads: query head h reads kv head h // (H/K)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all."""
    chunk: int | None = None
    """A token sees those of its own chunk alone: positions that give the same number divided by this."""
    softcap: float | None = None
    """Scores s become softcap tanh(s / softcap)."""
    temperature: Temperature | None = None


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2"): all heads read one latent vector per token.

    Head h has the key (k_up[h] latent, rotated key) and the value v_up[h] latent. Two forms compute the same. Naive:
    expand keys and values of all tokens. Absorbed: q_nope k_up[h] once per query, then attend over the latents
    themselves, and v_up[h] of what is attended.
    """

    n_heads: int
    latent_dim: int
    """Of what is cached per token, beside the rotated key."""
    nope_dim: int
    """Of a head's query and key that is not rotated."""
    rope_dim: int
    """Of the part that is; keys have one for all heads."""
    value_dim: int
    """Of a head's value."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """What the cache of one layer holds of each token."""

    n_kv_heads: int
    key_dim: int
    value_dim: int
    """0: values are the beginning of the keys, as in latent attention, where a key is (latent, rotated key)."""


def first_visible(positions: NDArray[np.integer], window: int | None, chunk: int | None) -> NDArray[np.int64]:
    """The first position that tokens at these positions see."""
    at: NDArray[np.int64] = positions.astype(np.int64)
    first = np.zeros_like(at)
    if window is not None:
        first = np.maximum(first, at - window + 1)
    if chunk is not None:
        first = np.maximum(first, at // chunk * chunk)
    return first
