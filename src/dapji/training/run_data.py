"""`RunData`: what a run learns from, read once and kept in its folder, so that a run that goes on sees the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapji.errors import FormatError
from dapji.model import Files
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Encoder, Sample
from dapji.training.data.reading import Reader, prepare
from dapji.training.data.stream import Stream
from dapji.training.kto_data import mismatched
from dapji.training.settings import Recipe
from dapji.training.sharding import is_first, together
from dapji.weights.files import replacing

_KINDS = {
    "texts": "conversations, prompts with completions, and texts",
    "pairs": "preferences",
    "rated": "answers with ratings",
}
_RECORD = "read.json"
"""Written when all is there."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    train: Stream
    evaluate: Stream | None
    samples: Dataset
    """Those of `train`."""
    record: Mapping[str, Any]
    """files: of train and evaluate, each with its sha256. invalid: rows that were left out. notes: how many
    examples each `encoding.Note` is true of."""

    @classmethod
    def read(cls, recipe: Recipe, files: Files, folder: Path) -> RunData:
        """From the folder, or into it first, on one of the ranks. Raises as `prepare` and `Stream`."""
        if is_first() and not (folder / _RECORD).exists():
            record = _prepare(recipe, files, folder)
            with replacing(folder / _RECORD) as file:
                file.write(json.dumps(record).encode())
        together()
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        samples = Dataset(folder / "train")
        window, seed = recipe.data.window, recipe.seed
        return cls(
            train=Stream(samples, capacity=window, seed=seed),
            evaluate=Stream(Dataset(folder / "evaluate"), capacity=window) if recipe.data.evaluate else None,
            samples=samples,
            record=record,
        )


def _prepare(recipe: Recipe, files: Files, folder: Path) -> dict[str, Any]:
    data = recipe.data
    kind = recipe.method.examples
    longest = data.window if kind == "texts" else data.window // 2
    encoder = Encoder(files.tokenizer(), max_length=longest, truncate=data.truncate)
    notes: Counter[str] = Counter()
    invalid, hashes = 0, {}
    for name, paths in (("train", data.train), ("evaluate", data.evaluate)):
        if paths:
            readers = [Reader(Path(path), encoder, convention=data.format) for path in paths]
            dataset, left_out = prepare(
                readers, folder / name, skip_invalid=data.skip_invalid, progress=lambda entry: notes.update(entry.notes)
            )
            kinds = {_kind(dataset[i]) for i in range(len(dataset))}
            if kinds != {kind}:
                found = " and ".join(_KINDS[other] for other in sorted(kinds - {kind}))
                raise FormatError(
                    f"data.{name}: {found} are nothing for this method, which takes {_KINDS[kind]}",
                    hint="another method.name, or another data.format",
                )
            if kind == "rated":
                mismatched(dataset, folder / name, max_length=longest, seed=recipe.seed)
            invalid += left_out
            hashes[name] = [{"file": path, "sha256": file_hash(Path(path))} for path in paths]
    return {"files": hashes, "invalid": invalid, "notes": dict(notes)}


def _kind(sample: Sample) -> str:
    return "rated" if sample.good is not None else "pairs" if len(sample.sequences) > 1 else "texts"


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
