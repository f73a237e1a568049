"""A lineage, and the licences in it, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dapji.cli.console import visible
from dapji.proof.licences import Licence
from dapji.proof.lineage import DataFile, Lineage, Parent


def tree(lineage: Lineage, indent: str = "") -> Iterator[str]:
    """What a model was made of, and what that was made of, and so on."""
    made_of: Sequence[Parent | DataFile] = (*lineage.parents, *lineage.data)
    for i, each in enumerate(made_of):
        last = i == len(made_of) - 1
        digests = [each.sha256] if isinstance(each, DataFile) else [*each.files.values()]
        about = [
            each.licence or "licence unknown",
            f"sha256 {digests[0][:12]}…" if len(digests) == 1 else f"{len(digests)} files",
            *([] if each.lineage is None else [f"made by {how(each.lineage)}"]),
        ]
        yield visible(f"{indent}{'└─' if last else '├─'} {each.title} ({', '.join(about)})")
        if each.lineage is not None:
            yield from tree(each.lineage, indent + ("   " if last else "│  "))


def how(lineage: Lineage) -> str:
    """By what a model was made, in a few words."""
    steps = lineage.outcome.get("steps")
    return lineage.kind + (f", {steps} step{'' if steps == 1 else 's'}" if isinstance(steps, int) else "")


def duties(found: Sequence[Licence]) -> Iterator[str]:
    """A line for each licence."""
    for each in found:
        asks = each.duty or "see what it asks for"
        yield visible(f"{each.name or 'unknown'}: {asks} ({', '.join(each.of)})")
