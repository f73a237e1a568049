"""The page of a run: loss, rates, memory, answers while it learned, evaluations, in one file of HTML. Needs no torch.

runs     what a run has left in its folder
curves   which plots that makes          plot     numbers to a figure in SVG
page     the whole of it                 markup   HTML that is safe by how it is made
texts    every text, in every language   static   its style and its script, which are written into it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dapji.evaluation.result import read_result
from dapji.training.report.page import page
from dapji.training.report.runs import METRICS, RECIPE, SAMPLES, START, RunRecord
from dapji.training.report.texts import Language, system_language
from dapji.weights.files import replacing

__all__ = ["METRICS", "PAGE", "RECIPE", "SAMPLES", "START", "Language", "RunRecord", "write_report"]

PAGE = "report.html"
"""In the folder of a run."""


def write_report(
    output: Path,
    runs: Sequence[Path],
    *,
    evaluations: Sequence[Path] = (),
    running: bool = False,
    language: Language | None = None,
) -> None:
    """runs: folders, at least one; several are compared. evaluations: files of `evaluation.result`. running: the page
    loads itself again. language: None: the system's.

    Raises UsageError where a folder is no run, FormatError where a file is broken, OSError.
    """
    records = [RunRecord.read(folder, running=running) for folder in runs]
    if len({record.name for record in records}) < len(records):
        records = [replace(record, name=str(folder)) for record, folder in zip(records, runs, strict=True)]
    results = [read_result(path) for path in evaluations]
    text = page(records, results, system_language() if language is None else language)
    with replacing(output) as file:
        file.write(text.encode())
