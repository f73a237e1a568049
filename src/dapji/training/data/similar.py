"""Texts that are nearly the same, and texts that share a run of words. Plain strings: knows no examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHINGLE = 8
"""Characters. Two texts are as similar as the sets of all their runs of so many characters (Jaccard's index)."""
THRESHOLD = 0.8
_BANDS, _ROWS = 8, 4
"""Of the signature: of pairs as similar as 0.8 they find 98 %, of those of 0.9 all but one in 5,000."""
_MAX_COMPARED = 16
"""Earlier texts of a bucket that one is compared with: a thousand copies of a text are no million pairs."""
_BLOCK = 1 << 14
"""Shingles at a time: a whole book is one text."""
RUN = 8
"""Words in a row that two texts have to share to overlap."""


class Pair(NamedTuple):
    """Two texts by number."""

    later: int
    earlier: int
    similarity: float


def normalised(text: str) -> str:
    """Without case and with single spaces: what is compared."""
    return " ".join(text.casefold().split())


def near_duplicates(
    texts: Sequence[str], *, threshold: float = THRESHOLD, progress: Callable[[], None] = lambda: None
) -> list[Pair]:
    """For each text that is as similar as `threshold` to an earlier one: the pair, with the most similar one found.

    MinHash (Broder 1997) in bands, each pair found so is then compared exactly. texts: as `normalised` gives them, none
    twice. progress: called once a text.
    """
    random = np.random.default_rng(0)
    factors = random.integers(0, 1 << 63, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 1 << 63, _BANDS * _ROWS, dtype=np.uint64)
    buckets: dict[bytes, list[int]] = {}
    pairs = []
    for number, text in enumerate(texts):
        shingles = _shingles(text)
        blocks = (shingles[at : at + _BLOCK, None] for at in range(0, len(shingles), _BLOCK))
        signature = np.min([np.min(block * factors + offsets, axis=0) for block in blocks], axis=0)
        candidates: set[int] = set()
        for band, row in enumerate(signature.reshape(_BANDS, _ROWS)):
            bucket = buckets.setdefault(bytes([band]) + row.tobytes(), [])
            candidates.update(bucket[:_MAX_COMPARED])
            bucket.append(number)
        if candidates:
            best = max((_jaccard(shingles, _shingles(texts[other])), -other) for other in candidates)
            if best[0] >= threshold:
                pairs.append(Pair(number, -best[1], best[0]))
        progress()
    return pairs


def overlaps(texts: Iterable[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """Which of `others` share RUN words in a row with which of `texts`, the first that does: (other, text).

    An other that is shorter overlaps with a text of which it is one line. All as `normalised` gives them, line by line.
    """
    words: dict[str, int] = {}
    lines: dict[str, int] = {}
    runs, owners = [], []
    for number, text in enumerate(texts):
        for line in text.split("\n"):
            lines.setdefault(line, number)
        found = _runs([words.setdefault(word, len(words)) for word in text.split()], RUN)
        runs.append(found)
        owners.append(np.full(len(found), number))
    every = np.concatenate([*runs, np.zeros(0, np.uint64)])
    known, first = np.unique(every, return_index=True)
    owner = np.concatenate([*owners, np.zeros(0, np.int64)])[first].astype(int)
    pairs = []
    for number, text in enumerate(others):
        asked = text.split()
        if len(asked) < RUN:
            if text in lines:
                pairs.append((number, lines[text]))
            continue
        found = _runs([words.get(word, -1) for word in asked], RUN)
        hits = owner[np.searchsorted(known, found[np.isin(found, known)])]
        if len(hits):
            pairs.append((number, int(hits.min())))
    return pairs


def _shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of all runs of SHINGLE characters, each once; of a shorter text, that of the text. Never empty."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return np.unique(_runs(codes, min(SHINGLE, max(1, len(codes)))))


def _runs(values: Sequence[int] | NDArray[np.uint32], size: int) -> NDArray[np.uint64]:
    """A hash of every `size` values in a row; [max(0, n - size + 1)], of no value at all a single one."""
    given = np.asarray(values, dtype=np.int64).astype(np.uint64)
    if not len(given):
        return np.zeros(1 if size == 1 else 0, dtype=np.uint64)
    hashes = np.zeros(max(0, len(given) - size + 1), dtype=np.uint64)
    for k in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + given[k : k + len(hashes)] + np.uint64(1)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
