"""`Permutation`: a shuffled order of n samples, any place of which is computed alone.

A Feistel network over the smallest even number of bits that holds n, walked until it lands below n (Black and Rogaway
2002, "Ciphers with arbitrary finite domains"). So where a run stands in the order is a number, on any number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """Of 0 … n - 1. The same for the same n and seed, everywhere."""

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0
        self._n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        keys = [_mixed(np.array([(seed * _ROUNDS + i) & _MASK], dtype=np.uint64))[0] for i in range(_ROUNDS)]
        self._keys: list[np.uint64] = keys

    def __len__(self) -> int:
        return self._n

    def at(self, places: NDArray[np.integer]) -> NDArray[np.int64]:
        """The samples at these places, each from 0 to n - 1."""
        found = self._scrambled(places.astype(np.uint64))
        while (beyond := found >= self._n).any():
            found[beyond] = self._scrambled(found[beyond])
        return found.astype(np.int64)

    def _scrambled(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._low)
        return (left << self._half) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
