"""`Scheduler`: which tokens of which sequences go into the next step, and in which KV blocks they live.

Knows tokens, positions and blocks; neither sampling nor threads nor what a sequence is for. One caller at a time
(`Engine` holds its lock).

The policy, in full:

- Sequences are admitted in the order of arrival, when there are blocks for all their tokens so far; none overtakes
  one that waits for blocks.
- What another sequence is reading now is not read beside it: as long as that saves a block or more, a sequence waits.
- A step holds at most `budget` tokens. Every admitted sequence that needs a single token gets it: a stream advances at
  every step. The prompts get the rest, but beside streams at most `mixed_prompt_tokens`, so that a long prompt slows
  streams down instead of stopping them. They share it evenly; what a short one leaves goes to the longer.
- In a step of streams alone each may add proposed tokens (`Sequence.propose`), up to an even share of what is left of
  MAX_STEP_TOKENS and as far as there are blocks. With more than half as many streams none does: the step is as good as
  full.
- A sequence that needs a block when none is left takes those of the youngest, which goes back to the head of the
  queue and is computed again later (its tokens are kept). The oldest always advances, so every sequence ends.
- Sequences in the background come after all others: in the queue, and where blocks are short, also of one that waits to
  be admitted. Beside streams that are not, their tokens are computed as any.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from dapji.engine.blocks import BlockPool
from dapji.engine.speculation import MAX_STEP_TOKENS
from dapji.ops.batch import KV_BLOCK, Batch

MAX_ROWS = 128
"""Most rows of logits that one sequence asks for in a step: 128 rows of 152k float32 are 78 MB."""


class Sequence:
    """Tokens on their way through the model.

    `computed` <= `wanted` < `length`: the cache holds the first `computed` tokens; logits, or hidden states, are wanted
    from position `wanted` on. Once wanted == length there is nothing left to do.
    """

    wants_hidden = False
    """Hidden states rather than logits."""
    background = False
    """Others go first."""

    def __init__(self, tokens: NDArray[np.int32], *, length: int, wanted: int, adapter: int = 0) -> None:
        """tokens: room for all that the sequence may ever hold, the first `length` filled."""
        self.tokens = tokens
        self.adapter = adapter
        self.length = length
        self.wanted = wanted
        self.computed = 0
        self.blocks = array("i")  # an array, so that numpy copies it as a whole at every step
        self.cached: int | None = None
        """Tokens found in the cache at the first admission; None before it."""

    @property
    def remaining(self) -> int:
        return self.length - self.computed

    def propose(self, limit: int, *, beside: int) -> int:
        """Writes up to `limit` likely next tokens into `tokens`; returns how many. None here.

        The next step computes them; they become part of the sequence once `length` has passed over them. beside: other
        tokens in that step.
        """
        return 0

    def admit(self, pool: BlockPool) -> bool:
        """Takes cached blocks and fresh ones for all tokens so far; False, and nothing taken, if they do not suffice.

        What is cached counts only before `wanted`: tokens of which something is wanted must be computed.
        """
        found = pool.find(self.tokens[: self.wanted], self.adapter)
        n_fresh = _n_blocks(self.length) - len(found.blocks)
        if n_fresh > pool.available - pool.unreferenced(found.blocks):
            return False
        pool.acquire(found.blocks)
        self.blocks.extend(found.blocks)
        if found.partial is not None:
            self.blocks.append(pool.copy(found.partial))
        self.blocks.extend(pool.allocate() for _ in range(_n_blocks(self.length) - len(self.blocks)))
        self.computed = found.n_tokens
        if self.cached is None:
            self.cached = self.computed
        return True

    def awaits(self, other: Sequence) -> bool:
        """The other, which is running, has yet to read at least a block's worth of what this one could share."""
        end = other.computed + KV_BLOCK
        if self.adapter != other.adapter or end > min(self.wanted, other.length):
            return False
        return np.array_equal(self.tokens[:end], other.tokens[:end])

    def advance(self, end: int, pool: BlockPool) -> None:
        """A step computed the tokens up to `end` and its rows were taken: they can be found from now on.

        What the cache holds beyond `wanted` is of proposed tokens that were not drawn, and will be overwritten.
        """
        first = self.computed // KV_BLOCK
        self.computed = min(end, self.wanted)
        root = pool.root + self.adapter
        for i in range(first, _n_blocks(self.computed)):
            tokens = self.tokens[i * KV_BLOCK : min(self.computed, (i + 1) * KV_BLOCK)]
            self.blocks[i] = pool.publish(self.blocks[i], tokens, parent=self.blocks[i - 1] if i else root)

    def release(self, pool: BlockPool) -> None:
        pool.release(self.blocks)
        del self.blocks[:]
        self.computed = 0


