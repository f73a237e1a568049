"""`dapji data check`: what it tells of a file, for people and as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
from in_process import Dapji

ROWS: list[Any] = [
    {"instruction": "2 + 2?", "output": "4, 답.", "id": 1},
    {"instruction": "Name the largest ocean on this planet.", "output": "It is the Pacific Ocean."},
    {"instruction": "2 + 2?", "input": "", "output": "4, 답."},
    {"instruction": "Name the largest ocean on this planet.", "output": "It is the Pacific Ocean!"},
    {"instruction": "Nothing.", "output": ""},
    {"instruction": "No output."},
]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_report(train: Path, tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    exam = tmp_path / "exam.json"
    exam.write_text(json.dumps([{"prompt": "Please name the largest ocean on this planet. It", "completion": " is."}]))
    shown = dapji("data", "check", train, "--model", tiny, "--eval", exam, "--show", 1)
    assert (shown.code, shown.err) == (1, "")
    lengths = [
        len(f"<user\n{row['instruction']}>\n<assistant\n{row['output']}>".encode()) for row in ROWS if row.get("output")
    ]
    learned = sum(len(row["output"].encode()) + 1 for row in ROWS if row.get("output"))
    for line in (
        f"{train}: alpaca",
        f"{train}: fields that are not read: id (1 rows)",
        "rows       6, of which 2 cannot be learned",
        f"samples    4 of {sum(lengths)} tokens, {learned} learned ({learned / sum(lengths):.1%})",
        "1 say the same as an earlier row",
        f"  {train}:3 = {train}:1",
        "1 say nearly the same as an earlier row",
        f"  {train}:4 ~ {train}:2 (0.",
        f"1 of 1 rows of {exam} ask what stands in an example (8 words in a row)",
        "2 cannot be learned",
        f"  {train}:5: messages[1] is an empty answer",
        f"  {train}:6: the fields instruction are not those of 'alpaca': instruction + output",
        "  hint: all rows of a file are in one convention",
        f"{train}:1  {len(ROWS[0]['output'].encode()) + 1} of {lengths[0]} tokens learned, the end '<|im_end|>' too",
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n⟦4, 답.<|im_end|>⟧\n",
    ):
        assert line in shown.out, line


def test_what_is_learned_is_green_on_a_terminal(train: Path, tiny: Path) -> None:
    arguments = ["-m", "dapji", "data", "check", str(train), "--model", str(tiny), "--show", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    terminal = pexpect.spawn(sys.executable, arguments, env=environment, encoding="utf-8", timeout=60)
    shown = terminal.read().replace("\r\n", "\n")
    terminal.close()
    assert terminal.exitstatus == 1
    assert "\x1b[2m<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n\x1b[0m" in shown
    assert "\x1b[32m\x1b[22m4, 답.<|im_end|>\x1b[0m" in shown


def test_json(train: Path, tiny: Path, dapji: Dapji) -> None:
    shown = dapji("data", "check", train, "--model", tiny, "--json")
    found = json.loads(shown.out)
    assert found["conventions"] == {str(train): "alpaca"}
    assert [entry["line"] for entry in found["invalid"]] == [f"{train}:5", f"{train}:6"]
    assert found["shown"][0]["sequences"] == [
        [["<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", False], ["4, 답.<|im_end|>", True]]
    ]
    longest = "<user\nName the largest ocean on this planet.>\n<assistant\nIt is the Pacific Ocean.>"
    assert found["lengths"]["p100"] == len(longest)
    assert (found["shown"][0]["end"], found["overlap"]) == ("<|im_end|>", [])
    cut = dapji("data", "check", train, "--model", tiny, "--context", 60, "--truncate", "--show", 2)
    assert "truncated:                  2 rows" in cut.out
    assert "tokens learned, no end, which was cut off\n" in cut.out


def test_a_file_that_can_be_learned(tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("한 줄\n" * 2000, encoding="utf-8")
    shown = dapji("data", "check", tmp_path / "a.txt", "--model", tiny, "--context", 1000, "--show", 0)
    assert shown.code == 0
    assert "rows       1, of which 0 cannot be learned" in shown.out
    assert "cut into pieces:            1 rows" in shown.out
    assert "longest 1,000; the context has 1,000" in shown.out


def test_wrong_usage(train: Path, tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    assert dapji("data", "check", train).code == 2
    assert dapji("data", "check", tmp_path / "none.jsonl", "--model", tiny).code == 2
    refused = dapji("data", "check", train, "--model", tiny, "--format", "parrot")
    assert (refused.code, refused.err.splitlines()[0]) == (1, "error: unknown convention 'parrot'")
    (tmp_path / "a.jsonl").write_text('\n{"question": "a"}\n')
    refused = dapji("data", "check", tmp_path / "a.jsonl", "--model", tiny)
    assert f"error: {tmp_path}/a.jsonl:2: the fields question are of no known convention" in refused.err
