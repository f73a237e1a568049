"""`Batch`: the new tokens of one step, of any mix of sequences.

Prompt chunks and single decode tokens stand side by side. Everything that runs a model (chat, server, evaluation,
distillation, rollouts) goes through it. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

KV_BLOCK = 16
"""Tokens per KV-cache block: the unit of allocation and of sharing, and one vector of float32 lanes."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T new tokens of B sequences, sequence after sequence, positions rising by one within each.

    A sequence's earlier tokens are in the KV cache; token at position p lives in slot `p % KV_BLOCK` of block
    `blocks[b, p // KV_BLOCK]`.
    """

    tokens: NDArray[np.int32]
    """[T] token ids."""
    positions: NDArray[np.int32]
    """[T] position of each token in its own sequence, from 0."""
    starts: NDArray[np.int32]
    """[B + 1] sequence b owns the tokens starts[b] : starts[b + 1]; none is empty."""
    blocks: NDArray[np.int32]
    """[B, n] cache blocks of each sequence in order of position; -1 where there is none yet."""
    rows: NDArray[np.int32]
    """[R] rising indices into the T tokens: those whose logits are wanted. May be empty."""
    hidden_rows: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """[N] the same of those whose hidden states are wanted."""
    adapters: NDArray[np.int32] | None = None
    """[B] the adapter of each sequence, by the executor's number; 0, or None for all of them: without."""

    def adapted(self, number: int, n_rows: int) -> NDArray[np.intp]:
        """Which of n_rows, all tokens or those of `rows`, belong to sequences with that adapter."""
        if self.adapters is None:
            return np.empty(0, dtype=np.intp)
        owners = np.repeat(self.adapters, np.diff(self.starts))  # [T]
        return np.flatnonzero((owners if n_rows == len(owners) else owners[self.rows]) == number)

    def slots(self, sequence: int) -> NDArray[np.int64]:
        """[S] cache slots (block * KV_BLOCK + offset) of a sequence's tokens, from position 0 to its last new one."""
        return self.slots_at(np.int64(sequence), np.arange(self.positions[self.starts[sequence + 1] - 1] + 1))

    def slots_at(
        self, sequences: NDArray[np.integer] | np.integer, positions: NDArray[np.integer]
    ) -> NDArray[np.int64]:
        """Cache slots of these positions of these sequences, which are broadcast together."""
        slots: NDArray[np.int64] = self.blocks[sequences, positions // KV_BLOCK].astype(np.int64) * KV_BLOCK
        slots += positions % KV_BLOCK
        return slots

    @staticmethod
    def single(tokens: NDArray[np.int32] | list[int], *, past: int = 0, all_rows: bool = True) -> Batch:
        """One sequence in blocks 0, 1, 2 … : `tokens` follow `past` cached ones. For tests and simple loops."""
        ids = np.asarray(tokens, dtype=np.int32)
        n_blocks = -(-(past + len(ids)) // KV_BLOCK)
        return Batch(
            tokens=ids,
            positions=np.arange(past, past + len(ids), dtype=np.int32),
            starts=np.array([0, len(ids)], dtype=np.int32),
            blocks=np.arange(n_blocks, dtype=np.int32)[None, :],
            rows=np.arange(0 if all_rows else len(ids) - 1, len(ids), dtype=np.int32),
        )
