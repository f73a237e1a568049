"""`dapji batch`, also broken off in the middle."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from in_process import Dapji

from tiny import ANSWER, COUNTING, SCRIPT, write_tiny

HELLO = [{"role": "user", "content": "안녕"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "answer.gguf", SCRIPT)


def line(name: str, **body: Any) -> str:
    asked = {"model": "answer", "messages": HELLO, "temperature": 0} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": asked})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_every_request_has_its_line(dapji: Dapji, model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([line("a"), line("b", foo=1), "", line("c"), line("d", n=0), line("e")]))
    done = dapji("batch", source, model, "-o", output, "--json")
    told = json.loads(done.out)
    assert (done.code, done.err) == (1, ""), "two are wrong"
    assert (told["total"], told["completed"], told["failed"]) == (5, 3, 2)
    answers = read(output)
    assert [answer["custom_id"] for answer in answers] == list("abcde")
    assert [answer["response"]["status_code"] for answer in answers] == [200, 400, 200, 400, 200]
    assert answers[2]["response"]["body"]["choices"][0]["message"]["content"] == ANSWER
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert "exists already" in dapji("batch", source, model, "-o", output).err
    source.write_text(line("a"))
    again = dapji("batch", source, model, "-o", output, "--force")
    assert (again.code, again.out) == (0, "")
    assert "1 of 1 requests answered" in again.err
    assert len(read(output)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the first line is no request: this line is not JSON"),
        (line("a").replace("/chat/", "/x/"), "take no batches; those are /v1/chat/completions"),
        (line("a") + "\n" + line("a"), "line 2: custom_id 'a' is that of line 1"),
        (line("a", model="other"), "line 1: there is no model 'other' here"),
        ("\n", "the file has no requests"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(dapji: Dapji, model: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    code, out, err = dapji("batch", tmp_path / "in.jsonl", model, "-o", tmp_path / "out.jsonl")
    assert (code, out) == (1, "")
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_not_there(dapji: Dapji, model: Path, tmp_path: Path) -> None:
    code, _, err = dapji("batch", tmp_path / "in.jsonl", model, "-o", tmp_path / "out.jsonl")
    assert (code, "No such file" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_opened_ends_it(dapji: Dapji, tmp_path: Path) -> None:
    (tmp_path / "answer.gguf").write_bytes(b"nothing like a model")
    (tmp_path / "in.jsonl").write_text(line("a"))
    code, _, err = dapji("batch", tmp_path / "in.jsonl", tmp_path / "answer.gguf", "-o", tmp_path / "out.jsonl")
    assert code == 1
    assert "answer.gguf" in err


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_with_what_was_broken_off(dapji: Dapji, tmp_path: Path, end: signal.Signals) -> None:
    model = write_tiny(tmp_path / "answer.gguf", COUNTING, endless=True)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    n = 60
    source.write_text("\n".join(line(f"{i}", max_tokens=200) for i in range(n)))
    command = ["batch", source, model, "-o", output, "--max-running", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dapji", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background ignores the signal of Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    database, done = tmp_path / "out.jsonl.partial" / "batches.db", 0
    stop = time.monotonic() + 60
    while done < 5:
        assert time.monotonic() < stop
        time.sleep(0.01)
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
            (done,) = db.execute("SELECT count(*) FROM answers").fetchone()
    process.send_signal(end)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert ("goes on from there" in err) == (end == signal.SIGINT)
    with closing(sqlite3.connect(database)) as db:
        kept = dict(db.execute("SELECT line, told FROM answers"))
    assert 5 <= len(kept) < n
    (tmp_path / "other.jsonl").write_text(line("x"))
    assert "is of another FILE" in dapji("batch", tmp_path / "other.jsonl", *command[2:]).err
    assert dapji(*command).code == 0
    answers = read(output)
    assert [answer["custom_id"] for answer in answers] == [f"{i}" for i in range(n)]
    assert all(answers[number - 1] == json.loads(told) for number, told in kept.items()), "nothing is done again"
