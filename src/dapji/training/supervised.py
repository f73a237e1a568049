"""Supervised training: each learned token's own loss, counted alike."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dapji.tokenizer import Tokenizer
from dapji.training.data.stream import Window
from dapji.training.loss import token_losses
from dapji.training.network import Network
from dapji.training.trainer import Method, Outcome


class Supervised(Method):
    """-log p of every learned token, over their number."""

    def __init__(self, token_bytes: NDArray[np.int64] | None = None) -> None:
        """token_bytes: as `bits_per_byte` takes it."""
        self._token_bytes = token_bytes

    def count(self, window: Window) -> int:
        return int(window.learned.sum())

    def loss(self, network: Network, window: Window) -> Outcome:
        loss = losses_of(network, window).sum()
        return Outcome(loss, bits_per_byte(loss.item(), window, self._token_bytes))


def losses_of(network: Network, window: Window) -> Tensor:
    """-log p of each learned token after all before it, [R] float32."""

    def head(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
        import torch

        labels = torch.as_tensor(window.labels, dtype=torch.int64, device=hidden.device)
        return token_losses(hidden, weight, labels, softcap)

    losses: Tensor = network(window, head)
    return losses


def bits_per_byte(loss: float, window: Window, token_bytes: NDArray[np.int64] | None) -> dict[str, tuple[float, float]]:
    """What a text takes when it is written by the model's probabilities: comparable between tokenizers. A metric as in
    `Outcome`.

    loss: the sum over the window's learned tokens. token_bytes: [V] of text that each token stands for, as
    `bytes_of_tokens`; None: the metric is not wanted.
    """
    if token_bytes is None:
        return {}
    return {"bits_per_byte": (loss / math.log(2), int(token_bytes[window.labels].sum()))}


def bytes_of_tokens(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int64]:
    """[vocab_size] of text. A control token has none, but its loss counts: that a text ends has to be written too."""
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for token in range(tokenizer.vocab_size):
        if not tokenizer.is_control(token):
            sizes[token] = len(tokenizer.token_bytes(token))
    return sizes