def _n_blocks(n_tokens: int) -> int:
    return -(-n_tokens // KV_BLOCK)


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk(Generic[S]):
    """A sequence's share of a step."""

    sequence: S
    end: int
    """Its tokens up to here are computed; those from `sequence.length` on are proposed."""
    rows: slice
    """Its rows of the step's logits, or hidden states: positions `sequence.wanted` to end - 1. May be empty."""


class Scheduler(Generic[S]):
    """Admitted sequences in order of arrival, the queue of the others, and the block pool."""

    def __init__(self, *, n_blocks: int, budget: int, mixed_prompt_tokens: int, max_running: int) -> None:
        """max_running <= budget, so that every admitted sequence gets at least one token of every step."""
        assert 1 <= max_running <= budget
        assert mixed_prompt_tokens >= 1
        self.pool = BlockPool(n_blocks)
        self._budget = budget
        self._mixed_prompt_tokens = mixed_prompt_tokens
        self._max_running = max_running
        self._running: list[S] = []
        self._waiting: deque[S] = deque()

    def __iter__(self) -> Iterator[S]:
        """Every sequence that has not ended."""
        yield from self._running
        yield from self._waiting

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, sequence: S) -> None:
        """Its tokens, all that it may ever hold, must fit into the pool's blocks."""
        assert len(sequence.tokens) <= self.pool.n_blocks * KV_BLOCK
        self._waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """The sequence ended; its blocks are free at once. Nothing happens if it had ended before."""
        if sequence in self._running:
            self._running.remove(sequence)
            sequence.release(self.pool)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def advance(self, chunks: list[Chunk[S]]) -> None:
        """The step is done and its rows are taken. Sequences that were removed meanwhile are passed over."""
        for chunk in chunks:
            if chunk.sequence.blocks:
                chunk.sequence.advance(chunk.end, self.pool)

    def plan(self) -> tuple[list[tuple[int, int]], list[Chunk[S]], Batch]:
        """The next step: blocks to copy before it, as (source, target) in this order; shares of it; and the batch.

        The scheduler must be busy.
        """
        self._grow()
        self._admit()
        chunks: list[Chunk[S]] = []
        n_rows = {False: 0, True: 0}  # of logits, of hidden states
        # Those with one adapter side by side, so that the executor reads its matrices once.
        for sequence, end in sorted(self._shares(), key=lambda share: share[0].adapter):
            first = n_rows[sequence.wants_hidden]
            n_rows[sequence.wants_hidden] = last = first + max(0, end - sequence.wanted)
            chunks.append(Chunk(sequence=sequence, end=end, rows=slice(first, last)))
        assert chunks, "the oldest sequence always fits"
        copies, self.pool.copies = self.pool.copies, []
        return copies, chunks, _batch(chunks, n_logits=n_rows[False], n_hidden=n_rows[True])

    def _grow(self) -> None:
        """A block for every admitted sequence whose next token has none; the oldest are served first."""
        i = 0
        while i < len(self._running):
            sequence = self._running[i]
            if sequence.length > len(sequence.blocks) * KV_BLOCK:
                if not self.pool.available:
                    background = self._youngest_in_background()
                    last = len(self._running) - 1 if background is None else background
                    self._send_back(last)
                    i -= last < i
                    continue
                sequence.blocks.append(self.pool.allocate())
            i += 1

    def _youngest_in_background(self) -> int | None:
        """Its place among those that run."""
        return max((i for i, sequence in enumerate(self._running) if sequence.background), default=None)

    def _send_back(self, i: int) -> None:
        sequence = self._running.pop(i)
        sequence.release(self.pool)
        self._waiting.appendleft(sequence)

    def _enter(self, sequence: S) -> bool:
        """Whether it has its blocks, those of the background if need be."""
        while not sequence.admit(self.pool):
            youngest = None if sequence.background else self._youngest_in_background()
            if youngest is None:
                return False
            self._send_back(youngest)
        return True

    def _admit(self) -> None:
        for sequence in sorted(self._waiting, key=lambda sequence: sequence.background):
            if len(self._running) == self._max_running:
                break
            if any(sequence.awaits(other) for other in self._running):
                continue
            if not self._enter(sequence):
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)

    def _shares(self) -> Iterator[tuple[S, int]]:
        """Each sequence of the step with the end of its chunk."""
        streams = [sequence for sequence in self._running if sequence.remaining == 1]
        prompts = [sequence for sequence in self._running if sequence.remaining > 1]
        n_tokens = len(streams)
        most = 0 if prompts or 2 * n_tokens > MAX_STEP_TOKENS else min(MAX_STEP_TOKENS, self._budget)
        for i, sequence in enumerate(streams):
            limit = (most - n_tokens) // (len(streams) - i)
            n_proposed = self._propose(sequence, limit, beside=n_tokens - 1) if limit > 0 else 0
            yield sequence, sequence.length + n_proposed
            n_tokens += n_proposed
        left = self._budget - n_tokens
        if streams:
            left = min(left, max(self._mixed_prompt_tokens, len(prompts)))
        prompts.sort(key=lambda sequence: sequence.remaining)
        for i, sequence in enumerate(prompts):
            rest = sequence.remaining
            if not sequence.wants_hidden:
                rest = min(rest, sequence.wanted + MAX_ROWS - sequence.computed)
            take = min(rest, left // (len(prompts) - i))
            yield sequence, sequence.computed + take
            left -= take

    def _propose(self, sequence: S, limit: int, *, beside: int) -> int:
        """How many tokens the sequence proposes, limit < KV_BLOCK. No other gives up blocks for them."""
        n_proposed = sequence.propose(limit, beside=beside)
        slots = len(sequence.blocks) * KV_BLOCK - sequence.length
        if n_proposed > slots and self.pool.available:
            sequence.blocks.append(self.pool.allocate())
            slots += KV_BLOCK
        return min(n_proposed, slots)


def _batch(chunks: list[Chunk[S]], *, n_logits: int, n_hidden: int) -> Batch:
    n_tokens = sum(chunk.end - chunk.sequence.computed for chunk in chunks)
    n_blocks = max(_n_blocks(chunk.end) for chunk in chunks)
    tokens = np.empty(n_tokens, dtype=np.int32)
    positions = np.empty(n_tokens, dtype=np.int32)
    starts = np.zeros(len(chunks) + 1, dtype=np.int32)
    blocks = np.full((len(chunks), n_blocks), -1, dtype=np.int32)
    rows, hidden_rows = np.empty(n_logits, dtype=np.int32), np.empty(n_hidden, dtype=np.int32)
    adapters = np.array([chunk.sequence.adapter for chunk in chunks], dtype=np.int32)
    at = 0
    for b, chunk in enumerate(chunks):
        sequence = chunk.sequence
        first, end = sequence.computed, chunk.end
        stop = at + end - first
        tokens[at:stop] = sequence.tokens[first:end]
        positions[at:stop] = np.arange(first, end)
        n_used = _n_blocks(end)
        blocks[b, :n_used] = sequence.blocks[:n_used]
        own = hidden_rows if sequence.wants_hidden else rows
        own[chunk.rows] = np.arange(stop - (chunk.rows.stop - chunk.rows.start), stop)
        at = stop
        starts[b + 1] = at
    return Batch(
        tokens=tokens,
        positions=positions,
        starts=starts,
        blocks=blocks,
        rows=rows,
        hidden_rows=hidden_rows,
        adapters=adapters if adapters.any() else None,
    )
