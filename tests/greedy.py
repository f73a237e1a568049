"""Greedy text of an executor, for tests that compare it with another's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dapji.models.executor import Executor
from dapji.ops.batch import Batch


def decode(
    executor: Executor, prompts: list[list[int]], n_tokens: int, follow: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The token of the highest logit [prompts, n_tokens], and how far it lies above the second.

    All prompts in one step, then a token of each per step. What is fed back is that choice, or `follow`: then every
    place is compared, also those after a tie.
    """
    width = executor.n_blocks // len(prompts)
    blocks = np.arange(len(prompts) * width, dtype=np.int32).reshape(-1, width)
    chosen = np.zeros((len(prompts), n_tokens), dtype=np.int64)
    margins = np.zeros((len(prompts), n_tokens), dtype=np.float32)
    pieces = prompts
    pasts = np.zeros(len(prompts), dtype=np.int64)
    for i in range(n_tokens):
        starts = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
        batch = Batch(
            tokens=np.concatenate(pieces).astype(np.int32),
            positions=np.concatenate(
                [past + np.arange(len(piece)) for past, piece in zip(pasts, pieces, strict=True)]
            ).astype(np.int32),
            starts=starts,
            blocks=blocks,
            rows=starts[1:] - 1,
        )
        logits = executor.step(batch)
        best = np.sort(np.partition(logits, -2, axis=1)[:, -2:], axis=1)
        chosen[:, i], margins[:, i] = logits.argmax(axis=1), best[:, 1] - best[:, 0]
        pasts += [len(piece) for piece in pieces]
        pieces = [[token] for token in (chosen if follow is None else follow)[:, i].tolist()]
    return chosen, margins
