"""Learning from rewards of the model's own answers: GRPO's clipped objective (Shao et al. 2024; Yu et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from dapji.training.data.stream import Window
from dapji.training.network import Network
from dapji.training.rollouts import Rollouts
from dapji.training.supervised import losses_of
from dapji.training.trainer import Method, Outcome


class Policy(Method):
    """Of each token -min(ratio a, clipped ratio a) + kl (r/p - log r/p - 1), over the number of tokens: ratio, of its
    probabilities now and when it was written; a, its advantage; r, its probability by the reference.

    The divergence is estimated from the token alone, without bias and never negative (Schulman 2020).
    """

    def __init__(self, *, clip: float, kl: float) -> None:
        self._clip = clip
        self._kl = kl

    def count(self, window: Window) -> int:
        return int(window.learned.sum())

    def loss(self, network: Network, window: Window) -> Outcome:
        assert isinstance(window, Rollouts)
        now = -losses_of(network, window)

        def given(values: object) -> Tensor:
            return torch.as_tensor(values, device=now.device)

        written, advantages = given(window.log_probs), given(window.advantages)
        ratios = (now - written).exp()
        low, high = 1 - self._clip, 1 + self._clip
        losses = -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)
        clipped = ((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))
        n, n_answers = len(now), len(window.rewards)
        metrics = {
            "reward": (float(window.rewards.sum()), n_answers),
            "answer_tokens": (n, n_answers),
            "ended": (float(window.ended.sum()), n_answers),
            "clipped": (clipped.sum().item(), n),
            "log_prob_gap": ((now - written).detach().abs().sum().item(), n),
        }
        if self._kl:
            below = given(window.reference) - now
            divergences = below.exp() - below - 1
            losses = losses + self._kl * divergences
            metrics["kl"] = (divergences.sum().item(), n)
        return Outcome(losses.sum(), metrics)
