"""Rows of files, each with its line: JSON lines, a JSON array, CSV, TSV, Parquet, plain text; also gzipped.

Knows no convention of fields. A row that cannot be read is yielded as the error that says why.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import msgspec

from dapji.errors import FormatError, UnavailableError


class Row(NamedTuple):
    line: int
    """Of the file, from 1, where the row begins; of a Parquet file, the number of the row."""
    fields: Mapping[str, Any] | FormatError


def rows(path: Path, *, separator: str | None = None) -> Iterator[Row]:
    """The rows of a file, whose kind its name tells. A text file is one row with the field `text`; with a separator,
    which stands alone on a line, one for each text between: only one of them is in memory.

    Raises FormatError where the file as a whole cannot be read, UnavailableError for Parquet without pyarrow, OSError.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if gzipped else suffixes)[-1:]
    if not kind or kind[0] not in _ENDINGS:
        raise FormatError(
            f"{path}: unknown kind of file {''.join(kind) or path.name!r}",
            hint=f"known endings: {', '.join(_ENDINGS)}; each also with .gz",
        )
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            stream = cast(IO[bytes], file)
            yield from _texts(stream, separator) if kind[0] in _TEXTS else _READERS[kind[0]](stream)
    except (gzip.BadGzipFile, EOFError) as error:
        raise FormatError(f"{path}: broken gzip data: {error}") from error
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}", hint=error.hint) from error


def _json_lines(file: IO[bytes]) -> Iterator[Row]:
    decode = msgspec.json.Decoder().decode
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield Row(number, FormatError(f"no JSON: {error}", hint="a file .jsonl has one JSON object on each line"))
        else:
            yield Row(number, _object(value))


def _json(file: IO[bytes]) -> Iterator[Row]:
    """An array of objects. Read value by value, so that each has its line."""
    text = _utf8(file.read())
    decoder = json.JSONDecoder()
    if text.lstrip()[:1] != "[":
        raise FormatError(
            "no JSON array", hint="a file .json holds one array of objects; with one on each line: .jsonl"
        )
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _after_space(text, at)
        if text[at : at + 1] == "]":
            return
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"line {line}: no JSON: {error}") from error
        yield Row(line, _object(value))
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise FormatError(f"line {line + text.count(chr(10), counted, at)}: expected , or ] after a value")


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _object(value: Any) -> Mapping[str, Any] | FormatError:
    if isinstance(value, dict):
        return value
    return FormatError(f"expected a JSON object, got {json.dumps(value, ensure_ascii=False)[:40]}")


def _table(separator: str) -> Callable[[IO[bytes]], Iterator[Row]]:
    def read(file: IO[bytes]) -> Iterator[Row]:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=separator, strict=True)
            try:
                yield from _table_rows(reader)
            except (csv.Error, UnicodeDecodeError) as error:
                raise FormatError(f"line {reader.line_num}: {error}") from error

    return read


def _table_rows(reader: Any) -> Iterator[Row]:
    names: list[str] = next(reader, [])
    if len(set(names)) < len(names) or not all(names):
        raise FormatError(f"the first line has to name the columns, got {names}")
    while True:
        line = reader.line_num + 1
        values = next(reader, None)
        if values is None:
            return
        if values and len(values) != len(names):
            yield Row(line, FormatError(f"{len(values)} values, but {len(names)} columns: {', '.join(names)}"))
        elif values:
            yield Row(line, dict(zip(names, values, strict=True)))


def _parquet(file: IO[bytes]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "Parquet needs pyarrow", hint="pip install 'dapji[train]', or export JSON lines"
        ) from error
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
        number = 0
        for batch in batches:
            for fields in batch.to_pylist():
                number += 1
                yield Row(number, fields)
    except pyarrow.ArrowException as error:
        raise FormatError(f"no Parquet file: {error}") from error


def _texts(file: IO[bytes], separator: str | None) -> Iterator[Row]:
    if separator is None:
        yield Row(1, {"text": _utf8(file.read())})
        return
    mark = separator.strip().encode()
    first, lines = 1, list[bytes]()
    for number, line in enumerate(chain(file, [mark]), start=1):
        if line.strip() != mark:
            lines.append(line)
            continue
        if text := _utf8(b"".join(lines), first).strip("\r\n"):
            yield Row(first, {"text": text})
        first, lines = number + 1, []


def _utf8(data: bytes, first: int = 1) -> str:
    """first: the line of the file with which the data begins."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first
        raise FormatError(f"line {line}: not UTF-8: {error.reason} at byte {error.start}") from error


_READERS: Mapping[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}
_TEXTS = (".txt", ".md")
_ENDINGS = (*_READERS, *_TEXTS)
