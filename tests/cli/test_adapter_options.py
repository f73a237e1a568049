"""--adapter of the commands that take a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import Dapji

from tiny import SCRIPT, write_adapter, write_tiny


@pytest.fixture(scope="module")
def backwards(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "backwards"
    return write_adapter(folder, endless, {"하나 ": "셋 ", "셋 ": "둘 ", "둘 ": "하나 "})


def test_answers_come_from_the_adapter(dapji: Dapji, endless: Path, backwards: Path) -> None:
    options = ("--max-tokens", "4", "--temperature", "0", "--context", "512")
    assert dapji("run", endless, *options, stdin="x\n\n").out == "하나 둘 셋 하나 \n"
    assert dapji("run", endless, "--adapter", backwards, *options, stdin="x\n\n").out == "하나 셋 둘 하나 \n"
    chat = dapji("chat", "-m", endless, "--adapter", backwards, *options, "안녕")
    assert (chat.code, chat.out) == (0, "하나 셋 둘 하나 \n")


def test_perplexity_is_the_adapters(dapji: Dapji, endless: Path, backwards: Path) -> None:
    """Of bytes alone, which the adapter leaves as likely as they were but for its own three tokens."""
    values = []
    for more in ((), ("--adapter", backwards)):
        result = dapji("perplexity", endless, "--chunk", "64", "--json", *more, stdin="abc" * 100)
        assert result.code == 0
        values.append(json.loads(result.out)["perplexity"])
    assert values[0] != values[1]


def test_what_the_server_does_not_start_with(dapji: Dapji, endless: Path, backwards: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", SCRIPT)
    for arguments, message in (
        ((endless, "--adapter", "backwards"), "'backwards' is not [MODEL:]NAME=PATH"),
        ((endless, "--adapter", f"b=={tmp_path / 'nothing'}"), "no such file or folder"),
        ((endless, other, "--adapter", f"b={backwards}"), f"hint: --adapter endless:b={backwards}"),
        ((endless, "--adapter", f"x:b={backwards}"), "there is no model 'x' here for the adapter b"),
        ((other, "--adapter", f"b={backwards}"), "in this model, but the adapter's matrices"),
    ):
        result = dapji("serve", *arguments)
        assert result.code in (1, 2)
        assert message in result.err
