"""`run_task`: a task of lm-evaluation-harness as an evaluation with a result, before and after; the extra `eval`.

Tasks and their data are read from this machine alone. A task's own Python functions run as they are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

from dapji.errors import UsageError
from dapji.evaluation.bootstrap import Score, mean_score, paired_difference
from dapji.evaluation.exam import Candidate, Progress
from dapji.evaluation.harness import HarnessModel
from dapji.evaluation.result import Comparison, Item, Result
from dapji.proof.lineage import versions
from dapji.weights.sources_base import sha256_file

_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice")
_SEED = 1234
"""The harness's own, by which it draws examples."""
_DELTA = 1e-9
"""Between a metric and the mean of its samples, where it is that."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    limit: int | None = None
    """Documents of each task; None: all."""
    few_shot: int | None = None
    """Examples before each question; None: as the task says."""
    chat: bool = False
    """Questions and examples are messages in the model's chat template."""
    include: Sequence[Path] = ()
    """Folders of tasks beside the harness's own."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the harness found of one model."""

    metrics: Mapping[str, Mapping[str, float]]
    """Task -> metric and filter, as the harness joins them by a comma -> value."""
    counts: Mapping[str, int]
    """Task or group -> documents."""
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    """Task -> what it keeps of each document and filter."""
    rising: Mapping[str, Mapping[str, bool]]
    """Task -> metric, without filter -> whether more is better."""
    cut: int
    """Requests whose context lost its beginning."""

    def values(self, task: str, metric: str) -> list[float] | None:
        """Of each document; None: the metric is not their mean."""
        name, _, filter = metric.partition(",")
        found = [sample.get(name) for sample in self.samples.get(task, ()) if sample["filter"] == filter]
        values = [float(value) for value in found if isinstance(value, int | float | np.number)]
        if not values or len(values) < len(found) or abs(np.mean(values) - self.metrics[task][metric]) > _DELTA:
            return None
        return values


