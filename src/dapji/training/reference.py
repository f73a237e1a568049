"""Log-probabilities of answers by the model that training begins from: computed once, before the first step, and kept.

So no second model is in memory while one is trained, whether by an adapter or as a whole, and a run that goes on finds
the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from dapji.training.data.stream import Stream, Window
from dapji.training.network import Network
from dapji.training.sharding import is_first, together
from dapji.training.supervised import losses_of
from dapji.weights.files import replacing


@dataclass(frozen=True, kw_only=True, eq=False)
class Referenced(Window):
    """A window of answers."""

    reference: NDArray[np.float32]
    """[B] log p of each sequence's learned tokens, all together, by the model that training begins from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rated(Referenced):
    """A window of rated answers."""

    mismatched: Referenced
    """As many answers, to other questions than their own (`kto_data.mismatched`)."""


class ReferencedSource:
    """The windows of a stream, whose samples have two sequences each."""

    def __init__(self, stream: Stream, reference: NDArray[np.float32]) -> None:
        """reference: as `reference_log_probs` gives it."""
        self._stream = stream
        self._reference = reference

    def take(self, indices: Sequence[int]) -> Sequence[Referenced]:
        return [self._referenced(self._stream.window(index)) for index in indices]

    def _referenced(self, window: Window) -> Referenced:
        return Referenced(**vars(window), reference=self._reference[window.samples[::2]].ravel())


class RatedSource(ReferencedSource):
    """The windows of a stream whose samples are as `kto_data.mismatched` writes them."""

    def take(self, indices: Sequence[int]) -> Sequence[Rated]:
        return [self._rated(window) for window in super().take(indices)]

    def _rated(self, window: Referenced) -> Rated:
        first = np.arange(len(window.samples)) % 2 == 0
        mismatched = Referenced(**vars(window.select(~first)), reference=window.reference[~first])
        return Rated(**vars(window.select(first)), reference=window.reference[first], mismatched=mismatched)


def log_probs(network: Network, window: Window) -> Tensor:
    """log p of each sequence's learned tokens, all together, [B] float32."""
    parts = torch.split(losses_of(network, window), answer_lengths(window).tolist())
    return -torch.stack([part.sum() for part in parts])


def answer_lengths(window: Window) -> NDArray[np.int64]:
    """[B] learned tokens of each sequence."""
    return np.add.reduceat(window.learned, window.starts[:-1], dtype=np.int64)


def reference_log_probs(
    network: Network, stream: Stream, path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> NDArray[np.float32]:
    """[n, 2] of the two sequences of each sample in `stream`, by the network as it is now, kept in the file `path`.

    What is in the file already is not computed again. All ranks call this. progress: windows done, of how many.
    """
    windows = stream.epoch(0)
    n = sum(len(samples) for samples in windows)
    if is_first() and not path.exists():
        with replacing(path) as file:
            file.write(np.full((n, 2), np.nan, dtype=np.float32).tobytes())
    together()
    values = np.memmap(path, dtype=np.float32, mode="r+", shape=(n, 2))
    missing = [number for number, samples in enumerate(windows) if np.isnan(values[samples]).any()]
    together()  # all ranks have seen what is missing before one of them writes
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    network.eval()
    with torch.no_grad():
        for at in range(0, len(missing), ranks):
            # All ranks compute as often, since they gather sharded weights together.
            number = missing[min(at + rank, len(missing) - 1)]
            window = stream.window(number)
            values[window.samples[::2]] = log_probs(network, window).cpu().numpy().reshape(-1, 2)
            progress(min(at + ranks, len(missing)), len(missing))
    network.train()
    values.flush()
    together()
    return np.memmap(path, dtype=np.float32, mode="r", shape=(n, 2))
