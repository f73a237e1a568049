"""`RunData`: what a run learns from, read once and kept in its folder, so that a run that goes on sees the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dapji.errors import FormatError, UsageError
from dapji.files import Files
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Encoder, Sample
from dapji.training.data.prompts import Prompt, read_prompts
from dapji.training.data.reading import Entry, Reader, prepare, refusal
from dapji.training.data.report import Shown, shown, shown_prompt
from dapji.training.data.stream import Stream
from dapji.training.kto_data import mismatched
from dapji.training.samples import Question, Reservoir, has_room, held_out_count, question_of, question_of_prompt
from dapji.training.settings import Recipe, RolloutSettings
from dapji.training.sharding import is_first, together
from dapji.weights.files import replacing
from dapji.weights.sources_base import sha256_file

_KINDS = {
    "texts": "conversations, prompts with completions, and texts",
    "pairs": "preferences",
    "rated": "answers with ratings",
}
_SHOWN = 3
"""Examples of train that are kept for people."""
_PROMPTS = "{}.jsonl"
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
    examples each `encoding.Note` is true of. shown: the first examples of train (`data.report.Shown`). questions: of
    what is held out, for `samples.Sampler`."""

    @classmethod
    def read(cls, recipe: Recipe, files: Files, folder: Path) -> RunData:
        """From the folder, or into it first, on one of the ranks. Raises as `prepare` and `Stream`."""
        record = _recorded(folder, lambda: _prepare(recipe, files, folder))
        samples = Dataset(folder / "train")
        window, seed = recipe.data.window, recipe.seed
        return cls(
            train=Stream(samples, capacity=window, seed=seed),
            evaluate=Stream(Dataset(folder / "evaluate"), capacity=window) if recipe.data.evaluate else None,
            samples=samples,
            record=record,
        )


@dataclass(frozen=True, kw_only=True)
class RunPrompts:
    """`RunData` of a method whose answers are generated."""

    train: Sequence[Prompt]
    evaluate: Sequence[Prompt]
    record: Mapping[str, Any]
    """As RunData's."""

    @classmethod
    def read(cls, recipe: Recipe, files: Files, folder: Path) -> RunPrompts:
        """As `RunData.read`. Raises as `read_prompts`, and FormatError where prompts cannot be read."""
        record = _recorded(folder, lambda: _prepare_prompts(recipe, files, folder))
        train, evaluate = (_prompts(folder / _PROMPTS.format(name)) for name in ("train", "evaluate"))
        return cls(train=train, evaluate=evaluate, record=record)


def read_data(recipe: Recipe, files: Files, folder: Path) -> RunData | RunPrompts:
    """What the recipe's method learns from."""
    return (RunPrompts if recipe.method.examples == "prompts" else RunData).read(recipe, files, folder)


def _recorded(folder: Path, prepare: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record in a folder, which one of the ranks prepares where there is none."""
    if is_first() and not (folder / _RECORD).exists():
        record = prepare()
        with replacing(folder / _RECORD) as file:
            file.write(json.dumps(record).encode())
    together()
    found: Mapping[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return found


def _prompts(path: Path) -> list[Prompt]:
    with path.open(encoding="utf-8") as file:
        return [Prompt(**json.loads(line)) for line in file]


def _prepare_prompts(recipe: Recipe, files: Files, folder: Path) -> dict[str, Any]:
    data, method = recipe.data, recipe.method
    assert isinstance(method, RolloutSettings)
    if data.truncate or data.format is not None:
        name = "data.truncate" if data.truncate else "data.format"
        raise UsageError(f"{name} is nothing for prompts", hint="leave it out")
    room = data.window - method.max_tokens
    if room < 1:
        raise UsageError(f"method.max_tokens ({method.max_tokens}) leaves no room in data.window ({data.window})")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, invalid, hashes = files.tokenizer(), 0, {}
    shown: list[Shown] = []
    questions: list[Question] = []
    for name, paths in (("train", data.train), ("evaluate", data.evaluate)):
        entries = [entry for path in paths for entry in read_prompts(Path(path), tokenizer, max_length=room)]
        wrong = [entry for entry in entries if entry.error is not None]
        if wrong and not data.skip_invalid:
            raise refusal(wrong, len(entries))
        prompts = [entry.prompt for entry in entries if entry.prompt is not None]
        if paths and not prompts:
            raise FormatError(f"data.{name}: there is no prompt")
        with replacing(folder / _PROMPTS.format(name)) as file:
            for prompt in prompts:
                file.write(json.dumps(vars(prompt), ensure_ascii=False).encode() + b"\n")
        invalid += len(wrong)
        if paths:
            hashes[name] = _hashes(paths)
        if name == "train":
            good = (entry for entry in entries if entry.prompt is not None)
            shown = [shown_prompt(entry, tokenizer) for entry in islice(good, _SHOWN)]
        else:
            few = Reservoir[Prompt](held_out_count(recipe), recipe.seed)
            for prompt in prompts:
                few.add(prompt)
            questions = [question_of_prompt(prompt) for prompt in few]
    return {"files": hashes, "invalid": invalid, "notes": {}, **_looked_at(recipe, files, shown, questions)}


def _looked_at(recipe: Recipe, files: Files, shown: Sequence[Shown], questions: Sequence[Question]) -> dict[str, Any]:
    """Of a record, what people see."""
    kept = [asdict(question) for question in questions if has_room(question, recipe.samples, files.config)]
    return {"shown": [asdict(each) for each in shown], "questions": kept}


def _hashes(paths: Sequence[str]) -> list[dict[str, str]]:
    return [{"file": path, "sha256": sha256_file(Path(path))} for path in paths]


def _prepare(recipe: Recipe, files: Files, folder: Path) -> dict[str, Any]:
    data = recipe.data
    kind = recipe.method.examples
    room = data.window if kind == "texts" else data.window // 2
    longest = min(room, files.config.max_context)
    tokenizer = files.tokenizer()
    encoder = Encoder(tokenizer, max_length=longest, truncate=data.truncate)
    notes: Counter[str] = Counter()
    firsts: list[Entry] = []
    held_out = Reservoir[Entry](held_out_count(recipe), recipe.seed)
    invalid, hashes = 0, {}

    def note(name: str, entry: Entry) -> None:
        notes.update(entry.notes)
        if entry.error is not None:
            return
        if name == "evaluate":
            held_out.add(entry)
        elif len(firsts) < _SHOWN:
            firsts.append(entry)

    for name, paths in (("train", data.train), ("evaluate", data.evaluate)):
        if paths:
            readers = [Reader(Path(path), encoder, convention=data.format, separator=data.separator) for path in paths]
            dataset, left_out = prepare(
                readers, folder / name, skip_invalid=data.skip_invalid, progress=partial(note, name)
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
            hashes[name] = _hashes(paths)
    seen = _looked_at(
        recipe,
        files,
        [shown(entry, tokenizer) for entry in firsts],
        [question_of(each, tokenizer) for each in held_out],
    )
    return {"files": hashes, "invalid": invalid, "notes": dict(notes), **seen}


def _kind(sample: Sample) -> str:
    return "rated" if sample.good is not None else "pairs" if len(sample.sequences) > 1 else "texts"
