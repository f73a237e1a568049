"""`BlockPool`: who owns which KV-cache block, and what of them can be used again for another sequence.

Knows block numbers, reference counts and tokens; neither requests nor what lies in a block. One caller at a time
(`Engine` holds its lock).

Blocks with computed tokens form a radix tree: a block's tokens follow those of its ancestors, from the root on, and
keys and values depend on nothing else but the adapter, of which each has a root of its own. So a block found along the
tokens of a new sequence may stand in for computing them: a full one is shared; of the next, full or not, the tokens
that agree are copied. Who references a block references its ancestors. Blocks that nobody references stay in the tree
until their room is needed; the one unused for longest goes first, which is never one with descendants.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapji.ops.batch import KV_BLOCK

_TOKEN_BYTES = 4
_BLOCK_BYTES = KV_BLOCK * _TOKEN_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """What the tree holds of a sequence, from its beginning."""

    blocks: list[int]
    """Full ones."""
    partial: int | None
    """The block whose first `n_partial` tokens come next; None: n_partial is 0."""
    n_partial: int

    @property
    def n_tokens(self) -> int:
        return len(self.blocks) * KV_BLOCK + self.n_partial


class BlockPool:
    """Every block is free, cached (in the tree, unreferenced) or referenced by one or more sequences."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.root = n_blocks
        """Stands for the parent of first blocks; of sequences with adapter a it is root + a."""
        self.copies: list[tuple[int, int]] = []
        """(source, target) of blocks to copy, in this order, before anything else is written; the caller empties it."""
        self._free = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * n_blocks
        # The tree: a block in it is children[parent][tokens], tokens as the bytes of int32.
        self._parent: list[int | None] = [None] * n_blocks
        self._tokens = [b""] * n_blocks
        self._children: defaultdict[int, dict[bytes, int]] = defaultdict(dict)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    def find(self, tokens: NDArray[np.int32], adapter: int = 0) -> Prefix:
        """The longest prefix of `tokens` in the tree, as computed with that adapter. Takes no reference."""
        data = tokens.tobytes()
        blocks: list[int] = []
        children = self._children[self.root + adapter]
        for at in range(0, len(data) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
            if (full := children.get(data[at : at + _BLOCK_BYTES])) is None:
                break
            blocks.append(full)
            children = self._children[full]
        rest = data[len(blocks) * _BLOCK_BYTES :][:_BLOCK_BYTES]
        partial, n_partial = None, 0
        for key, block in children.items():
            n = _common_tokens(key, rest)
            if n > n_partial:
                partial, n_partial = block, n
        return Prefix(blocks=blocks, partial=partial, n_partial=n_partial)

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as available now, and no longer would once acquired."""
        return sum(self._references[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these blocks of the tree."""
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1

    def allocate(self) -> int:
        """A block of one's own, with one reference; evicts the cached one unused for longest if none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unlink(block)
        self._references[block] = 1
        return block

    def copy(self, source: int) -> int:
        """`allocate`, and the block will hold what `source` of the tree holds now."""
        if source in self._cached:
            self._cached.move_to_end(source)
        target = self.allocate()
        if target != source:  # where there was no other, the source itself
            self.copies.append((source, target))
        return target

    def publish(self, block: int, tokens: NDArray[np.int32], *, parent: int) -> int:
        """Puts a block that one sequence references into the tree, or says that it holds more than it did.

        tokens: all that it holds, up to KV_BLOCK, after the full block `parent`, which the sequence references too.
        Returns the block that the sequence references now: where the tree has a full one with these tokens, that one.
        """
        assert self._references[block] == 1
        self._unlink(block)
        key = tokens.tobytes()
        siblings = self._children[parent]
        same = siblings.get(key)
        if same is None:
            self._parent[block] = parent
            self._tokens[block] = key
            siblings[key] = block
        elif len(key) == _BLOCK_BYTES:
            self.acquire([same])
            self.release([block])
            return same
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block of a sequence; ends of sequences are evicted before their beginnings."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._parent[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _unlink(self, block: int) -> None:
        """Takes the block out of the tree, if it is there."""
        assert not self._children[block]
        parent = self._parent[block]
        if parent is not None:
            del self._children[parent][self._tokens[block]]
            self._parent[block] = None


def _common_tokens(a: bytes, b: bytes) -> int:
    """How many tokens a and b have in common from their beginnings."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // _TOKEN_BYTES
    return next(i for i in range(size) if a[i] != b[i]) // _TOKEN_BYTES
