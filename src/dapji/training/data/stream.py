"""`Stream`: windows of packed samples in shuffled order, epoch after epoch; where it stands is a number.

The windows of an epoch follow from the lengths of the samples and the seed alone. Ranks take them in turn, so that any
number of ranks sees the same windows in the same order, and goes on from any place of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ContextError
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.training.data.dataset import Dataset
from dapji.training.data.packing import pack
from dapji.training.data.permutation import Permutation


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """T tokens of B sequences, one after the other, which do not see each other."""

    tokens: NDArray[np.int32]
    """[T]"""
    learned: NDArray[np.bool_]
    """[T] as `Sequence.learned`; never a sequence's first."""
    starts: NDArray[np.int32]
    """[B + 1] sequence b is tokens[starts[b] : starts[b + 1]]."""
    samples: NDArray[np.int64]
    """[B] the number of the sample of each sequence, in the data set."""
    good: NDArray[np.int8]
    """[B] as in `Dataset`: 1 or 0 of a rated answer, else -1."""

    @property
    def segments(self) -> NDArray[np.int32]:
        """[T] the number b of the sequence that each token is of."""
        return np.repeat(np.arange(len(self.samples), dtype=np.int32), np.diff(self.starts))

    @property
    def positions(self) -> NDArray[np.int32]:
        """[T] from 0 in each sequence."""
        return np.arange(len(self.tokens), dtype=np.int32) - self.starts[self.segments]

    @property
    def labels(self) -> NDArray[np.int32]:
        """[R] the learned tokens: what the rows of `batch` have to predict."""
        return self.tokens[self.learned]

    @property
    def prefixes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[U] numbers of the tokens before which their sequences are unlike all earlier ones, or which are unlike what
        follows there; and [T] which of these each token is the same as, all before it included."""
        first: list[int] = []
        places = np.empty(len(self.tokens), dtype=np.int64)
        after: dict[tuple[int, int], int] = {}  # the one before and the token -> its number
        tokens = self.tokens.tolist()
        for start, end in pairwise(self.starts.tolist()):
            number = -1
            for i in range(start, end):
                number = after.setdefault((number, tokens[i]), len(first))
                if number == len(first):
                    first.append(i)
                places[i] = number
        return np.array(first, dtype=np.int64), places

    def select(self, sequences: NDArray[np.bool_]) -> Window:
        """Some of its sequences alone, in their order. sequences: [B], whether each is wanted; at least one is."""
        tokens = np.repeat(sequences, np.diff(self.starts))
        return Window(
            tokens=self.tokens[tokens],
            learned=self.learned[tokens],
            starts=np.concatenate([[0], np.cumsum(np.diff(self.starts)[sequences])]).astype(np.int32),
            samples=self.samples[sequences],
            good=self.good[sequences],
        )

    def parts(self) -> Sequence[Window]:
        """Windows that are computed instead, one after another, so that less is in memory."""
        return (self,)

    def batch(self) -> Batch:
        """For an executor, each sequence in cache blocks of its own; logits only where a learned token follows."""
        lengths = np.diff(self.starts)
        needed = -(-lengths // KV_BLOCK)
        blocks = np.full((len(lengths), int(needed.max())), -1, dtype=np.int32)
        blocks[np.arange(blocks.shape[1]) < needed[:, None]] = np.arange(needed.sum())
        rows = (np.flatnonzero(self.learned) - 1).astype(np.int32)
        return Batch(tokens=self.tokens, positions=self.positions, starts=self.starts, blocks=blocks, rows=rows)


class Stream:
    """Windows by number, without end. Safe to make anew anywhere: it holds nothing but the plan of one epoch."""

    def __init__(self, dataset: Dataset, *, capacity: int, seed: int = 0) -> None:
        """capacity: tokens of a window. Raises ContextError where a sample is longer."""
        self.dataset = dataset
        self._capacity = capacity
        self._seed = seed
        longest = int(dataset.lengths.argmax())
        if dataset.lengths[longest] > capacity:
            raise ContextError(
                f"sample {longest} has {dataset.lengths[longest]} tokens, a window {capacity}",
                hint="larger windows, or a shorter longest sequence",
            )
        self._begins = [0]  # the first window of each epoch, as far as they have been planned
        self._plan: tuple[int, list[NDArray[np.int64]]] = (-1, [])

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """The windows of an epoch, from 0: which samples each holds."""
        if self._plan[0] != number:
            # Epochs get seeds far apart, so that epoch 1 of a seed is not epoch 0 of the next.
            order = Permutation(len(self.dataset), self._seed + (number << 32)).at(np.arange(len(self.dataset)))
            windows = pack(self.dataset.lengths[order].tolist(), self._capacity)
            self._plan = (number, [order[window] for window in windows])
        return self._plan[1]

    def locate(self, index: int) -> tuple[int, int]:
        """The epoch of a window, and its number in it."""
        while self._begins[-1] <= index:
            self._begins.append(self._begins[-1] + len(self.epoch(len(self._begins) - 1)))
        number = next(e for e in range(len(self._begins) - 2, -1, -1) if self._begins[e] <= index)
        return number, index - self._begins[number]

    def window(self, index: int) -> Window:
        """Window `index` of all epochs, counted from 0."""
        number, place = self.locate(index)
        samples = self.epoch(number)[place]
        found = [(int(i), self.dataset[int(i)]) for i in samples]
        sequences = [(i, sequence, sample.good) for i, sample in found for sequence in sample.sequences]
        starts = np.cumsum([0, *(len(sequence.ids) for _, sequence, _ in sequences)], dtype=np.int32)
        return Window(
            tokens=np.concatenate([sequence.ids for _, sequence, _ in sequences]),
            learned=np.concatenate([sequence.learned for _, sequence, _ in sequences]),
            starts=starts,
            samples=np.array([i for i, _, _ in sequences], dtype=np.int64),
            good=np.array([-1 if good is None else good for _, _, good in sequences], dtype=np.int8),
        )

    def take(self, indices: Sequence[int]) -> list[Window]:
        """The windows of these numbers."""
        return [self.window(index) for index in indices]

    def windows(self, start: int = 0, *, rank: int = 0, ranks: int = 1) -> Iterator[Window]:
        """Every `ranks`th window from start + rank on, without end. start: how many all ranks together have taken."""
        return (self.window(index) for index in count(start + rank, ranks))
