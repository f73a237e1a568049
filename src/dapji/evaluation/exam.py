"""`examine`: asks a model the questions of an exam, and another one too to compare with, and says how they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dapji.errors import UsageError
from dapji.evaluation.answering import Answer, Asking, Verdict, ask, grade
from dapji.evaluation.kept import F, Kept, begin
from dapji.evaluation.questions import Question, read_exam
from dapji.evaluation.result import Examined, Result, compare, group, make_items
from dapji.model import Model
from dapji.proof.lineage import model_paths, versions
from dapji.weights import store
from dapji.weights.sources_base import sha256_file

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how many are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model, and how to open it; it is opened when there is something to ask it, and closed afterwards."""

    model: str
    """A name of the store, or a path."""
    adapter: Path | None = None
    open: Callable[[], Model]

    @property
    def examined(self) -> Examined:
        return Examined(model=self.model, adapter=None if self.adapter is None else str(self.adapter))

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model} with {self.adapter}"

    def files(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of each: differs where they do. Raises ModelNotFound, OSError."""
        paths = [store.resolve(self.model), *([] if self.adapter is None else [self.adapter])]
        found = [file for path in paths for file in model_paths(path).values()]
        return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def examine(
    path: Path,
    candidate: Candidate,
    *,
    against: Candidate | None = None,
    judge: Candidate | None = None,
    by: Sequence[str] = (),
    asking: Asking,
    settings: Mapping[str, Any],
    folder: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """by: fields whose values scores are told apart by. settings: what else the answers depend on, for the record.
    folder: keeps what is finished until all is, so that the same call goes on; it may exist from an earlier one.

    Raises UsageError where a question is to be graded and there is no judge, or a judge has nothing to do; and what
    `read_exam`, `ask` and `grade` raise.
    """
    questions = read_exam(path)
    graded = [question for question in questions if question.grade is not None]
    if graded and judge is None:
        raise UsageError(f"{path}:{graded[0].line}: grade needs a model that judges", hint="--judge MODEL")
    if judge is not None and not graded:
        raise UsageError(f"{path}: no row has anything to grade by", hint="leave --judge out, or add `grade` to rows")
    for field in by:
        for question in questions:
            if field not in question.fields:
                there = ", ".join(question.fields) or "none"
                raise UsageError(f"{path}:{question.line}: no field {field!r} to group by", hint=f"fields: {there}")
    sha256 = sha256_file(path)
    settings = {**msgspec.to_builtins(asking), "judge": None if judge is None else judge.model, **settings}
    if folder is not None:
        models = {"the model": candidate, "the other model": against, "the judge": judge}
        files = {f"files of {name}": None if each is None else each.files() for name, each in models.items()}
        begin(folder, {"the exam's sha256": sha256, **files, **settings})
    work = _Work(questions, graded, asking, folder, progress)
    answers = work.answers("answers", candidate)
    before = None if against is None else work.answers("before", against)
    verdicts: Mapping[int, Verdict] = {}
    before_verdicts: Mapping[int, Verdict] = {}
    if judge is not None:
        verdicts = work.verdicts("verdicts", judge, answers, candidate)
        if before is not None and against is not None:
            before_verdicts = work.verdicts("before-verdicts", judge, before, against)
    items = make_items(questions, answers, verdicts, before, before_verdicts)
    whole = compare(items)
    return Result(
        kind="exam",
        model=candidate.model,
        adapter=None if candidate.adapter is None else str(candidate.adapter),
        against=None if against is None else against.examined,
        file=str(path),
        sha256=sha256,
        score=whole.score,
        before=whole.before,
        difference=whole.difference,
        groups={field: group(items, field) for field in by},
        items=items,
        versions=versions("numpy"),
        settings=settings,
    )


@dataclass(frozen=True)
class _Work:
    """What is asked, and where that is kept."""

    questions: Sequence[Question]
    graded: Sequence[Question]
    asking: Asking
    folder: Path | None
    progress: Progress

    def answers(self, name: str, candidate: Candidate) -> dict[int, Answer]:
        def run(model: Model, kept: Kept[Answer], tell: Callable[[], None]) -> None:
            ask(model, self.questions, kept, asking=self.asking, progress=tell)

        return self._finished(name, Answer, candidate, self.questions, f"asking {candidate}", run)

    def verdicts(
        self, name: str, judge: Candidate, answers: Mapping[int, Answer], candidate: Candidate
    ) -> dict[int, Verdict]:
        def run(model: Model, kept: Kept[Verdict], tell: Callable[[], None]) -> None:
            grade(model, self.graded, answers, kept, max_tokens=self.asking.max_tokens, progress=tell)

        return self._finished(name, Verdict, judge, self.graded, f"judging {candidate}", run)

    def _finished(
        self,
        name: str,
        kind: type[F],
        candidate: Candidate,
        questions: Sequence[Question],
        stage: str,
        run: Callable[[Model, Kept[F], Callable[[], None]], None],
    ) -> dict[int, F]:
        """What is there of an earlier call, and what `run` adds with the model."""
        with Kept(None if self.folder is None else self.folder / f"{name}.jsonl", kind) as kept:

            def tell() -> None:
                self.progress(stage, len(kept.rows), len(questions))

            if len(kept.rows) < len(questions):
                tell()
                with candidate.open() as model:
                    run(model, kept, tell)
            return kept.rows
