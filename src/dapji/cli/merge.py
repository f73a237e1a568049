"""`dapji merge`: a model with an adapter's change in its own weights, and how much of the change is left there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from dapji.cli.conversion import evaluate_options


@click.command()
@click.argument("base")
@click.argument("type_", metavar="TYPE")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="PATH[=FACTOR]",
    help="A LoRA adapter for the base: PEFT's folder or a GGUF file. Several are added up, each times its factor.",
)
@evaluate_options
@click.option("--force", is_flag=True, help="Replace OUT if it is a file that exists.")
@click.option("--threads", type=click.IntRange(1), help="[default: all processors]")
@click.option("--json", "as_json", is_flag=True, help="Everything, of every changed tensor, as one JSON object.")
def command(
    base: str,
    type_: str,
    out: Path,
    adapters: tuple[str, ...],
    evaluate: tuple[Path, ...],
    executor: Any,
    force: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write BASE with an adapter merged into its weights to OUT, in TYPE.

    BASE is a name of `dapji list`, a GGUF file, or a folder with config.json and safetensors. OUT
    is a GGUF file if its name ends in .gguf, else a new folder in the Hugging Face layout; TYPE is
    as in `dapji quantize`. The sum W + scale B A is computed in float32, of a quantised base too,
    which is dequantised for it; then it is rounded to TYPE.

    An adapter needs no merging: `dapji chat`, `dapji serve` and others use it as it is, with nothing
    lost. Rounding a merged weight can be larger than the change, so it is measured:

    \b
      survives   which share of the change is in the written weights; 100 % is all of it
      bits       log2 of the change's length over the rounding's: below 0 the rounding is larger
      divergence KL of next tokens by the result, from those by base and adapter (--evaluate)

    \b
    Examples:
      dapji merge smollm2-135m BF16 ./support-model --adapter ./support
      dapji merge ./Llama-3.2-1B Q8_0 m.gguf --adapter ./support --evaluate held-out.jsonl
      dapji merge ./Llama-3.2-1B Q8_0 m.gguf --adapter ./style=0.5 --adapter ./facts

    Exit codes: 0 written, 1 not written, 2 wrong usage, 130 interrupted.
    """
    from tqdm import tqdm

    from dapji.cli.conversion import (
        check_evaluation,
        check_target,
        conclude,
        held_out,
        measure,
        type_name,
        write,
    )
    from dapji.cli.pull import TerminalProgress
    from dapji.files import open_files
    from dapji.models.adapter import combined
    from dapji.proof.lineage import Lineage, parent, versions
    from dapji.weights.convert import FLOATS
    from dapji.weights.merge import merged, survival

    check_evaluation(evaluate, executor)
    check_target(out, force=force)
    type_ = type_name(type_)
    files = open_files(base)
    given = [_adapter(text) for text in adapters]
    adapter = combined([(files.adapter(path), factor) for path, factor in given])
    weights = merged(files.tensors, adapter)
    texts = held_out(evaluate, files)
    hashing = TerminalProgress()
    parents = parent("base", base, hashing), *(parent("adapter", str(path), hashing) for path, _ in given)
    if quantised := sorted({files.tensors[name].format.name for name in weights} - {*FLOATS}):
        click.echo(f"the base is quantised ({', '.join(quantised)}): its values are dequantised for the sum", err=True)
    report = write(files.checkpoint, type_, out, allow_requantize=True, threads=threads, weights=weights)
    result = open_files(out)
    with tqdm(desc="comparing weights", total=len(weights), disable=None, delay=1, leave=False) as bar:
        changes = survival(files.tensors, weights, result.tensors, lambda name: bar.update())
    measured = measure(files, adapter, result, texts, executor=executor, threads=threads)
    conclude(
        out,
        report,
        Lineage(
            kind="merge",
            parents=parents,
            settings={"type": type_, "factors": [factor for _, factor in given]},
            versions=versions(),
        ),
        changes=changes,
        measured=measured,
        as_json=as_json,
        about={
            "base": str(files.checkpoint.path),
            "adapters": [{"path": str(path), "factor": factor} for path, factor in given],
        },
    )


def _adapter(text: str) -> tuple[Path, float]:
    """PATH or PATH=FACTOR."""
    path, separator, factor = text.rpartition("=")
    if separator and not Path(text).exists():
        try:
            value = float(factor)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise click.BadParameter(f"{text!r}: {factor!r} is no number", param_hint="--adapter")
        return Path(path).expanduser(), value
    return Path(text).expanduser(), 1.0
