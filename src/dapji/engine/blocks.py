"""`BlockPool`: who owns which KV-cache block, and which blocks hold a prefix that can be used again.

Knows block numbers, reference counts and keys; neither requests nor what lies in a block. One caller at a time
(`Engine` holds its lock).

A full block is published under a key that names its whole history: key = hash(key of the block before, its tokens).
Keys and values depend on nothing else, so a block found under a key may stand in for computing it. Blocks that nobody
references stay published until their room is needed; the one unused for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


def chain_key(parent: bytes, tokens: NDArray[np.int32]) -> bytes:
    """Key of a block that holds `tokens` after the block `parent` (b"" for the first): 128 bits of BLAKE2b.

    A cryptographic hash, because two histories with one key would silently give a wrong answer.
    """
    return blake2b(parent + tokens.tobytes(), digest_size=16).digest()


class BlockPool:
    """Every block is free, cached (published, unreferenced) or referenced by one or more sequences."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * n_blocks
        self._key_of: list[bytes | None] = [None] * n_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest prefix of `keys`. Takes no reference."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as available now, and no longer would once acquired."""
        return sum(self._references[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these published blocks."""
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1

    def allocate(self) -> int:
        """A block of one's own, with one reference; evicts the cached one unused for longest if none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._key_of[block]
            assert key is not None
            del self._block_of[key]
            self._key_of[block] = None
        self._references[block] = 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """The block is full and will not be written again. If its content is already published, it stays private."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block of a sequence; ends of sequences are evicted before their beginnings."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