def run_task(
    task: str,
    candidate: Candidate,
    *,
    against: Candidate | None = None,
    options: TaskOptions,
    settings: Mapping[str, Any],
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """task: a name, or the path of a YAML file. settings: what else the answers depend on, for the record.

    The score is the first metric of the task or group; `groups` has them all, by task. A metric has an interval where
    it is the mean of the documents' own, and a difference where more is better too. Raises UsageError for a task that
    there is not, whose data are not here, or that asks for what cannot be done.
    """
    name, loaded = _load(task, options)
    after = _run(loaded, candidate, options, progress)
    before = None if against is None else _run(loaded, against, options, progress)
    groups = {
        each: {_spelled(metric): _compared(each, metric, after, before) for metric in metrics}
        for each, metrics in after.metrics.items()
    }
    main = next(iter(after.metrics[name]), None)
    if main is None:
        raise UsageError(f"the task {task!r} has no metric that is a number")
    whole = groups[name][_spelled(main)]
    return Result(
        kind="lm-eval",
        model=candidate.model,
        adapter=None if candidate.adapter is None else str(candidate.adapter),
        against=None if against is None else against.examined,
        file=task,
        sha256=sha256_file(Path(task)) if Path(task).is_file() else None,
        score=whole.score,
        before=whole.before,
        difference=whole.difference,
        groups=groups,
        items=_items(main, after, before),
        versions=versions("numpy", "lm_eval"),
        settings={
            "metric": _spelled(main),
            "limit": options.limit,
            "few_shot": options.few_shot,
            "chat": options.chat,
            "contexts_cut": after.cut,
            "before_contexts_cut": None if before is None else before.cut,
            **settings,
        },
    )


def _load(task: str, options: TaskOptions) -> tuple[str, Mapping[str, Any]]:
    """Its name, and what the harness makes of it."""
    manager = TaskManager(include_path=list(options.include), include_defaults=False)
    if task not in manager.all_tasks and not Path(task).is_file():
        manager = TaskManager(include_path=list(options.include))  # looks through thousands of files
    random.seed(0)  # for tasks that draw, as the harness's own command does
    np.random.seed(_SEED)
    try:
        found: Mapping[str, Any] = manager.load([task])
    except Exception as error:  # whatever a task's file, its functions and its data raise
        raise UsageError(
            f"the task {task!r} cannot be loaded: {type(error).__name__}: {error}",
            hint="a name, or the path of a YAML file; data come from files of this machine alone",
        ) from error
    groups, tasks = found["groups"], found["tasks"]
    if not groups and len(tasks) > 1:
        raise UsageError(f"{task!r} is a tag of {len(tasks)} tasks, without a score", hint=f"one of {', '.join(tasks)}")
    for name, each in tasks.items():
        if getattr(each, "UNSAFE_CODE", False):
            raise UsageError(f"the task {name!r} would run what a model writes as a program, which is not done here")
        if each.OUTPUT_TYPE not in _KINDS:
            raise UsageError(f"the task {name!r} asks for {each.OUTPUT_TYPE}", hint=f"known: {', '.join(_KINDS)}")
        examples = each.get_config("num_fewshot")
        if options.few_shot is not None and examples == 0 and options.few_shot != 0:
            raise UsageError(f"the task {name!r} says that it has 0 examples, --few-shot {options.few_shot}")
        each.set_config(key="num_fewshot", value=options.few_shot if options.few_shot is not None else examples or 0)
        each.set_fewshot_seed(seed=_SEED)
    return next(iter(groups or tasks)), found


def _run(loaded: Mapping[str, Any], candidate: Candidate, options: TaskOptions, progress: Progress) -> _Run:
    with candidate.open() as model:
        asked = HarnessModel(model, lambda what, done, total: progress(f"{what} by {candidate}", done, total))
        found = lm_eval.evaluate(
            lm=asked,
            task_dict=loaded,
            limit=options.limit,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            bootstrap_iters=0,
        )
    return _Run(
        metrics={
            task: {
                metric: float(value)
                for metric, value in values.items()
                if "," in metric and "_stderr," not in metric and isinstance(value, int | float | np.number)
            }
            for task, values in found["results"].items()
        },
        counts={task: values["sample_len"] for task, values in found["results"].items()},
        samples=found["samples"],
        rising=found["higher_is_better"],
        cut=asked.cut,
    )


def _spelled(metric: str) -> str:
    """For people: the filter only where a task has one of its own."""
    return metric.removesuffix(",none")


def _compared(task: str, metric: str, after: _Run, before: _Run | None) -> Comparison:
    def score(run: _Run) -> Score:
        if (values := run.values(task, metric)) is not None:
            return mean_score(values)
        return Score(value=run.metrics[task][metric], low=None, high=None, n=run.counts[task])

    if before is None:
        return Comparison(score=score(after), before=None, difference=None)
    values, others = after.values(task, metric), before.values(task, metric)
    rising = after.rising.get(task, {}).get(metric.partition(",")[0])
    difference = None if values is None or others is None or not rising else paired_difference(values, others)
    return Comparison(score=score(after), before=score(before), difference=difference)


def _items(main: str, after: _Run, before: _Run | None) -> list[Item]:
    """The documents whose metric is a number."""
    metric, _, filter = main.partition(",")
    items = []
    for task, samples in after.samples.items():
        others = samples if before is None else before.samples[task]
        for sample, other in zip(samples, others, strict=True):
            if sample["filter"] != filter or not isinstance(sample.get(metric), int | float | np.number):
                continue
            items.append(
                Item(
                    row=sample["doc_id"],
                    question=str(sample["arguments"][0][0]),
                    fields={"task": task},
                    expected={"target": str(sample["target"])},
                    answer=_answer(sample),
                    checks={},
                    score=float(sample[metric]),
                    truncated=False,
                    verdict_probability=None,
                    before_answer=None if before is None else _answer(other),
                    before_checks=None,
                    before_score=None if before is None else float(other[metric]),
                    before_truncated=None,
                    before_verdict_probability=None,
                )
            )
    return items


def _answer(sample: Mapping[str, Any]) -> str:
    """What the model wrote; of several continuations the likeliest."""
    found = sample["filtered_resps"]
    if isinstance(found[0], str):
        return str(found[0])
    likeliest = max(range(len(found)), key=lambda i: found[i][0] if isinstance(found[i], list | tuple) else found[i])
    return str(sample["arguments"][likeliest][-1])
