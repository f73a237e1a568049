"""What an evaluation found: the file that `dapji eval` writes and reports are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from dapji.errors import FormatError
from dapji.evaluation.answering import Answer, Verdict
from dapji.evaluation.bootstrap import Difference, Score, paired_difference, proportion
from dapji.evaluation.questions import Question
from dapji.weights.files import replacing


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it was asked, by names and paths as they were given."""

    model: str
    adapter: str | None


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A question, and how it was answered. Of a side that was not asked, None."""

    row: int
    """Its line in the file."""
    question: str
    """The last thing said in it."""
    fields: dict[str, Any]
    """What its row says beside question and checks."""
    expected: dict[str, Any]
    """By check, as the row has it; and `reference`, where it has one."""
    answer: str
    checks: dict[str, bool]
    """Which of the checks were passed."""
    score: float
    truncated: bool
    """The answer had become too long."""
    verdict_probability: float | None
    """Of the judge's verdict, where there was one."""
    before_answer: str | None
    before_checks: dict[str, bool] | None
    before_score: float | None
    before_truncated: bool | None
    before_verdict_probability: float | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one kind."""

    score: Score
    before: Score | None
    difference: Difference | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    kind: Literal["exam", "lm-eval"]
    model: str
    adapter: str | None
    against: Examined | None
    """What the model is compared with: "before"."""
    file: str
    """The exam, or the name of the task."""
    sha256: str | None
    """Of the exam."""
    score: Score
    before: Score | None
    difference: Difference | None
    groups: dict[str, dict[str, Comparison]]
    """Field -> value -> the rows that have it."""
    items: list[Item]
    versions: dict[str, str]
    settings: dict[str, Any]


def make_items(
    questions: Sequence[Question],
    answers: Mapping[int, Answer],
    verdicts: Mapping[int, Verdict],
    before: Mapping[int, Answer] | None,
    before_verdicts: Mapping[int, Verdict],
) -> list[Item]:
    """A question's score is 1 where its answer passes all checks, else 0. All by line."""
    return [
        _item(
            question,
            answers[question.line],
            verdicts.get(question.line),
            None if before is None else before[question.line],
            before_verdicts.get(question.line),
        )
        for question in questions
    ]


def _item(
    question: Question, answer: Answer, verdict: Verdict | None, before: Answer | None, before_verdict: Verdict | None
) -> Item:
    expected = {check.name: check.expected for check in question.checks}
    if question.grade is not None:
        expected["grade"] = question.grade
    if question.reference is not None:
        expected["reference"] = question.reference
    checks = _checked(question, answer, verdict)
    before_checks = None if before is None else _checked(question, before, before_verdict)
    return Item(
        row=question.line,
        question=question.text,
        fields=dict(question.fields),
        expected=expected,
        answer=answer.text,
        checks=checks,
        score=float(all(checks.values())),
        truncated=answer.truncated,
        verdict_probability=None if verdict is None else verdict.probability,
        before_answer=None if before is None else before.text,
        before_checks=before_checks,
        before_score=None if before_checks is None else float(all(before_checks.values())),
        before_truncated=None if before is None else before.truncated,
        before_verdict_probability=None if before_verdict is None else before_verdict.probability,
    )


def _checked(question: Question, answer: Answer, verdict: Verdict | None) -> dict[str, bool]:
    passed = {check.name: check.passes(answer.text) for check in question.checks}
    return passed if verdict is None else passed | {"grade": verdict.passed}


def compare(items: Sequence[Item]) -> Comparison:
    """Of items with scores of 0 and 1, at least one."""
    after = [item.score for item in items]
    before = [item.before_score for item in items if item.before_score is not None]
    return Comparison(
        score=proportion(after),
        before=proportion(before) if before else None,
        difference=paired_difference(after, before) if before else None,
    )


def group(items: Sequence[Item], field: str) -> dict[str, Comparison]:
    """By the values of a field, which all have."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(str(item.fields[field]), []).append(item)
    return {value: compare(found[value]) for value in sorted(found)}


def encoded(result: Result) -> bytes:
    """JSON for programs and people, with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"


def write_result(path: Path, result: Result) -> None:
    """Raises UsageError where the disk refuses."""
    with replacing(path) as file:
        file.write(encoded(result))


def read_result(path: Path) -> Result:
    """Raises FormatError where it is no such file, OSError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except msgspec.DecodeError as error:
        raise FormatError(f"{path}: no result of an evaluation: {error}") from error
