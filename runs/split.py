"""Splits a file of examples in two, the same way everywhere: python runs/split.py DATA FOLDER --held-out 100

Writes FOLDER/train.jsonl and FOLDER/held-out.jsonl. A hash of what a row asks decides where it goes, so that a question
that stands in the file twice, with whatever answers, is on one side, and the order of the file changes nothing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

ANSWERS = ("output", "completion", "chosen", "rejected")


def read(path: Path) -> list[dict[str, Any]]:
    """JSON lines or an array, gzipped or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if text.lstrip().startswith("["):
        rows: list[dict[str, Any]] = json.loads(text)
        return rows
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def place(row: dict[str, Any]) -> str:
    """Alike for rows that ask the same: of all that is no answer, or of what two whole dialogues begin with."""
    asked: Any = {key: value for key, value in row.items() if key not in ANSWERS}
    if not asked and "chosen" in row:
        both = zip(row["chosen"], row["rejected"], strict=False)
        asked = [part for part, _ in takewhile(lambda parts: parts[0] == parts[1], both)]
    return hashlib.sha256(json.dumps(asked or row, sort_keys=True).encode()).hexdigest()


def split(
    rows: list[dict[str, Any]], held_out: int, train: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to learn from, and those that are held out: as many as wanted, and what asks the same as the last."""
    ordered = sorted(rows, key=lambda row: (place(row), json.dumps(row, sort_keys=True)))
    if held_out >= len(ordered):
        raise SystemExit(f"{held_out} of {len(ordered)} rows held out leave nothing to learn from")
    end = held_out
    while end < len(ordered) and place(ordered[end]) == place(ordered[end - 1]):
        end += 1
    return ordered[end:][:train], ordered[:end]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="JSON lines or a JSON array, each also gzipped")
    parser.add_argument("folder", type=Path, help="where train.jsonl and held-out.jsonl go")
    parser.add_argument("--held-out", type=int, required=True, metavar="N", help="rows")
    parser.add_argument("--train", type=int, metavar="N", help="rows, at most; default: all others")
    arguments = parser.parse_args()
    parts = split(read(arguments.data), arguments.held_out, arguments.train)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held-out"), parts, strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{len(rows)} rows in {arguments.folder / name}.jsonl")


if __name__ == "__main__":
    main()
