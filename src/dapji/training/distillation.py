"""Learning from a teacher's distributions beside the labels (Hinton et al. 2015)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapji.training.data.stream import Window
from dapji.training.loss import distillation_losses
from dapji.training.network import Network
from dapji.training.settings import DistillSettings
from dapji.training.supervised import bits_per_byte
from dapji.training.teacher import Taught
from dapji.training.trainer import Method, Outcome


class Distillation(Method):
    """weight KL(teacher || student) + (1 - weight) -log p(label) of every learned token, over their number.

    The divergence is over the teacher's likeliest tokens and all others as one.
    """

    def __init__(self, settings: DistillSettings, token_bytes: NDArray[np.int64] | None = None) -> None:
        """token_bytes: as `bits_per_byte` takes it."""
        self._weight = settings.weight
        self._token_bytes = token_bytes

    def count(self, window: Window) -> int:
        return int(window.learned.sum())

    def loss(self, network: Network, window: Window) -> Outcome:
        assert isinstance(window, Taught)

        def head(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
            def given(values: object, dtype: torch.dtype) -> Tensor:
                return torch.as_tensor(values, dtype=dtype, device=hidden.device)

            return torch.stack(
                distillation_losses(
                    hidden,
                    weight,
                    given(window.labels, torch.int64),
                    given(window.top, torch.int64),
                    given(window.top_log_probs, torch.float32),
                    softcap,
                )
            )

        labels, divergences = network(window, head)
        loss = self._weight * divergences.sum() + (1 - self._weight) * labels.sum()
        n, label_loss = len(labels), labels.sum().item()
        metrics = {"label_loss": (label_loss, n), "kl": (divergences.sum().item(), n)}
        return Outcome(loss, metrics | bits_per_byte(label_loss, window, self._token_bytes))
