"""`dapji eval`: how well a model does in an exam."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from dapji.cli.console import wants_colour
from dapji.cli.options import adapter_option, check_new_file, context_option, executor_options, kv_memory_option
from dapji.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from dapji.evaluation.bootstrap import Difference, Score
    from dapji.evaluation.exam import Candidate
    from dapji.evaluation.result import Comparison, Result

EXAM_OPTIONS = ("judge", "by", "max_tokens", "temperature", "seed", "stop")
TASK_OPTIONS = ("limit", "few_shot", "chat", "include")


@click.command()
@click.argument("model")
@click.argument("exam", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--task", metavar="TASK", help="Instead of EXAM: a task of lm-eval, by name or as a YAML file.")
@click.option("--limit", type=click.IntRange(1), help="With --task: so many documents of each [default: all].")
@click.option("--few-shot", type=click.IntRange(0), help="With --task: examples before each question.")
@click.option("--chat", is_flag=True, help="With --task: questions are messages in the model's chat template.")
@click.option(
    "--include-path",
    "include",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --task: a folder of tasks; may be repeated.",
)
@adapter_option
@click.option("--against", metavar="MODEL", help="Ask this model too, and say how much better MODEL is.")
@click.option(
    "--against-adapter",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="With an adapter; without --against, one of MODEL.",
)
@click.option("--judge", metavar="MODEL", help="The model that judges the answers to questions with `grade`.")
@click.option("--by", multiple=True, metavar="FIELD", help="A score for each value of this field; may be repeated.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer; reasoning counts."
)
@click.option("-t", "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: greedy.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same answers.")
@click.option("--stop", multiple=True, help="End answers before this text; may be repeated.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where the result goes, as JSON.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="The result on stdout as JSON, with every answer.")
@kv_memory_option
@context_option
@executor_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    exam: Path | None,
    task: str | None,
    limit: int | None,
    few_shot: int | None,
    chat: bool,
    include: tuple[Path, ...],
    adapter: Path | None,
    against: str | None,
    against_adapter: Path | None,
    judge: str | None,
    by: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    seed: int,
    stop: tuple[str, ...],
    output: Path | None,
    force: bool,
    as_json: bool,
    kv_memory: float,
    **values: Any,
) -> None:
    """Ask MODEL the questions in EXAM, or of a task, and say how many of its answers are right.

    EXAM has a question on each line: `messages`, of which a last one of the assistant's is a
    reference and is not shown, or `prompt`, a text that is given as it is; and what the answer has
    to be, one or several of

    \b
      exact     "Seoul", or a list of which it is one
      contains  "45 days", or a list of which it contains one
      regex     "^[A-D]$"                    found anywhere unless ^ and $ say otherwise
      number    42, or {"value": 3.5, "tolerance": 0.1, "unit": "km"}: of its last number
      schema    a JSON schema
      grade     a criterion in words, by which the model of --judge decides

    Other keys are fields that --by tells scores apart by. A score is the share of answers that pass
    all their checks, with its 95 % interval; --against gives the difference too, with the interval of
    a paired bootstrap, and how likely chance alone is to change as many rows (docs/evaluation.md).

    With --output, the same command goes on with an exam after Ctrl-C; until all is answered, what
    there is lies in a folder beside it, OUTPUT.partial.

    --task asks what a task of lm-evaluation-harness asks (pip install 'dapji[eval]'), from data on this
    machine: a YAML file that names local files, or what the datasets library has fetched before.

    \b
    Examples:
      dapji eval smollm2-135m exam.jsonl
      dapji eval smollm2-135m exam.jsonl --adapter runs/faq --against smollm2-135m -o result.json
      dapji eval ./tuned exam.jsonl --by language --by topic --json | jq .groups
      dapji eval smollm2-135m graded.jsonl --judge qwen2.5-coder-0.5b
      dapji eval smollm2-135m --task arc_easy --limit 200 --few-shot 5
      dapji eval ./tuned --task ./my-task.yaml --against smollm2-135m -o result.json

    Exit codes: 0 done, whatever the score, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from dapji.evaluation.result import write_result

    if (exam is None) == (task is None):
        raise click.UsageError("give either EXAM or --task")
    _refuse(ctx, TASK_OPTIONS if task is None else EXAM_OPTIONS, "--task" if task is None else "EXAM")
    if output is not None:
        check_new_file(output, force=force)

    def candidate(name: str, path: Path | None = None) -> Candidate:
        from dapji.evaluation.exam import Candidate
        from dapji.model import load

        return Candidate(
            model=name,
            adapter=path,
            open=lambda: load(name, adapter=path, kv_memory=round(kv_memory * 1e9), **values),
        )

    if against is None and against_adapter is not None:
        against = model
    if (against, against_adapter) == (model, adapter):
        raise UsageError("--against is the same model", hint="another one, or the same with another adapter or none")
    asked = candidate(model, adapter)
    compared = None if against is None else candidate(against, against_adapter)
    settings = {name: value for name, value in values.items() if name != "threads"}
    folder = None if output is None or exam is None else output.with_name(f"{output.name}.partial")
    with _Bars() as bars:
        if exam is not None:
            from dapji.evaluation.answering import Asking
            from dapji.evaluation.exam import examine

            try:
                result = examine(
                    exam,
                    asked,
                    against=compared,
                    judge=None if judge is None else candidate(judge),
                    by=by,
                    asking=Asking(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop),
                    settings=settings,
                    folder=folder,
                    progress=bars.show,
                )
            except KeyboardInterrupt:
                if folder is not None and folder.exists():
                    bars.close()
                    click.echo(f"what is answered is kept in {folder}; the same command goes on from there", err=True)
                raise
        else:
            assert task is not None
            options = {"limit": limit, "few_shot": few_shot, "chat": chat, "include": include}
            result = _task(task, asked, compared, options, settings, bars)
    if output is not None:
        write_result(output, result)
    if folder is not None:
        shutil.rmtree(folder)
    _print(result, as_json)


