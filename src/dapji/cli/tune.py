"""`dapji tune`: adapt a model to examples, as a recipe says."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.console import wants_colour

if TYPE_CHECKING:
    from dapji.training.tune import Planned

_BAR = "{percentage:3.0f}% {bar} step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
_LATELY = 10
"""Steps whose speed is shown."""
_CURVE = 8
"""Characters of the loss so far."""
_BLOCKS = "▁▂▃▄▅▆▇█"


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--profile", help="Take the settings of this table in the recipe's [profiles], as tiny.")
@click.option("--resume", is_flag=True, help="Go on with the run in the recipe's output, if one was cut off.")
@click.option("--json", "as_json", is_flag=True, help="The metrics as JSON lines, as in metrics.jsonl.")
def command(recipe: Path, changes: tuple[str, ...], profile: str | None, resume: bool, as_json: bool) -> None:
    """Adapt a model to examples, as RECIPE says; KEY=VALUE changes one of its settings.

    RECIPE is a file like this; what it leaves out has the value shown in docs/training.md:

    \b
      model = "smollm2-135m"           a name of `dapji list`, a GGUF file, or a folder
      output = "runs/faq"              a new folder
      [data]
      train = ["faq.jsonl"]            as `dapji data check` reads them
      evaluate = ["held-out.jsonl"]
      [lora]                           an adapter; without this table, all weights are trained
      rank = 16
      [optimizer]
      learning_rate = 2e-4
      [run]
      epochs = 3
      [method]                         supervised where this is left out; dpo, kto, orpo, simpo from
      name = "dpo"                     preferences, grpo from rewards, distill from a teacher:
                                       docs/training.md has their settings
      beta = 0.1

    The output holds an adapter that PEFT loads, or a model that transformers loads; metrics.jsonl,
    the whole recipe, and dapji.json, which says what it was made of; and report.html, which can be
    looked at while the run goes on. Ctrl-C ends the step that runs, keeps it and stops; --resume goes
    on from there, or from the last checkpoint of a run that was killed, as if nothing had happened.

    Several processes train one model together under torchrun:
    torchrun --nproc-per-node 2 -m dapji tune RECIPE

    \b
    Examples:
      dapji tune recipe.toml
      dapji tune recipe.toml lora.rank=32 output=runs/rank-32
      dapji tune recipe.toml method.name=simpo method.beta=2.5
      dapji tune recipe.toml method.name=grpo method.reward=rewards.py:correct
      dapji tune recipe.toml --profile tiny        a few steps, to see that it works
      dapji tune recipe.toml --resume

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (with --resume it goes on).
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        from dapji.errors import UnavailableError

        raise UnavailableError("torch is not installed", hint="pip install 'dapji[train]'") from error
    from dapji.cli.pull import TerminalProgress
    from dapji.training.settings import read_recipe
    from dapji.training.tune import tune

    for change in changes:
        if "=" not in change:
            raise click.BadParameter(f"{change!r} is no KEY=VALUE", param_hint="CHANGES")
    settings = read_recipe(recipe, profile=profile, changes=dict(change.split("=", 1) for change in changes))
    with _Shown(Path(settings.output), as_json) as shown:
        ended = tune(
            settings,
            resume=resume,
            prepare=shown.prepare,
            plan=shown.plan,
            report=shown.report,
            bars=TerminalProgress(),
        )
    if not ended:
        click.echo("interrupted; --resume goes on", err=True)
        raise click.exceptions.Exit(130)
    if shown.first:
        shown.sum_up()
        if not as_json:
            click.echo(settings.output)


