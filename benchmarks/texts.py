"""What runs/scratch and runs/distillation learned: collects the figures of their runs, for docs/training.md.

    sh runs/scratch/run.sh shakespeare.txt && sh runs/distillation/run.sh && python benchmarks/texts.py
    python benchmarks/texts.py --draw                                     tables and plots, from the results

Losses are told in bits per byte of the held-out text. Figures of runs whose folders are gone stay as they were.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import report
from dapji.training.report import RunRecord

DATA = report.ROOT / "benchmarks" / "data" / "texts.json"
DOCUMENT = report.ROOT / "docs" / "training.md"
NANOGPT = {"nanoGPT, 4 layers of 128, on a CPU": 2.71, "nanoGPT, 6 layers of 384, on a GPU": 2.12}
"""What its README says of the same text with a letter a token, in bits per byte: losses of 1.88 and 1.4697 nats."""
LABELS = {"labels": "labels alone", "taught": "and a teacher"}


def measure(arguments: Namespace, results: dict[str, Any]) -> Iterator[None]:
    for name in ("scratch", "distillation"):
        for path in sorted((report.ROOT / "runs" / name / "out").glob("*/metrics.jsonl")):
            run = RunRecord.read(path.parent)
            if run.state == "done":
                results.setdefault(name, {})[path.parent.name] = collected(run)
                yield


def collected(run: RunRecord) -> dict[str, Any]:
    bits = "evaluation_bits_per_byte"
    return {
        "steps": [round(line["bits_per_byte"], 2) for line in run.steps],
        "held_out": [[line["step"], round(line[bits], 4)] for line in run.evaluations if bits in line],
        "trained_tokens": run.trained_tokens,
        "seconds": round(run.seconds),
    }


def draw(results: dict[str, Any]) -> None:
    if "pretrained" in results.get("scratch", {}):
        draw_scratch(results["scratch"]["pretrained"])
    if runs := results.get("distillation"):
        draw_distillation(runs)


def draw_scratch(run: dict[str, Any]) -> None:
    path = report.ROOT / "docs" / "from-scratch.svg"
    with report.chart(path, title="From scratch, on Shakespeare", x="step of 2,048 tokens", y="bits per byte") as axes:
        axes.plot(range(1, len(run["steps"]) + 1), run["steps"], color=report.COLOURS[0], alpha=0.35, linewidth=0.9)
        axes.plot(
            *zip(*run["held_out"], strict=True), color=report.COLOURS[0], marker="o", markersize=4, label="held out"
        )
        for number, (name, value) in enumerate(NANOGPT.items(), start=1):
            axes.axhline(value, color=report.COLOURS[number], linestyle="--", linewidth=1, label=name)
        axes.set(ylim=(0, None))
        axes.legend()
    first, last = run["held_out"][0][1], run["held_out"][-1][1]
    tokens, minutes = run["trained_tokens"] / 1e6, run["seconds"] / 60
    text = f"""![Bits per byte over the steps](from-scratch.svg)

`sh runs/scratch/run.sh` on the 1.1 MB of tiny Shakespeare, whose last tenth is held out, with two million
weights: from {first:.2f} to {last:.2f} bits per byte of what is held out in {tokens:.1f} million tokens, which
took {minutes:.0f} minutes of one thread on a machine that others used. Single steps, each of other places in the
text, are faint. The dashed lines are what nanoGPT's README states for the same split, from runs of other lengths:
it has a token for each letter, so that its losses of 1.88 and 1.4697 nats are of a byte each."""
    report.replace_section(DOCUMENT, "scratch", text)


def draw_distillation(runs: dict[str, Any]) -> None:
    path = report.ROOT / "docs" / "distillation.svg"
    kinds = {kind: [run for name, run in runs.items() if name.startswith(kind)] for kind in LABELS}
    title = "A student with and without a teacher"
    with report.chart(path, title=title, x="step of 2,048 tokens", y="bits per byte, held out") as axes:
        for number, (kind, found) in enumerate(kinds.items()):
            for seed, run in enumerate(found):
                axes.plot(
                    *zip(*run["held_out"][1:], strict=True), color=report.COLOURS[number], marker="o", markersize=4,
                    label=None if seed else LABELS[kind],
                )  # fmt: skip
        axes.legend()
    rows = []
    for kind, found in kinds.items():
        ends = [run["held_out"][-1][1] for run in found]
        rows.append([LABELS[kind], *(f"{end:.3f}" for end in ends), f"{mean(ends):.3f} ± {stdev(ends):.3f}"])
    head = ["held-out bits per byte", *(f"seed {seed}" for seed in range(len(rows[0]) - 2)), "mean"]
    text = """`sh runs/distillation/run.sh`: a student of 0.56 million weights learns Shakespeare for 500 steps, from
its labels alone, and from a teacher beside them, the model [above](#texts-and-from-scratch); with the same first
weights and the same order."""
    told = [text, report.table(head, rows), "![Held-out loss](distillation.svg)"]
    report.replace_section(DOCUMENT, "distillation", "\n\n".join(told))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    report.run(parser, DATA, measure, draw)
