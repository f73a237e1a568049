"""What the runs of runs/ have learned: collects the figures of those that are finished, for docs/training.md.

    runs/support-faq/run.sh && python benchmarks/runs.py

A run's folder is runs/NAME/out/SEED, or runs/NAME/out/tuned. Figures of runs whose folders are gone stay as they were.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapji.training.report import RunRecord
from report import COLOURS, ROOT, chart, replace_section, run, table

DATA = ROOT / "benchmarks" / "data" / "runs.json"
DOCUMENT = ROOT / "docs" / "training.md"


@dataclass(frozen=True, kw_only=True)
class Plot:
    title: str
    y: str
    step: str
    """What the metrics of a step call it."""
    held_out: str
    """And those of an evaluation."""
    first: int = 0
    """The first step whose evaluation says something."""


PLOTS = {
    "support-faq": Plot(title="Support FAQ", y="loss", step="loss", held_out="evaluation_loss"),
    "alpaca": Plot(title="Alpaca's recipe", y="loss", step="loss", held_out="evaluation_loss"),
    # before the first step all rewards are 0, and no pair is the right way round
    "preference": Plot(title="DPO", y="reward accuracy", step="accuracy", held_out="evaluation_accuracy", first=1),
    "arithmetic": Plot(title="GRPO on sums", y="reward", step="reward", held_out="evaluation_reward"),
}


def measure(arguments: Namespace, results: dict[str, Any]) -> Iterator[None]:
    for name, plot in PLOTS.items():
        for record in sorted((ROOT / "runs" / name / "out").glob("*/dapji.json")):
            results.setdefault(name, {})[record.parent.name] = collected(record.parent, plot)
            yield


def collected(folder: Path, plot: Plot) -> dict[str, Any]:
    """Of a finished run."""
    record = RunRecord.read(folder)
    found: dict[str, Any] = {
        "steps": [round(line[plot.step], 4) for line in record.steps],
        "held_out": [
            [line["step"], round(line[plot.held_out], 6)]
            for line in record.evaluations
            if plot.held_out in line and line["step"] >= plot.first
        ],
        "seconds": round(record.seconds),
        "trained_tokens": record.trained_tokens,
    }
    for name, path in (("exam", folder.with_suffix(".json")), ("compared", folder.with_name("compared.json"))):
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
            found[name].pop("items", None)  # every answer
    return found


def draw(results: dict[str, Any]) -> None:
    for name, plot in PLOTS.items():
        if name in results:
            draw_run(ROOT / "docs" / f"{name}.svg", plot, results[name])
    replace_section(DOCUMENT, "runs", "\n\n".join(tables(results)))


def draw_run(path: Path, plot: Plot, runs: dict[str, Any]) -> None:
    """Steps faintly, what is held out on top; a colour for each seed."""
    with chart(path, title=plot.title, x="step", y=plot.y, width=5.5, height=3.2) as axes:
        for number, (seed, found) in enumerate(runs.items()):
            colour = COLOURS[number]
            axes.plot(range(1, len(found["steps"]) + 1), found["steps"], color=colour, alpha=0.35, linewidth=0.9)
            label = "held out" if len(runs) == 1 else titled("held out", seed)
            axes.plot(*zip(*found["held_out"], strict=True), color=colour, marker="o", markersize=4, label=label)
        axes.set(ylim=(0, None))
        axes.legend()


def tables(results: dict[str, Any]) -> Iterator[str]:
    header = ("run", "held out", "before", "after", "learned tokens", "minutes")
    rows = []
    for name, plot in PLOTS.items():
        for seed, found in results.get(name, {}).items():
            first, last = (f"{found['held_out'][i][1]:.3f}" for i in (0, -1))
            before = "" if plot.first else first
            tokens, minutes = f"{found['trained_tokens']:,.0f}", round(found["seconds"] / 60)
            rows.append((titled(name, seed), plot.y, before, last, tokens, minutes))
    yield table(header, rows)
    exams = [
        (titled(name, seed), exam["before"], exam["score"], exam["difference"])
        for name, runs in results.items()
        for seed, found in runs.items()
        if (exam := found.get("exam"))
    ]
    for found in results.get("preference", {}).values():
        if compared := found.get("compared"):
            both = compared["likelihood"]
            exams.append(("preference, likelier", both["before"], both["after"], compared["difference"]))
            yield f"Training has raised the chosen answer by more in {interval(compared['reward'])} of the pairs."
    if exams:
        header = ("held out", "rows", "right before", "right after", "difference", "p")
        rows = [
            (name, after["n"], interval(before), interval(after), interval(change), f"{change['p']:.1g}")
            for name, before, after, change in exams
        ]
        yield "What the tuned models answer, with 95 % intervals:\n\n" + table(header, rows)


def titled(name: str, folder: str) -> str:
    """What a run is called after the name of its folder: a seed, `tuned`, or what is special about it."""
    return name if folder == "tuned" else f"{name}, seed {folder}" if folder.isdigit() else f"{name}, {folder}"


def interval(score: dict[str, float]) -> str:
    value, low, high = (f"{100 * score[key]:.0f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def main() -> None:
    run(ArgumentParser(description=__doc__.partition("\n")[0]), DATA, measure, draw)


if __name__ == "__main__":
    main()
