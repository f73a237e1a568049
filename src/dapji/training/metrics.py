"""`Metrics`: the numbers of a run as JSON lines, one for each step and each evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dapji.weights.files import replacing


class Metrics:
    """A file of them. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def begin(self, step: int) -> None:
        """Goes on after so many steps: lines of later ones are of a run that was cut off, and are left out."""
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= step] if step else []
        with replacing(self._path) as file:
            file.write("".join(kept).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> list[str]:
    """Whole ones: the last of a run that was killed may be cut off."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
