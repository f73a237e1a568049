"""`Dataset`: encoded samples in a folder of flat arrays, mapped, so that any of them is read at once by any process."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapji.errors import FormatError
from dapji.training.data.encoding import Sample, Sequence

_FILES: Mapping[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.int32),
    "learned": np.dtype(np.bool_),
    "sequences": np.dtype(np.int64),
    "samples": np.dtype(np.int64),
    "good": np.dtype(np.int8),
}
"""Name -> type, in the byte order of the machine. sequences and samples: [n + 1] where each begins, in tokens and in
sequences. good: [n_samples] 1 or 0 of a rated answer, else -1."""


class Dataset:
    """Samples by number."""

    def __init__(self, folder: Path) -> None:
        """Opens what `write` wrote. Raises FormatError, OSError."""
        arrays = {name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in _FILES.items()}
        self._tokens: NDArray[np.int32] = arrays["tokens"]
        self._learned: NDArray[np.bool_] = arrays["learned"]
        self._sequences: NDArray[np.int64] = arrays["sequences"]
        self._samples: NDArray[np.int64] = arrays["samples"]
        self._good: NDArray[np.int8] = arrays["good"]
        if (
            len(self._tokens) != len(self._learned)
            or not _rises(self._sequences)
            or not _rises(self._samples)
            or self._sequences[-1] != len(self._tokens)
            or self._samples[-1] != len(self._sequences) - 1
            or len(self._good) != len(self._samples) - 1
        ):
            raise FormatError(f"{folder}: its arrays do not fit together", hint="write it again")
        self.lengths: NDArray[np.int64] = np.diff(self._sequences[self._samples])
        """[n] tokens of each sample, all its sequences together."""

    @classmethod
    def write(cls, folder: Path, samples: Iterable[Sample]) -> Dataset:
        """Write samples as they come, keeping none in memory; what was in the folder is replaced when all are there.

        Raises FormatError where there are none, and what `samples` raises.
        """
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        at_token = at_sequence = 0
        with ExitStack() as stack:
            files = {name: stack.enter_context((partial / f"{name}.bin").open("wb")) for name in _FILES}

            def put(name: str, values: object) -> None:
                files[name].write(np.asarray(values, dtype=_FILES[name]).tobytes())

            put("sequences", [0])
            put("samples", [0])
            for sample in samples:
                for sequence in sample.sequences:
                    put("tokens", sequence.ids)
                    put("learned", sequence.learned)
                    at_token += len(sequence.ids)
                    put("sequences", [at_token])
                at_sequence += len(sample.sequences)
                put("samples", [at_sequence])
                put("good", [-1 if sample.good is None else sample.good])
        if not at_sequence:
            raise FormatError("there is no example to learn from")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        bounds = self._sequences[self._samples[index] : self._samples[index + 1] + 1].tolist()
        sequences = tuple(Sequence(ids=self._tokens[a:b], learned=self._learned[a:b]) for a, b in pairwise(bounds))
        return Sample(sequences=sequences, good=None if self._good[index] < 0 else bool(self._good[index]))


def _rises(bounds: NDArray[np.int64]) -> bool:
    return len(bounds) > 1 and bounds[0] == 0 and bool((np.diff(bounds) > 0).all())


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    size = path.stat().st_size
    if size % dtype.itemsize or not size:
        raise FormatError(f"{path}: {size} bytes are no whole number of values", hint="write it again")
    return np.memmap(path, dtype=dtype, mode="r")
