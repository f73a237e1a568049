"""What commands that write a model share: the writing, and telling what was written and what it has kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from dapji.cli.console import wants_colour
from dapji.cli.options import EXECUTORS, check_new_file

if TYPE_CHECKING:
    from dapji.evaluation.divergence import Divergence, Text
    from dapji.files import Files
    from dapji.models.adapter import Adapter
    from dapji.models.executor import ExecutorKind
    from dapji.ops.tensor import Tensor
    from dapji.proof.lineage import Lineage
    from dapji.weights.checkpoint import Checkpoint
    from dapji.weights.convert import Report
    from dapji.weights.merge import Survival


F = TypeVar("F", bound=Callable[..., Any])

LITTLE = 0.9
"""Of a change: where less survives, a warning says so."""


def evaluate_options(command: F) -> F:
    """--evaluate --executor."""
    for option in (
        click.option(
            "--executor",
            type=EXECUTORS,
            help="What computes for --evaluate [default: native where it was built].",
        ),
        click.option(
            "--evaluate",
            multiple=True,
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            metavar="FILE",
            help="Compare on these held-out examples, as `dapji data check` reads them: losses, and the divergence of "
            "the result from what it was made from.",
        ),
    ):
        command = option(command)
    return command


def type_name(text: str) -> str:
    """TYPE as people write it -> the name of a scheme, if there is one."""
    name = text.upper()
    return "Q4_K_M" if name == "Q4_K" else name


def check_evaluation(paths: Sequence[Path], executor: ExecutorKind | None) -> None:
    """Raises UsageError where an option would be ignored."""
    if executor is not None and not paths:
        raise click.UsageError("--executor computes for --evaluate, which is not given")


def check_target(out: Path, *, force: bool) -> None:
    """Raises UsageError where something is at `out` that may not be replaced: before anything takes its time."""
    from dapji.weights.files import check_new_folder

    if out.suffix != ".gguf":
        check_new_folder(out)
    else:
        check_new_file(out, force=force)


def write(
    source: Checkpoint,
    type_: str,
    out: Path,
    *,
    allow_requantize: bool,
    measure: bool = False,
    threads: int | None,
    weights: Mapping[str, Tensor] | None = None,
) -> Report:
    """A GGUF file or a folder, as the name of `out` says. weights: by canonical name, instead of the source's own."""
    from dapji.cli.pull import TerminalProgress
    from dapji.weights.convert import write_folder, write_quantized

    with TerminalProgress().bar(f"converting to {type_}", source.nbytes) as advance:
        if out.suffix == ".gguf":
            return write_quantized(
                source,
                out,
                type_,
                allow_requantize=allow_requantize,
                measure=measure,
                threads=threads,
                advance=advance,
                weights=weights,
            )
        return write_folder(source, out, type_, measure=measure, threads=threads, advance=advance, weights=weights)


def record(out: Path, lineage: Lineage) -> None:
    """Lineage and certificate beside or in what was written just now; the record of a file that it replaced goes.

    What cannot be run has no certificate, which is said.
    """
    from dapji.cli.pull import TerminalProgress
    from dapji.errors import DapjiError
    from dapji.proof.certificate import write_proof
    from dapji.proof.lineage import write_lineage
    from dapji.proof.record import record_path

    record_path(out).unlink(missing_ok=True)
    try:
        write_proof(out, lineage, TerminalProgress())
    except DapjiError as error:
        click.echo(f"{out} gets no certificate: {error.message}", err=True)
        write_lineage(out, lineage)


