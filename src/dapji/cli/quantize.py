"""`dapji quantize`: write a copy of a model in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dapji.weights.convert import Report


@click.command()
@click.argument("source")
@click.argument("type_", metavar="TYPE")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT if it is a file that exists.")
@click.option("--allow-requantize", is_flag=True, help="Quantise weights that are quantised already.")
@click.option("--errors", is_flag=True, help="Measure and print the error of every tensor.")
@click.option("--threads", type=click.IntRange(1), help="[default: all processors]")
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object.")
def command(
    source: str,
    type_: str,
    out: Path,
    force: bool,
    allow_requantize: bool,
    errors: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write a copy of SOURCE in TYPE to OUT.

    SOURCE is a name of `dapji list`, a GGUF file, or a folder with config.json and safetensors.
    OUT is a GGUF file if its name ends in .gguf, else a new folder in the Hugging Face layout, for
    which TYPE is F32, F16 or BF16. OUT appears when it is whole.

    \b
    TYPE     bits per weight, roughly
    Q8_0     8.5   hardly to be told from the original
    Q6_K     6.6
    Q5_K_M   5.7
    Q4_K_M   4.8   the usual choice (Q4_K means the same)
    Q4_K_S   4.6
    Q4_0     4.5   simplest, least accurate
    F32 F16 BF16   not quantised

    The mixes (_M, _S, and the head in all below 6 bits) give each tensor the format that
    llama.cpp's llama-quantize gives it. --errors prints root mean squares: of the differences,
    relative to that of the weights.

    \b
    Examples:
      dapji quantize ./Llama-3.2-1B-Instruct Q4_K_M llama-1b.gguf
      dapji quantize model-f16.gguf Q6_K model-q6_k.gguf --errors
      dapji quantize smollm2-135m BF16 ./smollm2-hf

    Exit codes: 0 written, 1 not written, 2 wrong usage, 130 interrupted.
    """
    from dapji.cli.pull import TerminalProgress
    from dapji.errors import UsageError
    from dapji.weights import store
    from dapji.weights.checkpoint import open_checkpoint
    from dapji.weights.convert import write_folder, write_quantized

    type_ = type_.upper()
    type_ = "Q4_K_M" if type_ == "Q4_K" else type_
    to_file = out.suffix == ".gguf"
    if to_file and out.exists() and not force:
        raise UsageError(f"{out} exists already", hint="--force replaces it")
    checkpoint = open_checkpoint(store.resolve(source))
    with TerminalProgress().bar(f"converting to {type_}", checkpoint.nbytes) as advance:
        if to_file:
            report = write_quantized(
                checkpoint,
                out,
                type_,
                allow_requantize=allow_requantize,
                measure=errors,
                threads=threads,
                advance=advance,
            )
        else:
            report = write_folder(checkpoint, out, type_, measure=errors, threads=threads, advance=advance)
    if as_json:
        click.echo(json.dumps(_summary(report, out), indent=2))
    else:
        _print(report, out)


def _summary(report: Report, out: Path) -> dict[str, Any]:
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


def _print(report: Report, out: Path) -> None:
    from dapji.weights.sources_base import human_size

    for tensor in report.tensors:
        if tensor.error is not None:
            click.echo(f"{tensor.name:32}  {tensor.source.name:>4} -> {tensor.target.name:4}  {tensor.error:.6f}")
    parts = ", ".join(f"{name} {human_size(size)}" for name, size in report.formats.items())
    before, after = (8 * size / report.values for size in (report.source_bytes, report.target_bytes))
    click.echo(f"{out}: {human_size(report.target_bytes)}, {after:.2f} bits per weight ({parts})")
    click.echo(f"before: {human_size(report.source_bytes)}, {before:.2f} bits per weight", err=True)
