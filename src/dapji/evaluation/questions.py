"""An exam of the user's own: JSON lines of questions, each with what its answer has to be.

Everything in a file is checked before a model is asked anything. Knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from dapji.chat.turn import text_of
from dapji.errors import FormatError
from dapji.evaluation.checks import CHECKS, Check, make_check

_SHOWN = 5
"""Wrong rows that an error names."""


class _Part(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class _Message(msgspec.Struct):
    """What is checked of a message; its template reads the rest."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None


class _Function(msgspec.Struct):
    name: str


class _Tool(msgspec.Struct):
    function: _Function


class _Row(msgspec.Struct):
    """The keys that mean something, but for those of CHECKS; all others are fields of the question's own."""

    prompt: str | list[_Message] | None = None
    messages: list[_Message] | None = None
    system: str | None = None
    tools: list[_Tool] | None = None
    grade: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    line: int
    """Of the file, from 1."""
    prompt: str | Sequence[Mapping[str, Any]]
    """A text that is given as it is, or messages for the model's chat template."""
    tools: Sequence[Mapping[str, Any]]
    reference: str | None
    """An answer that is known to be right."""
    checks: Sequence[Check]
    """An answer has to pass all of them."""
    grade: str | None
    """What a model judges by, which an answer has to pass too."""
    fields: Mapping[str, Any]
    """Everything else in the row."""

    @property
    def text(self) -> str:
        """The last thing said, for people."""
        return self.prompt if isinstance(self.prompt, str) else text_of(self.prompt[-1])


def read_exam(path: Path) -> list[Question]:
    """The questions of a file, as docs/evaluation.md describes it.

    Raises FormatError, which names lines, where rows cannot be asked or checked; UnavailableError, OSError.
    """
    questions, wrong, n_rows = [], [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        n_rows += 1
        try:
            questions.append(_question(number, line))
        except FormatError as error:
            wrong.append(f"{path}:{number}: {error.message}")
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        told = f"{len(wrong)} of {n_rows} rows cannot be asked or checked"
        raise FormatError("\n  ".join([told, *wrong[:_SHOWN], *more]), hint="docs/evaluation.md says what a row has")
    if not questions:
        raise FormatError(f"{path}: there is no question")
    return questions


def _question(number: int, line: bytes) -> Question:
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
        known = msgspec.convert(row, _Row)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(str(error)) from error
    prompt, reference = _asked(row, known)
    if known.grade is not None and not known.grade.strip():
        raise FormatError("grade is empty")
    checks = [make_check(name, row[name]) for name in CHECKS if row.get(name) is not None]
    if not checks and known.grade is None:
        raise FormatError(f"nothing says what the answer has to be: none of {', '.join(CHECKS)}, grade")
    _check_passable(checks, reference)
    return Question(
        line=number,
        prompt=prompt,
        tools=row.get("tools") or (),
        reference=reference,
        checks=checks,
        grade=known.grade,
        fields={key: value for key, value in row.items() if key not in {*_Row.__struct_fields__, *CHECKS}},
    )


def _asked(row: Mapping[str, Any], known: _Row) -> tuple[str | list[Mapping[str, Any]], str | None]:
    """The prompt, and the answer that stands behind it."""
    if (known.prompt is None) == (known.messages is None):
        raise FormatError("a row has either messages or prompt" + (", not both" if known.prompt is not None else ""))
    if isinstance(known.prompt, str):
        if not known.prompt:
            raise FormatError("prompt is empty")
        for name in ("system", "tools"):
            if row.get(name):
                raise FormatError(f"a prompt that is a text has no place for {name}, as messages have")
        return known.prompt, None
    messages = list(row["messages"] if known.prompt is None else row["prompt"])
    reference = text_of(messages.pop()) or None if messages and messages[-1]["role"] == "assistant" else None
    if not messages:
        raise FormatError("there is no message to answer")
    if messages[-1]["role"] == "assistant":
        raise FormatError("two messages of the assistant's at the end: only the last is an answer to compare with")
    if known.system is not None:
        if messages[0]["role"] == "system":
            raise FormatError("system stands in the row and in its messages")
        messages.insert(0, {"role": "system", "content": known.system})
    return messages, reference


def _check_passable(checks: Sequence[Check], reference: str | None) -> None:
    """Raises FormatError where what the row gives as right would not be."""
    right = [("the reference answer", reference)] if reference is not None else []
    for check in checks:
        if check.name == "exact":
            texts = check.expected["text"] if isinstance(check.expected, dict) else check.expected
            right += [("exact", text) for text in ([texts] if isinstance(texts, str) else texts)]
    for source, text in right:
        for check in checks:
            if not check.passes(text):
                shown = text if len(text) <= 60 else text[:60] + "…"
                raise FormatError(f"{source} {shown!r} does not pass {check.name}: {check.expected!r}")