def _refuse(ctx: click.Context, names: tuple[str, ...], of: str) -> None:
    """Options that were given and mean nothing here."""
    for parameter in ctx.command.params:
        if parameter.name in names and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]} goes with {of} alone")


def _task(
    task: str,
    asked: Candidate,
    compared: Candidate | None,
    options: dict[str, Any],
    settings: dict[str, Any],
    bars: _Bars,
) -> Result:
    # Nothing is fetched, and bars are ours; these libraries look at the environment when they are imported.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        from dapji.evaluation.tasks import TaskOptions, run_task
    except ModuleNotFoundError as error:
        raise UnavailableError("lm-eval is not installed", hint="pip install 'dapji[eval]'") from error
    return run_task(
        task, asked, against=compared, options=TaskOptions(**options), settings=settings, progress=bars.show
    )


class _Bars:
    """A bar on stderr for each stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def show(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(desc=stage, total=total, initial=done, unit="row", disable=None, leave=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Show(NamedTuple):
    """How numbers are written."""

    score: str
    change: str


PERCENT = _Show("{:.1%}", "{:+.1%}")
PLAIN = _Show("{:.4f}", "{:+.4f}")


def _print(result: Result, as_json: bool) -> None:
    from dapji.evaluation.result import encoded

    for told in _cut(result):
        click.echo(click.style(told, fg="yellow"), err=True, color=wants_colour())
    if as_json:
        sys.stdout.write(encoded(result).decode())
        return
    show = PERCENT if result.kind == "exam" else PLAIN
    rows = _rows("score", result, show) if result.kind == "exam" else []  # a task's is one of its metrics
    for field, values in result.groups.items():
        rows.append([field])
        for value, each in values.items():
            rows += _rows(f"  {value}", each, show)
    width = max(len(row[0]) for row in rows)
    for row in rows:
        click.echo("  ".join([row[0].ljust(width), *row[1:]]).rstrip())


def _cut(result: Result) -> Iterator[str]:
    """What was shorter than it should be."""
    before = [bool(item.before_truncated) for item in result.items]
    for whose, cut in (("", [item.truncated for item in result.items]), (" of the other model", before)):
        if any(cut):
            yield f"{sum(cut)} of {len(cut)} answers{whose} were cut off at {result.settings['max_tokens']} tokens"
    for whose, name in (("", "contexts_cut"), (" to the other model", "before_contexts_cut")):
        if count := result.settings.get(name):
            yield f"{count} requests{whose} were too long and lost the beginning of their context"


def _rows(name: str, found: Result | Comparison, show: _Show) -> list[list[str]]:
    """Lines of a table for people."""
    indent = " " * (len(name) - len(name.lstrip()))
    lines = [[name, *_interval(found.score, show.score), f"n = {found.score.n}"]]
    if found.before is not None:
        lines.append([f"{indent}before", *_interval(found.before, show.score), f"n = {found.before.n}"])
    if (change := found.difference) is not None:
        changed = f"{change.better} better, {change.worse} worse, p = {change.p:.2g}"
        lines.append([f"{indent}difference", *_interval(change, show.change), changed])
    return lines


def _interval(found: Score | Difference, form: str) -> list[str]:
    if found.low is None or found.high is None:
        return [form.format(found.value).rjust(8), " " * 18]
    low, high = form.format(found.low), form.format(found.high)
    return [form.format(found.value).rjust(8), f"[{low}, {high}]".ljust(18)]
