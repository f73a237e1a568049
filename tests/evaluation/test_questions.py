"""Rows of an exam: what is asked, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dapji.errors import FormatError
from dapji.evaluation.questions import read_exam

ROOT = Path(__file__).parents[2]
USER = {"role": "user", "content": "2 + 2?"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    return path


def test_what_is_asked(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "The answer is "}, {"type": "text", "text": "4"}]
    path = write(
        tmp_path / "exam.jsonl",
        {"messages": [USER, said("It is 4.")], "number": 4, "regex": "^It", "topic": "sums"},
        {"prompt": [USER], "system": "Be brief.", "tools": [TOOL], "grade": "It says four."},
        {"prompt": "2 + 2 =", "exact": ["4", "four"], "completion": "4"},
        {"messages": [USER, {"role": "assistant", "content": parts}], "contains": "answer is 4"},
    )
    first, second, third, fourth = read_exam(path)
    assert (first.line, first.prompt, first.reference, first.fields) == (1, [USER], "It is 4.", {"topic": "sums"})
    assert [(check.name, check.expected) for check in first.checks] == [("regex", "^It"), ("number", 4)]
    assert (second.line, second.prompt) == (3, [{"role": "system", "content": "Be brief."}, USER])
    assert (second.tools, second.grade, second.checks, second.text) == ([TOOL], "It says four.", [], "2 + 2?")
    assert (third.prompt, third.reference, third.fields) == ("2 + 2 =", None, {"completion": "4"})
    assert fourth.reference == "The answer is 4"


def test_the_exam_of_the_support_faq() -> None:
    questions = read_exam(ROOT / "runs/support-faq/held-out.jsonl")
    assert len(questions) == 100
    for question in questions:
        (check,) = question.checks
        assert check.passes(question.reference or "")
        assert question.fields.keys() == {"topic", "language"}


def test_the_exam_of_sums() -> None:
    questions = read_exam(ROOT / "runs/arithmetic/held-out.jsonl")
    assert len(questions) == 60
    for question in questions:
        (check,) = question.checks
        assert check.passes(f"The answer is {question.fields['answer']}.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "Expected `object`, got `array`"),
        ({"exact": "4"}, "a row has either messages or prompt"),
        ({"prompt": "a", "messages": [USER], "exact": "4"}, "a row has either messages or prompt, not both"),
        ({"prompt": "", "exact": "4"}, "prompt is empty"),
        ({"prompt": "a", "system": "b", "exact": "4"}, "a prompt that is a text has no place for system"),
        ({"messages": [], "exact": "4"}, "there is no message to answer"),
        ({"messages": [said("4")], "exact": "4"}, "there is no message to answer"),
        ({"messages": [USER, said("4"), said("4")], "exact": "4"}, "two messages of the assistant's at the end"),
        ({"messages": [{"role": "robot", "content": "a"}], "exact": "4"}, "Invalid enum value 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "exact": "4"}, "Invalid value 'image'"),
        ({"messages": [{"role": "system", "content": "a"}, USER], "system": "b", "exact": "4"}, "system stands in"),
        ({"messages": [USER], "tools": [{"name": "add"}], "exact": "4"}, "Object missing required field `function`"),
        ({"messages": [USER]}, "nothing says what the answer has to be: none of exact, contains, regex"),
        ({"messages": [USER], "exact": None}, "nothing says what the answer has to be"),
        ({"messages": [USER], "grade": " "}, "grade is empty"),
        ({"messages": [USER], "exact": ""}, 'exact is "", expected texts that are not empty'),
        ({"messages": [USER], "exact": ["4", "four"], "number": 4}, "exact 'four' does not pass number: 4"),
        ({"messages": [USER, said("5")], "contains": "4"}, "the reference answer '5' does not pass contains: '4'"),
    ],
)
def test_mistakes(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "exam.jsonl", {"prompt": "a", "exact": "b"}, row)
    with pytest.raises(FormatError) as raised:
        read_exam(path)
    assert f"1 of 2 rows cannot be asked or checked\n  {path}:3: {message}" in raised.value.message


def test_files_without_questions(tmp_path: Path) -> None:
    for data in (b"", b"\n \n"):
        (tmp_path / "empty.jsonl").write_bytes(data)
        with pytest.raises(FormatError, match="there is no question"):
            read_exam(tmp_path / "empty.jsonl")
    (tmp_path / "latin1.jsonl").write_bytes('{"prompt": "é", "exact": "b"}'.encode("latin-1"))
    with pytest.raises(FormatError, match=r"latin1.jsonl:1: "):
        read_exam(tmp_path / "latin1.jsonl")
