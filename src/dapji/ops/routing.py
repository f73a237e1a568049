"""Expert routing: which experts a token goes to, and with what weight. The reference of every implementation.

Knows neither models nor weights' formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Scores of E experts become the n_experts_per_token best of them and their weights.

    A selection bias (DeepSeek-AI 2024, "DeepSeek-V3", balancing without an auxiliary loss) is added for the choice
    alone; the weights are the scores without it.
    """

    n_experts: int
    n_experts_per_token: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Of the router's logits."""
    n_groups: int = 1
    """Experts lie in groups of n_experts / n_groups, and only the best groups take part."""
    n_groups_per_token: int = 1
    group_score: Literal["max", "top2"] = "max"
    """A group counts as its best expert, or as the sum of its two best."""
    normalized: bool = False
    """The chosen experts' weights are divided by their sum."""
    scale: float = 1.0
    """Factor on the weights."""
    weighs: Literal["output", "input"] = "output"
    """What a weight multiplies: what an expert gives, or what it takes."""

    def __post_init__(self) -> None:
        if self.n_experts < 1:
            raise ConfigError(f"n_experts ({self.n_experts}) must be positive")
        if not 1 <= self.n_experts_per_token <= self.n_experts:
            raise ConfigError(
                f"n_experts_per_token ({self.n_experts_per_token}) must be 1 to n_experts ({self.n_experts})"
            )
        if self.n_groups < 1 or self.n_experts % self.n_groups:
            raise ConfigError(f"n_experts ({self.n_experts}) must be divisible by n_groups ({self.n_groups})")
        if not 1 <= self.n_groups_per_token <= self.n_groups:
            raise ConfigError(f"n_groups_per_token ({self.n_groups_per_token}) must be 1 to n_groups ({self.n_groups})")
        group = self.n_experts // self.n_groups
        if self.n_experts_per_token > self.n_groups_per_token * group:
            raise ConfigError(
                f"n_experts_per_token ({self.n_experts_per_token}) must be at most the {self.n_groups_per_token} x "
                f"{group} experts of the groups that take part"
            )
        if self.group_score == "top2" and self.n_groups > 1 and group < 2:
            raise ConfigError(f"groups of {group} expert cannot be scored by their two best")


def route(logits: Floats, bias: Floats | None, routing: Routing) -> tuple[NDArray[np.int64], Floats]:
    """logits [T, E], bias [E] -> the chosen experts [T, k], best first, and their weights [T, k].

    Of equal experts (and groups) the first is chosen.
    """
    if routing.score == "sigmoid":
        small = np.exp(-np.abs(logits))
        scores: Floats = np.where(logits >= 0, np.float32(1), small) / (1 + small)
    else:
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
    choice = scores if bias is None else scores + bias
    if routing.n_groups > 1:
        groups = choice.reshape(len(choice), routing.n_groups, -1)  # [T, G, E/G]
        best = np.sort(groups, axis=-1)[..., -(2 if routing.group_score == "top2" else 1) :].sum(axis=-1)  # [T, G]
        chosen = np.argsort(-best, axis=-1, kind="stable")[:, : routing.n_groups_per_token]
        part = np.zeros(best.shape, dtype=bool)
        np.put_along_axis(part, chosen, True, axis=-1)
        choice = np.where(part[..., None], groups, np.float32(-np.inf)).reshape(choice.shape)
    experts = np.argsort(-choice, axis=-1, kind="stable")[:, : routing.n_experts_per_token]
    weights: Floats = np.take_along_axis(scores, experts, axis=-1)
    if routing.normalized:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    return experts, weights * np.float32(routing.scale)
