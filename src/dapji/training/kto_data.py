"""`mismatched`: rated answers, each also with another example's answer after its prompt, for KTO's reference point.

Who is paired with whom is decided once, for the whole data set: a step's reference point then depends on its examples
alone, and not on how they are split. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dapji.errors import FormatError
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Sample, Sequence
from dapji.training.data.permutation import Permutation


def mismatched(dataset: Dataset, folder: Path, *, max_length: int, seed: int) -> Dataset:
    """Writes into `folder`, which may be that of `dataset`, samples of two sequences: the rated answer, and the same
    prompt with the answer of the example that follows in a shuffled order, so that answers to the same question, which
    often stand beside each other, do not meet. An answer that is too long in this place is cut.

    Raises FormatError where there is one example alone.
    """
    n = len(dataset)
    if n < 2:
        raise FormatError(
            "KTO needs two examples at least", hint="its reference point is of answers to other questions"
        )
    order = Permutation(n, seed).at(np.arange(n))
    after = np.empty(n, dtype=np.int64)
    after[order] = np.roll(order, -1)

    def samples() -> Iterator[Sample]:
        for i in range(n):
            sample = dataset[i]
            (own,), (other,) = sample.sequences, dataset[int(after[i])].sequences
            prompt, answer = own.ids[: _prompt(own)], slice(_prompt(other), None)
            ids = np.concatenate([prompt, other.ids[answer]])[:max_length]
            learned = np.concatenate([np.zeros(len(prompt), dtype=np.bool_), other.learned[answer]])[:max_length]
            yield Sample(sequences=(own, Sequence(ids=ids, learned=learned)), good=sample.good)

    return Dataset.write(folder, samples())


def _prompt(sequence: Sequence) -> int:
    """Tokens before the first that is learned; at least one, and less than all."""
    return int(sequence.learned.argmax())
