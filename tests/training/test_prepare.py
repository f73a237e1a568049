"""Files to a data set: all rows or none, unless rows may be skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byte_tokenizers import Tokenizers
from dapji.errors import FormatError
from dapji.training.data.encoding import Encoder
from dapji.training.data.reading import Reader, prepare, texts_of


def test_invalid_rows_are_refused_or_counted(both: Tokenizers, tmp_path: Path) -> None:
    rows = [{"instruction": f"{i}?", "output": "" if i % 3 == 1 else str(i)} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text("prompt,completion\n1 + 1 =, 2\n")
    readers = [Reader(tmp_path / name, Encoder(both.ours)) for name in ("a.jsonl", "b.csv")]
    with pytest.raises(FormatError) as raised:
        prepare(readers, tmp_path / "set")
    assert raised.value.message == "\n  ".join(
        [
            "10 of 31 rows cannot be learned",
            *(f"{tmp_path}/a.jsonl:{line}: messages[1] is an empty answer" for line in (2, 5, 8, 11, 14)),
            "and 5 more",
        ]
    )
    assert not (tmp_path / "set").exists()
    seen = []
    dataset, left_out = prepare(readers, tmp_path / "set", skip_invalid=True, progress=seen.append)
    assert (len(dataset), left_out, len(seen)) == (21, 10, 31)
    (last,) = dataset[20].sequences
    assert both.theirs.decode(last.ids) == "1 + 1 = 2</s>"


def test_texts_for_a_tokenizer_are_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "2 + 2?", "output": "4"}))
    (tmp_path / "b.txt").write_text("one\n---\ntwo")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    assert list(texts_of(paths, separator="---")) == ["2 + 2?", "4", "one", "two"]
    assert list(texts_of(paths[1:])) == ["one\n---\ntwo"]
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": ""}')
    with pytest.raises(FormatError, match=r"c.jsonl:2: text is \"\", expected a text that is not empty"):
        list(texts_of([tmp_path / "c.jsonl"]))
