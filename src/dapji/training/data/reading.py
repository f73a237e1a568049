"""Files to samples: `Reader` gives the examples of a file, `prepare` a data set of several, or all that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapji.errors import DapjiError, FormatError, UsageError
from dapji.training.data.conventions import CONVENTIONS, Convention, detect
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Encoder, Note, Sample
from dapji.training.data.examples import Example
from dapji.training.data.files import rows
from dapji.training.data.prompts import PromptEntry

_SHOWN = 5
"""Invalid rows that an error names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A row of a file: an example and its samples, or what is wrong with it."""

    path: Path
    line: int
    example: Example | None = None
    samples: Sequence[Sample] = ()
    notes: frozenset[Note] = frozenset()
    error: DapjiError | None = None

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


class Reader:
    """The rows of a file as examples, encoded."""

    def __init__(
        self, path: Path, encoder: Encoder, *, convention: str | None = None, separator: str | None = None
    ) -> None:
        """convention: a name of CONVENTIONS; None: what the fields of the first row say. separator: as `rows` takes it.
        Raises UsageError."""
        if convention is not None and convention not in CONVENTIONS:
            raise UsageError(f"unknown convention {convention!r}", hint=f"one of: {', '.join(CONVENTIONS)}")
        self.path = path
        self.convention: Convention | None = None if convention is None else CONVENTIONS[convention]
        """Known once a row has been read."""
        self.unread: Counter[str] = Counter()
        """Fields that this convention does not read, and in how many rows they stand."""
        self._encoder = encoder
        self._separator = separator

    def __iter__(self) -> Iterator[Entry]:
        """Raises FormatError where the file cannot be read or its convention cannot be told, UnavailableError, OSError;
        what is wrong with a row is in its entry."""
        for line, fields in rows(self.path, separator=self._separator):
            if isinstance(fields, FormatError):
                yield Entry(path=self.path, line=line, error=fields)
                continue
            if self.convention is None:
                try:
                    self.convention = detect(fields)
                except FormatError as error:
                    raise FormatError(f"{self.path}:{line}: {error.message}", hint=error.hint) from error
            self.unread.update(self.convention.unread(fields))
            try:
                example = self.convention.example(fields)
                encoded = self._encoder.encode(example)
            except DapjiError as error:
                yield Entry(path=self.path, line=line, error=error)
            else:
                yield Entry(path=self.path, line=line, example=example, samples=encoded.samples, notes=encoded.notes)


def texts_of(paths: Sequence[Path], *, separator: str | None = None) -> Iterator[str]:
    """What is said in all rows of files, to train a tokenizer. Raises as `Reader`, FormatError also for a wrong row."""
    for path in paths:
        convention: Convention | None = None
        for line, fields in rows(path, separator=separator):
            try:
                if isinstance(fields, FormatError):
                    raise fields
                convention = convention or detect(fields)
                yield from filter(None, convention.example(fields).texts)
            except FormatError as error:
                raise FormatError(f"{path}:{line}: {error.message}", hint=error.hint) from error


def prepare(
    readers: Sequence[Reader],
    folder: Path,
    *,
    skip_invalid: bool = False,
    progress: Callable[[Entry], None] = lambda entry: None,
) -> tuple[Dataset, int]:
    """Write all samples into `folder`; gives the data set, and how many rows were left out.

    skip_invalid: leave out rows that are wrong, where otherwise FormatError is raised, which names the first of them.
    Raises as `Reader`.
    """
    invalid: list[Entry] = []

    def samples() -> Iterator[Sample]:
        n_rows = 0
        for reader in readers:
            for entry in reader:
                n_rows += 1
                progress(entry)
                if entry.error is not None:
                    invalid.append(entry)
                yield from entry.samples
        if invalid and not skip_invalid:
            raise refusal(invalid, n_rows)

    dataset = Dataset.write(folder, samples())
    return dataset, len(invalid)


def refusal(invalid: Sequence[Entry | PromptEntry], n_rows: int) -> FormatError:
    """Names the first of the rows that are wrong, of so many."""
    lines = [
        f"{entry.path}:{entry.line}: {entry.error.message}" for entry in invalid[:_SHOWN] if entry.error is not None
    ]
    more = [f"and {len(invalid) - _SHOWN} more"] if len(invalid) > _SHOWN else []
    hints = [entry.error.hint for entry in invalid if entry.error is not None and entry.error.hint]
    return FormatError(
        "\n  ".join([f"{len(invalid)} of {n_rows} rows cannot be learned", *lines, *more]),
        hint=hints[0] if hints else None,
    )
