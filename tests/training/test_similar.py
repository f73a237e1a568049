"""Near-duplicates and overlaps against sets of strings, compared one by one."""

from __future__ import annotations

import random

from dapji.training.data.similar import RUN, SHINGLE, near_duplicates, normalised, overlaps


def shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def varied(n: int) -> list[str]:
    """Texts of random words, every third an earlier one with some letters changed."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefg가나다라", k=draw.randint(2, 9))) for _ in range(500)]
    texts: list[str] = []
    for i in range(n):
        text = " ".join(draw.choices(words, k=draw.randint(1, 60)))
        if i % 3 == 2:
            letters = list(draw.choice(texts))
            for _ in range(draw.randint(0, 8)):
                letters[draw.randrange(len(letters))] = "z"
            text = "".join(letters)
        texts.append(normalised(text))
    return list(dict.fromkeys(texts))


def test_near_duplicates_are_those_of_exact_sets() -> None:
    texts = varied(300)
    expected = {}
    for i, text in enumerate(texts):
        best = max(((jaccard(text, other), -j) for j, other in enumerate(texts[:i])), default=(0.0, 0))
        if best[0] >= 0.8:
            expected[i] = (-best[1], best[0])
    found = {pair.later: (pair.earlier, pair.similarity) for pair in near_duplicates(texts)}
    assert len(expected) > 25
    assert found.keys() <= expected.keys()
    for i, (_, similarity) in found.items():
        assert similarity >= 0.8
        assert similarity <= expected[i][1] + 1e-12
    # The signatures find a pair of similarity s with 1 - (1 - s^4)^8: 0.98 at 0.8, and all but surely from 0.9 on.
    missed = [i for i in expected if i not in found]
    assert len(missed) <= 2
    assert all(expected[i][1] < 0.9 for i in missed)
    assert sum(found[i] == expected[i] for i in found) >= len(found) - 2


def test_overlaps_are_runs_of_words() -> None:
    draw = random.Random(1)
    words = ["하나", "둘", "셋", "넷", "a", "b", "c", "d"]
    texts = ["\n".join(" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(2)) for _ in range(200)]
    others = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(100)] + [
        line for text in texts[:5] for line in text.split("\n")
    ]

    def runs(text: str) -> set[tuple[str, ...]]:
        split = text.split()
        return {tuple(split[i : i + RUN]) for i in range(len(split) - RUN + 1)}

    def first(other: str) -> int | None:
        short = len(other.split()) < RUN
        return next(
            (i for i, text in enumerate(texts) if (other in text.split("\n") if short else runs(text) & runs(other))),
            None,
        )

    expected = [(i, found) for i, other in enumerate(others) if (found := first(other)) is not None]
    assert 5 < len(expected) < len(others)
    assert overlaps(texts, others) == expected


def test_long_and_odd_texts() -> None:
    book = "한 줄 and another. " * 20_000
    assert near_duplicates([book, "", "a", "\ud800", book + "!"])[0][:2] == (4, 0)
    assert normalised("  A\n\tb  ") == "a b"
