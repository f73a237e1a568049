"""Learning from preferences: DPO, ORPO and SimPO on pairs of answers, KTO on answers that are rated one by one.

Each counts pairs or answers. What a loss compares are the log-probabilities of whole answers, so that the loss of a
pair is the same wherever it is packed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dapji.training.data.stream import Window
from dapji.training.network import Network
from dapji.training.reference import Rated, Referenced, answer_lengths, log_probs
from dapji.training.settings import DpoSettings, KtoSettings, OrpoSettings, SimpoSettings
from dapji.training.trainer import Method, Outcome, Total


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """n of them."""

    log_probs: Tensor
    """[n] of all learned tokens together."""
    lengths: Tensor
    """[n] learned tokens."""
    reference: Tensor | None
    """[n] as log_probs, by the model that training begins from."""

    @property
    def means(self) -> Tensor:
        """[n] log-probability of a learned token."""
        return self.log_probs / self.lengths


class Compared(NamedTuple):
    losses: Tensor
    """[n]"""
    chosen: Tensor
    """[n] rewards, of which a loss compares the two of a pair."""
    rejected: Tensor


class Pairs(Method):
    """A method whose loss is a mean over pairs; sequences 2 i and 2 i + 1 of a window are chosen and rejected."""

    def count(self, window: Window) -> int:
        return len(window.samples) // 2

    def loss(self, network: Network, window: Window) -> Outcome:
        values = log_probs(network, window)
        lengths = torch.as_tensor(answer_lengths(window), device=values.device)
        reference = _reference(window, values) if isinstance(window, Referenced) else None
        chosen, rejected = (
            Answers(
                log_probs=values[side::2],
                lengths=lengths[side::2],
                reference=None if reference is None else reference[side::2],
            )
            for side in (0, 1)
        )
        given = self.compare(chosen, rejected)
        n = len(chosen.log_probs)
        sums = {
            "accuracy": (given.chosen > given.rejected).sum(),
            "margin": (given.chosen - given.rejected).sum(),
            "chosen_reward": given.chosen.sum(),
            "rejected_reward": given.rejected.sum(),
        }
        return Outcome(given.losses.sum(), {name: (value.item(), n) for name, value in sums.items()})

    @abstractmethod
    def compare(self, chosen: Answers, rejected: Answers) -> Compared: ...


class Dpo(Pairs):
    """-log sigmoid(beta (log p/r of the chosen - log p/r of the rejected)), r by the reference."""

    def __init__(self, settings: DpoSettings) -> None:
        self._settings = settings

    def compare(self, chosen: Answers, rejected: Answers) -> Compared:
        rewards = []
        for answers in (chosen, rejected):
            assert answers.reference is not None
            ratios = answers.log_probs - answers.reference
            rewards.append(
                self._settings.beta * (ratios / answers.lengths if self._settings.length_normalised else ratios)
            )
        return Compared(_sided(rewards[0] - rewards[1], self._settings.label_smoothing), *rewards)


class Simpo(Pairs):
    """-log sigmoid(beta (mean log p of the chosen - that of the rejected) - gamma)."""

    def __init__(self, settings: SimpoSettings) -> None:
        self._settings = settings

    def compare(self, chosen: Answers, rejected: Answers) -> Compared:
        rewards = [self._settings.beta * answers.means for answers in (chosen, rejected)]
        margins = rewards[0] - rewards[1] - self._settings.gamma
        return Compared(_sided(margins, self._settings.label_smoothing), *rewards)


class Orpo(Pairs):
    """-mean log p of the chosen - beta log sigmoid(log of odds(chosen) / odds(rejected)), odds = p / (1 - p) of the
    geometric mean p of an answer's tokens."""

    def __init__(self, settings: OrpoSettings) -> None:
        self._settings = settings

    def compare(self, chosen: Answers, rejected: Answers) -> Compared:
        log_odds = [answers.means - _log_one_minus_exp(answers.means) for answers in (chosen, rejected)]
        beta = self._settings.beta
        losses = -chosen.means - beta * F.logsigmoid(log_odds[0] - log_odds[1])
        return Compared(losses, beta * chosen.means, beta * rejected.means)


class Kto(Method):
    """weight (1 - sigmoid(beta (log p/r - z))) of a good answer, weight (1 - sigmoid(beta (z - log p/r))) of a bad one.

    z, the reference point: the mean of log p/r over a step's mismatched answers on all ranks, at least 0; it has no
    gradient.
    """

    def __init__(self, settings: KtoSettings) -> None:
        self._settings = settings
        self._point = 0.0

    def count(self, window: Window) -> int:
        return len(window.samples)

    def begin(self, network: Network, windows: Sequence[tuple[Window, bool]], total: Total) -> None:
        training = network.training
        network.eval()
        ratios = count = 0.0
        for window, counts in windows:
            assert isinstance(window, Rated)
            values = log_probs(network, window.mismatched)
            ratios += counts * (values - _reference(window.mismatched, values)).sum().item()
            count += counts * len(values)
        network.train(training)
        ratios, count = total(ratios, count)
        self._point = max(0.0, ratios / count)

    def loss(self, network: Network, window: Window) -> Outcome:
        assert isinstance(window, Rated)
        settings = self._settings
        values = log_probs(network, window)
        ratios = values - _reference(window, values)
        good = torch.as_tensor(window.good, device=values.device) == 1
        above = settings.beta * (ratios - self._point)
        losses = torch.where(
            good,
            settings.desirable_weight * torch.sigmoid(-above),
            settings.undesirable_weight * torch.sigmoid(above),
        )
        rewards = settings.beta * ratios.detach()
        n, n_good = len(values), int(good.sum())
        metrics = {
            "kl": (self._point * n, n),
            "desirable_reward": (rewards[good].sum().item(), n_good),
            "undesirable_reward": (rewards[~good].sum().item(), n - n_good),
        }
        return Outcome(losses.sum(), metrics)


def _reference(window: Referenced, like: Tensor) -> Tensor:
    return torch.tensor(window.reference, device=like.device)


def _sided(margins: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of each margin, of which a share is expected to be the other way round."""
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0. An answer that is certain in float32 is taken as a step less: its odds have no end."""
    x = x.clamp(max=-torch.finfo(torch.float32).eps)
    return torch.where(x > -0.7, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
