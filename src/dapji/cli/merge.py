"""`dapji merge`: a model with an adapter's change in its own weights, and how much of the change is left there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dapji.evaluation.divergence import Divergence, Text
    from dapji.files import Files


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
@click.option(
    "--evaluate",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Compare base, base with adapter, and result on these held-out examples, as `dapji data check` reads them.",
)
@click.option("--executor", type=click.Choice(["native", "torch", "reference"]), help="What computes for --evaluate.")
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
        check_target,
        print_summary,
        print_survival,
        record,
        summary,
        survival_summary,
        survival_totals,
        type_name,
        write,
    )
    from dapji.cli.pull import TerminalProgress
    from dapji.files import open_files
    from dapji.models.adapter import combined
    from dapji.proof.lineage import Lineage, parent, versions
    from dapji.weights.convert import FLOATS
    from dapji.weights.merge import merged, survival

    check_target(out, force=force)
    type_ = type_name(type_)
    files = open_files(base)
    given = [_adapter(text) for text in adapters]
    adapter = combined([(files.adapter(path), factor) for path, factor in given])
    weights = merged(files.tensors, adapter)
    texts = _texts(evaluate, files)
    hashing = TerminalProgress()
    parents = parent("base", base, hashing), *(parent("adapter", str(path), hashing) for path, _ in given)
    if quantised := sorted({files.tensors[name].format.name for name in weights} - {*FLOATS}):
        click.echo(f"the base is quantised ({', '.join(quantised)}): its values are dequantised for the sum", err=True)
    report = write(files.checkpoint, type_, out, allow_requantize=True, threads=threads, weights=weights)
    result = open_files(out)
    with tqdm(desc="comparing weights", total=len(weights), disable=None, delay=1, leave=False) as bar:
        changes = survival(files.tensors, weights, result.tensors, lambda name: bar.update())
    measured = None
    if texts:
        from dapji.evaluation.divergence import divergence

        with tqdm(desc="comparing answers", total=len(texts), disable=None, delay=1, leave=False) as bar:
            measured = divergence(
                files, adapter, result, texts, executor=executor, threads=threads, progress=lambda: bar.update()
            )
    told = {"evaluation": asdict(measured)} if measured is not None else {}
    record(
        out,
        Lineage(
            kind="merge",
            parents=parents,
            settings={"type": type_, "factors": [factor for _, factor in given]},
            outcome={"survival": survival_totals(changes), **told},
            versions=versions(),
        ),
    )
    if as_json:
        about = {
            "base": str(files.checkpoint.path),
            "adapters": [{"path": str(path), "factor": factor} for path, factor in given],
            "survival": survival_summary(changes),
        }
        click.echo(json.dumps(summary(report, out) | about | told, indent=2))
        return
    print_summary(report, out)
    print_survival(changes)
    if measured is not None:
        _print(measured)


def _adapter(text: str) -> tuple[Path, float]:
    """PATH or PATH=FACTOR."""
    path, separator, factor = text.rpartition("=")
    if separator and not Path(text).exists():
        try:
            return Path(path).expanduser(), float(factor)
        except ValueError:
            raise click.BadParameter(f"{text!r}: {factor!r} is no number", param_hint="--adapter") from None
    return Path(text).expanduser(), 1.0


def _texts(paths: Sequence[Path], files: Files) -> list[Text]:
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


def _print(measured: Divergence) -> None:
    click.echo(
        f"held out, {measured.tokens} tokens: loss of the base {measured.base_loss:.4f}, with the adapter "
        f"{measured.adapter_loss:.4f}, of the result {measured.loss:.4f}"
    )
    click.echo(
        f"divergence from base and adapter: {measured.kl:.2g} +/- {measured.kl_error:.1g}, the same likeliest token in "
        f"{measured.same_top:.1%} of places"
    )