class _Shown:
    """A run in the terminal: on stderr a bar, and a line for each evaluation; JSON lines on stdout where asked for."""

    def __init__(self, folder: Path, as_json: bool) -> None:
        self._folder = folder
        self._as_json = as_json
        self._bar: Any = None
        self.first = False
        """Whether this is the process that is told of the run."""
        self._losses: list[float] = []  # of each step since the command began
        self._lately: deque[Mapping[str, Any]] = deque(maxlen=_LATELY)

    def prepare(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc="before training", disable=None, leave=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def plan(self, planned: Planned) -> None:
        from tqdm import tqdm

        from dapji.training.report import PAGE

        self.first = True
        share = f"{planned.trained / planned.parameters:.1%} of {planned.parameters / 1e6:.0f}M weights"
        full = "" if planned.fill is None else f", windows {planned.fill:.0%} full"
        click.echo(f"{planned.samples} examples, {planned.steps} steps, {share} trained{full}", err=True)
        if planned.invalid:
            click.echo(f"{planned.invalid} rows are left out", err=True)
        for note, count in planned.notes.items():
            click.echo(f"{count} examples: {note}", err=True)
        if planned.done:
            click.echo(f"goes on after step {planned.done}", err=True)
        click.echo(f"report     {self._folder / PAGE}", err=True)
        self._bar = tqdm(
            total=planned.steps, initial=planned.done, disable=None, leave=False, dynamic_ncols=True, bar_format=_BAR
        )

    def report(self, metrics: Mapping[str, Any]) -> None:
        if self._as_json:
            click.echo(json.dumps(metrics))
            sys.stdout.flush()
        if "evaluation_loss" in metrics:
            line = f"step {metrics['step']:>6}  held-out loss {metrics['evaluation_loss']:.4f}"
            line += _own(metrics, "evaluation_")
            with self._bar.external_write_mode(file=sys.stderr):
                click.echo(click.style(line, fg="green"), err=True, color=wants_colour())
        else:
            self._losses.append(metrics["loss"])
            self._lately.append(metrics)
            own = _own({name: value for name, value in metrics.items() if name != "bits_per_byte"})  # as the loss goes
            parts = [f"loss {metrics['loss']:.4f}{own}", self._curve(), f"{_speed(self._lately):.0f} tok/s"]
            self._bar.set_postfix_str("  ".join([*filter(None, parts), _gigabytes(self._lately)]), refresh=False)
            self._bar.update()

    def _curve(self) -> str:
        """The loss so far, as a line of blocks; nothing where the terminal has none."""
        losses = self._losses
        if len(losses) < _CURVE or "utf" not in (sys.stderr.encoding or "").lower():
            return ""
        cuts = [i * len(losses) // _CURVE for i in range(_CURVE + 1)]
        means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(cuts)]
        low, high = min(means), max(means)
        return "".join(_BLOCKS[round((mean - low) / ((high - low) or 1) * (len(_BLOCKS) - 1))] for mean in means)

    def sum_up(self) -> None:
        """What came of it, after the last step."""
        from tqdm import tqdm

        from dapji.training.report import PAGE, RunRecord

        run = RunRecord.read(self._folder)
        before, after = run.held_out
        told = [] if before is None or after is None else [f"held-out loss {before:.4f} -> {after:.4f}"]
        told.append(f"loss {run.steps[-1]['loss']:.4f}")
        time = tqdm.format_interval(run.seconds)
        told.append(f"{run.trained_tokens:,} trained tokens in {time}, {run.trained_tokens / run.seconds:.0f} a second")
        click.echo(", ".join([*told, f"at most {_gigabytes(run.steps)}"]), err=True)
        click.echo(f"report     {self._folder / PAGE}", err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()


def _speed(steps: Sequence[Mapping[str, Any]]) -> float:
    """Trained tokens a second."""
    return float(sum(metrics["trained_tokens"] for metrics in steps) / sum(metrics["seconds"] for metrics in steps))


def _gigabytes(steps: Sequence[Mapping[str, Any]]) -> str:
    return f"{max(metrics['memory'] for metrics in steps) / 1e9:.1f} GB"


def _own(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """What a method measures beside its loss, as far as people look at it while it runs."""
    shown = (
        ("bits_per_byte", "{:.3f} bits per byte"),
        ("accuracy", "accuracy {:.0%}"),
        ("margin", "margin {:.2f}"),
        ("reward", "reward {:.3f}"),
        ("kl", "KL {:.3f}"),
    )
    return "".join(", " + text.format(metrics[prefix + name]) for name, text in shown if prefix + name in metrics)
