"""Rows with their lines, out of every kind of file."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dapji.errors import FormatError
from dapji.training.data.files import rows

TWO = [{"prompt": "한\n줄", "completion": 'a "b", c'}, {"prompt": "", "completion": "{}"}]


def read(path: Path) -> list[tuple[int, Any]]:
    return [(line, fields.message if isinstance(fields, FormatError) else fields) for line, fields in rows(path)]


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_json_lines(ending: str, tmp_path: Path) -> None:
    lines = [json.dumps(TWO[0]), "", "{", '"text"', json.dumps(TWO[1], ensure_ascii=False), "[" * 100_000, "9" * 5000]
    found = read(write(tmp_path / f"a{ending}", "\n".join(lines)))
    assert [line for line, _ in found] == [1, 3, 4, 5, 6, 7]
    assert (found[0][1], found[3][1]) == (TWO[0], TWO[1])
    assert found[1][1].startswith("no JSON: ")
    assert found[2][1] == 'expected a JSON object, got "text"'
    assert found[4][1].startswith("no JSON: ")
    assert found[5][1].startswith(("no JSON: ", "expected a JSON object"))


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(indent: int | None, tmp_path: Path) -> None:
    text = json.dumps([*TWO, 3], indent=indent, ensure_ascii=False)
    found = read(write(tmp_path / "a.json", text))
    assert [fields for _, fields in found] == [*TWO, "expected a JSON object, got 3"]
    starts = [text.index("{"), text.index("{", text.index("}")), text.rindex("3")]
    assert [line for line, _ in found] == [text.count("\n", 0, at) + 1 for at in starts]


def test_tables_have_the_lines_of_the_file(tmp_path: Path) -> None:
    for ending, separator in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"a{ending}"
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, TWO[0].keys(), delimiter=separator)
            writer.writeheader()
            writer.writerows(TWO)
            file.write("one\r\n")
        assert read(path) == [(2, TWO[0]), (4, TWO[1]), (5, "1 values, but 2 columns: prompt, completion")]


def test_parquet(tmp_path: Path) -> None:
    """Every message of a column has the fields of all: what is not there is None."""
    messages = [{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 1}]
    table = pyarrow.Table.from_pylist([{"messages": messages}, {"messages": messages[:1]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, {"messages": messages}), (2, {"messages": messages[:1]})]


def test_a_text_is_one_row(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "\ufeff한 줄\n둘\n")) == [(1, {"text": "한 줄\n둘\n"})]


@pytest.mark.parametrize("ending", [".txt", ".md.gz"])
def test_a_line_separates_texts(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{ending}", "한 줄\n둘 ---\n---\r\n\n---\n---\n셋\n\n넷\n---\n다섯\n---")
    found = [(line, fields) for line, fields in rows(path, separator="---")]
    assert found == [(1, {"text": "한 줄\n둘 ---"}), (7, {"text": "셋\n\n넷"}), (11, {"text": "다섯"})]
    write(tmp_path / "a.txt", "하나\n---\n\n").write_bytes("하나\n---\n\n".encode() + b"\xff")
    with pytest.raises(FormatError, match="line 4: not UTF-8"):
        list(rows(tmp_path / "a.txt", separator="---"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"text": "a"}', "no JSON array"),
        ("a.json", b'[{"text": "a"},\n {"text": ]', "line 2: no JSON"),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', "line 2: expected , or ]"),
        ("a.json", b"[", "line 1: no JSON"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "line 1: no JSON: Exceeds the limit"),
        ("a.json", b"", "no JSON array"),
        ("a.csv", b'a,b\n1,"2\n', "line 2: unexpected end of data"),
        ("a.csv", b"a,a\n1,2\n", "the first line has to name the columns"),
        ("a.csv", b"a\n\xff\n", "codec can't decode"),
        ("a.txt", b"one\ntwo \xff", "line 2: not UTF-8: .* at byte 8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9], "broken gzip data"),
        ("a.jsonl.gz", b"text", "broken gzip data"),
        ("a.parquet", b"text", "no Parquet file"),
        ("a.xlsx", b"", "unknown kind of file '.xlsx'"),
        ("train", b"", "unknown kind of file 'train'"),
    ],
)
def test_broken_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message) as raised:
        list(rows(tmp_path / name))
    assert name in str(raised.value)
