"""The FAQ that ships with the project: what its page says of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

from byte_tokenizers import Tokenizers
from dapji.training.data.encoding import Encoder
from dapji.training.data.reading import Reader
from dapji.training.data.report import check

FOLDER = Path(__file__).parents[2] / "runs" / "support-faq"


def test_held_out_questions_are_new_and_their_answers_are_not() -> None:
    train, held_out = (
        [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    asked: dict[str, set[str]] = defaultdict(set)
    for row in train:
        asked[row["messages"][1]["content"]].add(row["messages"][0]["content"])
    assert [len(questions) for questions in asked.values()] == [10, 30] * 5
    topics = Counter((row["topic"], row["language"]) for row in held_out)
    assert list(topics.values()) == [10] * 10
    for row in held_out:
        question, answer = (message["content"] for message in row["messages"])
        assert question not in asked[answer]
        assert answer in asked
        assert row["contains"] in answer
        assert not any(row["contains"] in other for other in asked if other != answer), row["contains"]


def test_every_row_can_be_learned(both: Tokenizers) -> None:
    readers = [Reader(FOLDER / name, Encoder(both.ours)) for name in ("train.jsonl", "held-out.jsonl")]
    report = check(readers[:1], both.ours, evaluation=readers[1])
    assert (report.rows, report.evaluation_rows) == (200, 100)
    assert (report.invalid, report.same, report.overlap) == ([], [], [])
