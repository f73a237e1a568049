"""`RunLog`: what a run tells while it goes on: numbers and samples as JSON lines, the page, other programs' logs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dapji.training.report import METRICS, PAGE, SAMPLES, START, write_report
from dapji.training.settings import Recipe
from dapji.training.writers import Writer, open_writer
from dapji.weights.files import replacing, whole_lines

_PAGE_EVERY = 30.0
"""Seconds between two writings of the page, beside those at each evaluation."""
_PAGE_SHARE = 0.02
"""Of the time that writing it takes at most: of 100,000 steps it takes seconds."""


class RunLog:
    """In the folder of a run; of the first rank. A context manager, whose end leaves the page as of a run that stands
    still."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self._folder = folder
        self._recipe = recipe
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._writers: list[Writer] = []
        self._page_due = 0.0

    def begin(self, start: Mapping[str, Any], step: int) -> None:
        """start: what is known before the first step. Goes on after so many steps: what was told of later ones is of a
        run that was cut off, and is left out. Raises UnavailableError where a writer is not installed."""
        _write_json(self._folder / START, start)
        for name in (METRICS, SAMPLES):
            _cut(self._folder / name, step)
            self._files[name] = self._stack.enter_context((self._folder / name).open("ab"))
        self._writers = [
            self._stack.enter_context(open_writer(name, self._folder, self._recipe, step))
            for name in self._recipe.run.writers
        ]

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Of a step, or of an evaluation."""
        self._append(METRICS, values)
        for writer in self._writers:
            writer.metrics(values)
        if time.monotonic() > self._page_due:
            self.write_page(running=True)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in samples:
            self._append(SAMPLES, {"step": step, **sample})
        for writer in self._writers:
            writer.samples(step, samples)

    def write_page(self, *, running: bool) -> None:
        begun = time.monotonic()
        write_report(self._folder / PAGE, [self._folder], running=running)
        ended = time.monotonic()
        self._page_due = ended + max(_PAGE_EVERY, (ended - begun) / _PAGE_SHARE)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self._files[name].flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._files:
            self.write_page(running=False)


def _cut(path: Path, step: int) -> None:
    """To the whole lines of so many steps."""
    lines = whole_lines(path).splitlines(keepends=True) if step else []
    with replacing(path) as file:
        file.writelines(line for line in lines if json.loads(line)["step"] <= step)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(values, ensure_ascii=False, indent=2).encode() + b"\n")
