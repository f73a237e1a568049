"""`dapji quantize`: write a copy of a model in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dapji.cli.conversion import evaluate_options
from dapji.errors import UsageError

if TYPE_CHECKING:
    from dapji.files import Files
    from dapji.models.executor import ExecutorKind


@click.command()
@click.argument("source")
@click.argument("type_", metavar="TYPE")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT if it is a file that exists.")
@click.option("--allow-requantize", is_flag=True, help="Quantise weights that are quantised already.")
@click.option("--errors", is_flag=True, help="Measure and print the error of every tensor.")
@click.option("--base", metavar="MODEL", help="What SOURCE was trained from: tell how much of the change survives.")
@evaluate_options
@click.option("--threads", type=click.IntRange(1), help="[default: all processors]")
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object.")
def command(
    source: str,
    type_: str,
    out: Path,
    force: bool,
    allow_requantize: bool,
    errors: bool,
    base: str | None,
    evaluate: tuple[Path, ...],
    executor: ExecutorKind | None,
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
    relative to that of the weights. --base prints what `dapji merge` says of an adapter.

    \b
    Examples:
      dapji quantize ./Llama-3.2-1B-Instruct Q4_K_M llama-1b.gguf
      dapji quantize model-f16.gguf Q6_K model-q6_k.gguf --errors
      dapji quantize smollm2-135m BF16 ./smollm2-hf
      dapji quantize ./tuned Q4_K_M tuned.gguf --base ./Llama-3.2-1B-Instruct

    Exit codes: 0 written, 1 not written, 2 wrong usage, 130 interrupted.
    """
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
    from dapji.proof.lineage import Lineage, parent, versions
    from dapji.weights import store
    from dapji.weights.checkpoint import open_checkpoint
    from dapji.weights.convert import FLOATS
    from dapji.weights.merge import survival

    check_evaluation(evaluate, executor)
    check_target(out, force=force)
    type_ = type_name(type_)
    checkpoint = open_checkpoint(store.resolve(source))
    files = open_files(source) if base is not None or evaluate else None
    before = None if files is None or base is None else _base_of(files, base)
    texts = [] if files is None else held_out(evaluate, files)
    made_of = parent("source", source, TerminalProgress())  # now: OUT may take its place
    report = write(checkpoint, type_, out, allow_requantize=allow_requantize, measure=errors, threads=threads)
    changes = measured = None
    if files is not None:
        result = open_files(out)
        measured = measure(files, None, result, texts, executor=executor, threads=threads)
        if before is not None:
            every = survival(before.tensors, files.tensors, result.tensors)
            changes = {name: change for name, change in every.items() if change.wanted}
    conclude(
        out,
        report,
        Lineage(
            kind="convert" if type_ in FLOATS else "quantize",
            parents=(made_of,),
            settings={"type": type_},
            versions=versions(),
        ),
        changes=changes,
        measured=measured,
        as_json=as_json,
    )


def _base_of(tuned: Files, name: str) -> Files:
    """Raises UsageError where it is another kind of model."""
    from dapji.files import open_files

    base = open_files(name)
    shapes, others = ({key: tensor.shape for key, tensor in files.tensors.items()} for files in (tuned, base))
    if different := sorted(key for key in shapes.keys() | others.keys() if shapes.get(key) != others.get(key)):
        key = different[0]
        raise UsageError(
            f"{name} is not what {tuned.checkpoint.path} was trained from: {key} is {shapes.get(key)} in the one, "
            f"{others.get(key)} in the other"
        )
    return base