def conclude(
    out: Path,
    report: Report,
    lineage: Lineage,
    *,
    changes: Mapping[str, Survival] | None,
    measured: Divergence | None,
    as_json: bool,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Records what was written, and tells of it. lineage: without its outcome, which is what the change has kept, where
    changes and measured say it. about: for --json alone."""
    survival = {} if changes is None else {"survival": _survival_totals(changes)}
    evaluation = {} if measured is None else {"evaluation": asdict(measured)}
    record(out, msgspec.structs.replace(lineage, outcome={**survival, **evaluation}))
    if as_json:
        survived = {} if changes is None else {"survival": _survival_summary(changes)}
        click.echo(json.dumps({**_summary(report, out), **(about or {}), **survived, **evaluation}, indent=2))
        return
    _print_summary(report, out)
    if changes is not None:
        _print_survival(changes)
    if measured is not None:
        _print_divergence(measured)


def _summary(report: Report, out: Path) -> dict[str, Any]:
    """For --json."""
    return {
        "path": str(out),
        "weights": report.values,
        "source_bytes": report.source_bytes,
        "bytes": report.target_bytes,
        "bits_per_weight": 8 * report.target_bytes / report.values,
        "formats": report.formats,
        "tensors": [
            {
                "name": tensor.name,
                "source": tensor.source.name,
                "format": tensor.target.name,
                "weights": tensor.values,
                "error": tensor.error,
            }
            for tensor in report.tensors
        ],
    }


def _print_summary(report: Report, out: Path) -> None:
    from dapji.weights.sources_base import human_size

    for tensor in report.tensors:
        if tensor.error is not None:
            click.echo(f"{tensor.name:32}  {tensor.source.name:>4} -> {tensor.target.name:4}  {tensor.error:.6f}")
    parts = ", ".join(f"{name} {human_size(size)}" for name, size in report.formats.items())
    before, after = (8 * size / report.values for size in (report.source_bytes, report.target_bytes))
    click.echo(f"{out}: {human_size(report.target_bytes)}, {after:.2f} bits per weight ({parts})")
    click.echo(f"before: {human_size(report.source_bytes)}, {before:.2f} bits per weight", err=True)


def _survival_totals(changes: Mapping[str, Survival]) -> dict[str, float | None]:
    """Of all changed weights together."""
    from dapji.weights.merge import Survival

    total = Survival.total(changes.values())
    return {"share": total.share, "bits": total.bits}


def _survival_summary(changes: Mapping[str, Survival]) -> dict[str, Any]:
    """For --json: in all, and of each changed weight by its canonical name."""
    tensors = [
        {
            "name": name,
            "share": change.share,
            "bits": change.bits,
            "change": math.sqrt(change.wanted),
            "rounding": math.sqrt(change.error),
        }
        for name, change in changes.items()
    ]
    return {**_survival_totals(changes), "tensors": tensors}


def _print_survival(changes: Mapping[str, Survival]) -> None:
    """A line for people; on stderr a warning with advice, where much of the change is lost."""
    from dapji.weights.merge import Survival

    total = Survival.total(changes.values())
    if total.share is None:
        click.echo("survives: there is no change")
        return
    if total.bits is None:
        click.echo("survives: all of the change, none of it was rounded")
        return
    least, change = min(changes.items(), key=lambda each: math.inf if each[1].bits is None else each[1].bits)
    click.echo(
        f"survives: {total.share:.1%} of the change, {total.bits:.1f} bits "
        f"(of {len(changes)} tensors the least: {least} {change.share:.1%}, {change.bits:.1f} bits)"
    )
    if total.bits < 0 or total.share < LITTLE:
        said = f"of the change {total.share:.0%} survive, beside a rounding {2**-total.bits:.1f} times as large as it"
        click.echo(click.style("warning: ", fg="yellow", bold=True) + said, err=True, color=wants_colour())
        advice = "use an adapter as it is (--adapter of dapji chat, run and serve), or write F16, which rounds least"
        click.echo(click.style("hint: ", fg="cyan", bold=True) + advice, err=True, color=wants_colour())


def held_out(paths: Sequence[Path], files: Files) -> list[Text]:
    """The examples of held-out files as the model reads them."""
    from dapji.errors import FormatError
    from dapji.evaluation.divergence import Text
    from dapji.files import default_context
    from dapji.training.data.encoding import Encoder
    from dapji.training.data.reading import Reader, refusal

    if not paths:
        return []
    encoder = Encoder(files.tokenizer(), max_length=default_context(files.config))
    entries = [entry for path in paths for entry in Reader(path, encoder)]
    if wrong := [entry for entry in entries if entry.error is not None]:
        raise refusal(wrong, len(entries))
    samples = [(entry, sample) for entry in entries for sample in entry.samples]
    for entry, sample in samples:
        if len(sample.sequences) > 1 or sample.good is not None:
            raise FormatError(
                f"{entry.where}: a preference has no one answer to be compared on",
                hint="--evaluate takes conversations, prompts with completions, and texts",
            )
    if not samples:
        raise FormatError(f"{paths[0]}: there is no example")
    return [Text(ids=each.ids, judged=each.learned) for _, sample in samples for each in sample.sequences]


def measure(
    source: Files,
    adapter: Adapter | None,
    result: Files,
    texts: Sequence[Text],
    *,
    executor: ExecutorKind | None,
    threads: int | None,
) -> Divergence | None:
    """None where there are no texts."""
    from tqdm import tqdm

    from dapji.evaluation.divergence import divergence

    if not texts:
        return None
    with tqdm(desc="comparing answers", total=len(texts), disable=None, delay=1, leave=False) as bar:
        return divergence(
            source, adapter, result, texts, executor=executor, threads=threads, progress=lambda: bar.update()
        )


def _print_divergence(measured: Divergence) -> None:
    if measured.base_loss is None:
        before = f"loss {measured.source_loss:.4f} before"
    else:
        before = f"loss of the base {measured.base_loss:.4f}, with the adapter {measured.source_loss:.4f}"
    click.echo(f"held out, {measured.tokens} tokens: {before}, of the result {measured.loss:.4f}")
    click.echo(
        f"divergence from what it was made from: {measured.kl:.2g} +/- {measured.kl_error:.1g}, the same likeliest "
        f"token in {measured.same_top:.1%} of places"
    )
