"""What is finished of a long piece of work, in a folder, so that the same call goes on where one was cut off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import msgspec

from dapji.errors import FormatError, UsageError
from dapji.weights.files import keep_whole_lines, replacing


class Finished(Protocol):
    """A msgspec struct."""

    @property
    def row(self) -> int: ...


F = TypeVar("F", bound=Finished)


def begin(folder: Path, about: Mapping[str, Any]) -> None:
    """Makes the folder, or finds that it is of the same call. Raises UsageError where it is of another, OSError."""
    record, told = folder / "about.json", msgspec.json.encode(about)
    if record.exists():
        kept, given = json.loads(record.read_bytes()), json.loads(told)
        for name in given:
            if kept.get(name) != given[name]:
                raise UsageError(
                    f"{folder} has answers of another call: {name} was {kept.get(name)}, now {given[name]}",
                    hint="delete it, or give what was given before",
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(record) as file:
        file.write(told)


class Kept(Generic[F]):
    """Finished rows by number, each a line of a file from the moment that it is added."""

    def __init__(self, path: Path | None, kind: type[F]) -> None:
        """path: None: in memory alone. A line that was cut off is dropped. Raises FormatError."""
        self.rows: dict[int, F] = {}
        self._file = None
        if path is None:
            return
        decoder = msgspec.json.Decoder(kind)
        try:
            self.rows = {each.row: each for each in decoder.decode_lines(keep_whole_lines(path))}
        except msgspec.DecodeError as error:
            raise FormatError(f"{path}: damaged: {error}", hint="delete it") from error
        self._file = path.open("ab")

    def add(self, each: F) -> None:
        self.rows[each.row] = each
        if self._file is not None:
            self._file.write(msgspec.json.encode(each) + b"\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
