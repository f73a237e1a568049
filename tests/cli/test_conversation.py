"""Conversations in files, and options from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dapji.cli.conversation import Conversation, Message
from dapji.errors import DapjiError, FormatError, UsageError


def talk() -> Conversation:
    return Conversation(
        messages=[Message("user", "안녕?\n두 번째 줄"), Message("assistant", "Hello 🎉")],
        system="답을 짧게.",
        options={"temperature": 0.5, "seed": 3, "stop": ["\n\n"]},
    )


def test_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk().save(str(path))
    assert Conversation.load(str(path)) == talk()
    text = path.read_text(encoding="utf-8")
    assert "안녕?" in text, "readable, not escaped"
    assert list(json.loads(text)) == ["system", "options", "messages"]
    Conversation().save(str(path))
    assert Conversation.load(str(path)) == Conversation()
    assert list(tmp_path.iterdir()) == [path], "nothing temporary is left"


def test_save_overwrites_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("my only copy")
    with pytest.raises(FormatError, match="not a saved conversation"):
        talk().save(str(path))
    assert path.read_text() == "my only copy"
    with pytest.raises(UsageError, match=r"cannot write .*: No such file or directory"):
        talk().save(str(tmp_path / "no folder" / "talk.json"))
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        talk().save(str(tmp_path))


def saved(**changes: Any) -> bytes:
    return json.dumps({"system": None, "options": {}, "messages": []} | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b'{"system": null}',
        saved(messages=[{"role": "system", "content": "obey"}]),
        saved(messages=[{"role": "user"}]),
        saved(messages=[{"role": "user", "content": 1}]),
        saved(messages=[{"role": "user", "content": "?"}]),
        saved(messages=[{"role": "assistant", "content": "!"}, {"role": "user", "content": "?"}]),
        saved(options={"temperature": {}}),
        saved(extra=1),
        b"[" * 100_000,
    ],
)
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"talk\.json is not a saved conversation"):
        Conversation.load(str(path))


def test_options_from_text() -> None:
    conversation = talk()
    assert conversation.with_option("top_p", "0.25") == {**conversation.options, "top_p": 0.25}
    assert conversation.with_option("top_k", "20")["top_k"] == 20
    assert conversation.with_option("stop", "the end")["stop"] == ["the end"]
    assert conversation.with_option("temperature", "default") == {"seed": 3, "stop": ["\n\n"]}
    assert conversation == talk(), "nothing is set before somebody has checked it"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heat", "1", "no option 'heat'"),
        ("top_k", "1.5", r"top_k must be a number \(int\), got '1.5'"),
        ("seed", "", "''"),
    ],
)
def test_wrong_options(name: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        talk().with_option(name, value)


def test_take_back_removes_a_question_with_its_answer() -> None:
    conversation = talk()
    assert conversation.take_back() == "안녕?\n두 번째 줄"
    assert conversation.messages == []
    with pytest.raises(DapjiError, match="nothing has been asked"):
        conversation.take_back()


def test_the_system_prompt_comes_first() -> None:
    assert talk().for_template()[0] == {"role": "system", "content": "답을 짧게."}
    assert Conversation().for_template() == []
