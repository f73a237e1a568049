"""Supervised training: each learned token's own loss, counted alike."""

from __future__ import annotations

from torch import Tensor

from dapji.training.data.stream import Window
from dapji.training.loss import token_losses
from dapji.training.network import Network
from dapji.training.trainer import Method, Outcome


class Supervised(Method):
    """-log p of every learned token, over their number."""

    def count(self, window: Window) -> int:
        return int(window.learned.sum())

    def loss(self, network: Network, window: Window) -> Outcome:
        return Outcome(losses_of(network, window).sum())


def losses_of(network: Network, window: Window) -> Tensor:
    """-log p of each learned token after all before it, [R] float32."""

    def head(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
        import torch

        labels = torch.as_tensor(window.labels, dtype=torch.int64, device=hidden.device)
        return token_losses(hidden, weight, labels, softcap)

    losses: Tensor = network(window, head)
    return losses
