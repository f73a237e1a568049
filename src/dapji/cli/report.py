"""`dapji report`: the page of a run, or of several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dapji.training.report import Language


@click.command()
@click.argument(
    "runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Show what `dapji eval` has found too. May be given several times.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page to write [default: report.html in the folder of the run].",
)
@click.option(
    "--lang",
    "language",
    type=click.Choice(["en", "ko"]),
    help="What it is written in [default: the system's language]; a browser shows the other one too.",
)
def command(
    runs: tuple[Path, ...], evaluations: tuple[Path, ...], output: Path | None, language: Language | None
) -> None:
    """Write the page of a run: loss, rates, memory, its answers while it learned, where it came from.

    RUN is a folder that `dapji tune` writes, also while it does, or after it was cut off. Several are
    compared: the settings in which they differ, their curves in one plot, their last answers.

    The page is one file that needs nothing else, no network and no script. `dapji tune` writes it
    itself, at each evaluation and at the end.

    \b
    Examples:
      dapji report runs/faq
      dapji report runs/faq --evaluation result.json --lang ko
      dapji report runs/rank-8 runs/rank-32 -o compare.html

    Exit codes: 0 done, 1 a folder is no run or a file is broken, 2 wrong usage.
    """
    from dapji.training.report import PAGE, write_report

    if output is None:
        if len(runs) > 1:
            raise click.UsageError("several runs: say where the page goes with -o FILE")
        output = runs[0] / PAGE
    write_report(output, runs, evaluations=evaluations, language=language)
    click.echo(str(output))
