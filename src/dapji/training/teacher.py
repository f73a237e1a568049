"""What a teacher thinks of each learned token: its likeliest tokens there, computed by the engine once and kept.

A run that was cut off goes on with what is missing. The size is known before: k tokens and their log-probabilities, 8
bytes each, for every learned token.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist

from dapji.engine import BaseEngine
from dapji.errors import ConfigError, UsageError
from dapji.tokenizer import Tokenizer
from dapji.training.data.dataset import Dataset
from dapji.training.data.stream import Stream, Window
from dapji.training.sharding import is_first, together
from dapji.weights.files import replacing

_TOGETHER = 32
"""Examples that are given to the engine at a time, and written when all are done."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Taught(Window):
    """A window with what a teacher thinks of it."""

    top: NDArray[np.int32]
    """[R, k] the teacher's likeliest tokens in the place of each learned token, likeliest first."""
    top_log_probs: NDArray[np.float32]
    """[R, k] by the teacher."""


class TaughtSource:
    """The windows of a stream of texts."""

    def __init__(self, stream: Stream, opinions: Opinions) -> None:
        self._stream = stream
        self._opinions = opinions

    def take(self, indices: Sequence[int]) -> Sequence[Taught]:
        return [self._taught(window) for window in self._stream.take(indices)]

    def _taught(self, window: Window) -> Taught:
        found = [self._opinions[int(sample)] for sample in window.samples]
        return Taught(
            **vars(window),
            top=np.concatenate([each["token"] for each in found]),
            top_log_probs=np.concatenate([each["log_prob"] for each in found]),
        )


class Opinions:
    """Of a teacher, by the number of a sample: [n, k] of its n learned tokens, with fields `token` and `log_prob`."""

    def __init__(self, path: Path, dataset: Dataset, k: int, *, vocab_size: int) -> None:
        """Opens the file, or makes it, with nothing known; all ranks do. vocab_size: the student's.

        Raises UsageError where the disk has no room, or k is all of the vocabulary.
        """
        if k >= vocab_size:
            raise UsageError(f"method.k ({k}) must be less than the vocabulary's {vocab_size}")
        self._vocab_size = vocab_size
        self._dataset = dataset
        counts = [sum(int(each.learned.sum()) for each in dataset[i].sequences) for i in range(len(dataset))]
        self._starts = np.cumsum([0, *counts])
        shape = (int(self._starts[-1]), k)
        kind = np.dtype([("token", np.int32), ("log_prob", np.float32)])
        if is_first() and not path.exists():
            _check_room(path, shape[0] * k * kind.itemsize)
            unknown = np.array([(0, np.nan)] * k, dtype=kind).tobytes()
            with replacing(path) as file:
                for count in counts:
                    file.write(unknown * count)
        together()
        self._values: NDArray[Any] = np.memmap(path, dtype=kind, mode="r+", shape=shape)

    def __getitem__(self, sample: int) -> NDArray[Any]:
        return self._values[self._starts[sample] : self._starts[sample + 1]]

    def missing(self) -> list[int]:
        """Samples of which nothing is known yet."""
        return [i for i in range(len(self._dataset)) if np.isnan(self[i]["log_prob"]).any()]

    def compute(self, teacher: BaseEngine, progress: Callable[[int, int], None]) -> None:
        """What is missing. All ranks call this, each with a teacher of its own. progress: samples done, of how many."""
        missing = self.missing()
        together()  # all ranks have seen what is missing before one of them writes
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        k = self._values.shape[1]

        def ask(sample: int) -> NDArray[Any]:
            (sequence,) = self._dataset[sample].sequences
            start = int(sequence.learned.argmax())
            scores = teacher.score(sequence.ids, start=start, n_top=k)
            wanted = [top for top, learned in zip(scores.top, sequence.learned[start:], strict=True) if learned]
            values = np.array([list(top) for top in wanted], dtype=self._values.dtype)
            if (largest := int(values["token"].max())) >= self._vocab_size:
                raise ConfigError(f"the teacher gives token {largest}, the student has {self._vocab_size}")
            return values

        with ThreadPoolExecutor(_TOGETHER) as pool:
            mine = missing[rank::ranks]
            for at in range(0, len(mine), _TOGETHER):
                samples = mine[at : at + _TOGETHER]
                for sample, values in zip(samples, pool.map(ask, samples), strict=True):
                    self[sample][:] = values
                progress(min((at + _TOGETHER) * ranks, len(missing)), len(missing))
        together()


def check_alike(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raises ConfigError where the two do not have the same tokens."""
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"the teacher has {teacher.vocab_size} tokens, the student {student.vocab_size}",
            hint="a teacher of the same family; or let it write answers (dapji distill), which any may",
        )
    for token in range(student.vocab_size):
        theirs, ours = teacher.token_bytes(token), student.token_bytes(token)
        if theirs != ours:
            raise ConfigError(
                f"token {token} is {theirs!r} to the teacher and {ours!r} to the student",
                hint="a teacher of the same family; or let it write answers (dapji distill), which any may",
            )


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UsageError(
            f"{path.parent}: what the teacher thinks takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="a smaller method.k, or fewer examples",
        )
