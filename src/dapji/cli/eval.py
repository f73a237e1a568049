"""`dapji eval`: how well a model does in an exam."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.console import wants_colour
from dapji.cli.options import adapter_option, context_option, executor_options, kv_memory_option
from dapji.errors import UsageError

if TYPE_CHECKING:
    from dapji.evaluation.bootstrap import Score
    from dapji.evaluation.result import Comparison, Result
    from dapji.model import Model


@click.command()
@click.argument("model")
@click.argument("exam", type=click.Path(path_type=Path, exists=True, dir_okay=False))
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
def command(
    model: str,
    exam: Path,
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
    """Ask MODEL the questions in EXAM, and say how many of its answers are right.

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

    With --output, the same command goes on after Ctrl-C; until all is answered, what there is lies
    in a folder beside it, OUTPUT.partial.

    \b
    Examples:
      dapji eval smollm2-135m exam.jsonl
      dapji eval smollm2-135m exam.jsonl --adapter runs/faq --against smollm2-135m -o result.json
      dapji eval ./tuned exam.jsonl --by language --by topic --json | jq .groups
      dapji eval smollm2-135m graded.jsonl --judge qwen2.5-coder-0.5b

    Exit codes: 0 done, whatever the score, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from dapji.evaluation.answering import Asking
    from dapji.evaluation.exam import Candidate, examine
    from dapji.evaluation.result import write_result
    from dapji.model import load

    if output is not None and output.exists() and not force:
        raise UsageError(f"{output} exists already", hint="--force replaces it")

    def candidate(name: str, path: Path | None = None) -> Candidate:
        def opened() -> Model:
            return load(name, adapter=path, kv_memory=round(kv_memory * 1e9), **values)

        return Candidate(model=name, adapter=path, open=opened)

    if against is None and against_adapter is not None:
        against = model
    if (against, against_adapter) == (model, adapter):
        raise UsageError("--against is the same model", hint="another one, or the same with another adapter or none")
    folder = None if output is None else output.with_name(f"{output.name}.partial")
    with _Bars() as bars:
        try:
            result = examine(
                exam,
                candidate(model, adapter),
                against=None if against is None else candidate(against, against_adapter),
                judge=None if judge is None else candidate(judge),
                by=by,
                asking=Asking(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop),
                settings={name: value for name, value in values.items() if name != "threads"},
                folder=folder,
                progress=bars.show,
            )
        except KeyboardInterrupt:
            if folder is not None and folder.exists():
                bars.close()
                click.echo(f"what is answered is kept in {folder}; the same command goes on from there", err=True)
            raise
    if output is not None and folder is not None:
        write_result(output, result)
        shutil.rmtree(folder)
    _print(result, as_json)


class _Bars:
    """A bar on stderr for each stage of an exam."""

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


def _print(result: Result, as_json: bool) -> None:
    import msgspec

    for name, cut in (
        ("answers", sum(item.truncated for item in result.items)),
        ("answers of the other model", sum(bool(item.before_truncated) for item in result.items)),
    ):
        if cut:
            told = f"{cut} of {len(result.items)} {name} were cut off at {result.settings['max_tokens']} tokens"
            click.echo(click.style(told, fg="yellow"), err=True, color=wants_colour())
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(result), indent=2).decode() + "\n")
        return
    rows = _rows("score", result)
    for field, values in result.groups.items():
        rows.append([field])
        for value, each in values.items():
            rows += _rows(f"  {value}", each)
    width = max(len(row[0]) for row in rows)
    for row in rows:
        click.echo("  ".join([row[0].ljust(width), *row[1:]]).rstrip())


def _rows(name: str, found: Result | Comparison) -> list[list[str]]:
    """Lines of a table for people."""
    indent = " " * (len(name) - len(name.lstrip()))
    lines = [[name, _shown(found.score)]]
    if found.before is not None and found.difference is not None:
        change = found.difference
        lines.append([f"{indent}before", _shown(found.before)])
        lines.append(
            [
                f"{indent}difference",
                f"{100 * change.value:+6.1f}    [{100 * change.low:+.1f}, {100 * change.high:+.1f}]  "
                f"{change.better} better, {change.worse} worse, p = {change.p:.2g}",
            ]
        )
    return lines


def _shown(score: Score) -> str:
    interval = "" if score.low is None or score.high is None else f"[{100 * score.low:.1f}, {100 * score.high:.1f}]  "
    return f"{100 * score.value:6.1f} %  {interval}{score.n} rows"
