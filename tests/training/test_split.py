"""How runs/ holds examples out of a file."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

SPLIT = Path(__file__).parents[2] / "runs" / "split.py"


def split(data: Path, folder: Path, *options: str) -> tuple[list[Any], list[Any]]:
    subprocess.run([sys.executable, SPLIT, data, folder, *options], check=True, capture_output=True)
    read = [(folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "held-out")]
    return [json.loads(line) for line in read[0]], [json.loads(line) for line in read[1]]


def test_a_question_is_on_one_side_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    # every question three times, with answers of its own
    rows = [{"instruction": f"Question {i % 40}?", "input": "", "output": f"Answer {i}"} for i in range(120)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train, held_out = split(tmp_path / "rows.json", tmp_path / "a", "--held-out", "20")
    assert len(held_out) == 21  # whole questions
    assert sorted(row["output"] for row in train + held_out) == sorted(row["output"] for row in rows)
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in held_out}
    random.Random(1).shuffle(rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert split(tmp_path / "rows.jsonl.gz", tmp_path / "b", "--held-out", "20") == (train, held_out)
    assert split(tmp_path / "rows.json", tmp_path / "c", "--held-out", "20", "--train", "5") == (train[:5], held_out)


def test_dialogues_that_begin_alike_are_on_one_side(tmp_path: Path) -> None:
    asked = [f"\n\nHuman: {i % 10}?\n\nAssistant: " for i in range(40)]
    rows = [{"chosen": f"{each}yes {i}", "rejected": f"{each}no {i}"} for i, each in enumerate(asked)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held_out = split(tmp_path / "rows.jsonl", tmp_path / "a", "--held-out", "8")
    sides = [{row["chosen"].partition("Assistant")[0] for row in part} for part in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(held_out) == 8
