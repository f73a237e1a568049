"""`check`: what is in files of examples, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dapji.tokenizer import Tokenizer
from dapji.training.data import similar
from dapji.training.data.prompts import PromptEntry
from dapji.training.data.reading import Entry, Reader


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An example as the model sees it."""

    where: str
    sequences: Sequence[Sequence[tuple[str, bool]]]
    """Of each sequence the text, cut where learned and not learned tokens meet; True: learned."""
    tokens: int
    learned: int
    end: str | None
    """The end token of the first sequence, which is learned; None where it was cut off."""


@dataclass(kw_only=True)
class Report:
    """Lines are named `file:line`."""

    conventions: dict[str, str] = field(default_factory=dict)
    """File -> convention."""
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    """File -> field that its convention does not read -> rows."""
    rows: int = 0
    invalid: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Line, reason, hint."""
    samples: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sequence."""
    learned: int = 0
    """Tokens."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was done for how many examples (`encoding.Note`)."""
    same: list[tuple[str, str]] = field(default_factory=list)
    """A line, and an earlier one that says the same."""
    near: list[tuple[str, str, float]] = field(default_factory=list)
    """A line, an earlier one that says nearly the same, and how nearly (`similar.near_duplicates`)."""
    evaluation_rows: int = 0
    overlap: list[tuple[str, str]] = field(default_factory=list)
    """A line of the evaluation file, and the first with words of what it asks (`similar.overlaps`)."""
    shown: list[Shown] = field(default_factory=list)


def check(
    readers: Sequence[Reader],
    tokenizer: Tokenizer,
    *,
    evaluation: Reader | None = None,
    show: int = 3,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Reads all of the files. show: how many examples to show. progress: called once a row, with what is being done.

    Raises as `Reader`; rows that are wrong are in the report.
    """
    report = Report()
    lines: dict[str, str] = {}  # what is said -> where, in order
    for reader in readers:
        for entry in reader:
            progress("reading")
            report.rows += 1
            if entry.error is not None:
                report.invalid.append((entry.where, entry.error.message, entry.error.hint))
                continue
            _count(report, entry)
            if len(report.shown) < show:
                report.shown.append(shown(entry, tokenizer))
            said = _said(entry)
            if said in lines:
                report.same.append((entry.where, lines[said]))
            else:
                lines[said] = entry.where
        if reader.convention is not None:
            report.conventions[str(reader.path)] = reader.convention.name
        if reader.unread:
            report.unread[str(reader.path)] = dict(reader.unread)
    texts, where = list(lines), list(lines.values())
    near = similar.near_duplicates(texts, progress=lambda: progress("comparing"))
    report.near = [(where[pair.later], where[pair.earlier], pair.similarity) for pair in near]
    if evaluation is not None:
        others = {}
        for entry in evaluation:
            progress("reading what evaluates")
            if entry.error is not None:
                report.invalid.append((entry.where, entry.error.message, entry.error.hint))
            else:
                assert entry.example is not None
                others[entry.where] = similar.normalised(entry.example.asked)
        report.evaluation_rows = len(others)
        names = list(others)
        report.overlap = [(names[o], where[t]) for o, t in similar.overlaps(texts, list(others.values()))]
    return report


def _count(report: Report, entry: Entry) -> None:
    report.notes.update(entry.notes)
    report.samples += len(entry.samples)
    for sample in entry.samples:
        for sequence in sample.sequences:
            report.lengths.append(len(sequence.ids))
            report.learned += int(sequence.learned.sum())


def _said(entry: Entry) -> str:
    assert entry.example is not None
    return "\n".join(map(similar.normalised, entry.example.texts))


def shown(entry: Entry, tokenizer: Tokenizer) -> Shown:
    """An entry without an error."""
    sequences = [sequence for sample in entry.samples for sequence in sample.sequences]
    last = int(sequences[0].ids[-1])
    return Shown(
        where=entry.where,
        sequences=[_pieces(sequence.ids.tolist(), sequence.learned.tolist(), tokenizer) for sequence in sequences],
        tokens=sum(len(sequence.ids) for sequence in sequences),
        learned=sum(int(sequence.learned.sum()) for sequence in sequences),
        end=tokenizer.token_bytes(last).decode() if last in tokenizer.stop_ids else None,
    )


def shown_prompt(entry: PromptEntry, tokenizer: Tokenizer) -> Shown:
    """An entry without an error: nothing of a prompt is learned."""
    assert entry.prompt is not None
    text = tokenizer.decode(entry.prompt.ids, skip_control=False)
    return Shown(
        where=f"{entry.path}:{entry.line}",
        sequences=[[(text, False)]],
        tokens=len(entry.prompt.ids),
        learned=0,
        end=None,
    )


def _pieces(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    cuts = [i for i in range(1, len(ids)) if learned[i] != learned[i - 1]]
    bounds = zip([0, *cuts], [*cuts, len(ids)], strict=True)
    return [(tokenizer.decode(ids[a:b], skip_control=False, continuation=a > 0), learned[a]) for a, b in bounds]
