"""`dapji new`: a model that has learned nothing yet."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from dapji.cli.options import separator_option


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--tokenizer", help="Take that of this model instead: a name of `dapji list`, or a path.")
@click.option("--vocab-size", type=click.IntRange(260), help="Tokens of the new tokenizer [default: 4096].")
@separator_option
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Decides all sizes not given.")
@click.option("--dim", type=click.IntRange(2), help="Width [default: 64 for each layer].")
@click.option("--heads", type=click.IntRange(1), help="Query heads [default: one for each 64 of the width].")
@click.option("--kv-heads", type=click.IntRange(1), help="Key and value heads [default: as many].")
@click.option("--hidden-dim", type=click.IntRange(1), help="Of the feed-forward [default: 8/3 of the width].")
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="Longest sequence in tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the weights.")
@click.option("--json", "as_json", is_flag=True, help="What was written as one JSON object.")
def command(
    folder: Path,
    files: tuple[Path, ...],
    tokenizer: str | None,
    vocab_size: int | None,
    separator: str | None,
    seed: int,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Write a Llama that has learned nothing yet to FOLDER, with a tokenizer of its own trained on FILES.

    FILES are texts or examples, as `dapji data check` reads them. The tokenizer is byte-level BPE with
    a ChatML template: any text can be written with it. --tokenizer takes that of another model, so
    that a small and a large model share one. The folder is a model like any other: `dapji tune` trains
    it, transformers loads it. docs/training.md tells how weights begin.

    \b
    Examples:
      dapji new ./start shakespeare.txt --layers 4 --vocab-size 2048
      dapji new ./start corpus/*.jsonl --layers 8 --kv-heads 2 --context 2048
      dapji new ./student --tokenizer ./start --layers 2
      dapji tune recipe.toml model=./start data.train='["shakespeare.txt"]'

    Exit codes: 0 written, 1 not written, 2 wrong usage, 130 interrupted.
    """
    from dapji.models.size import parameters
    from dapji.training.new import DEFAULT_VOCAB_SIZE, Sizes, write_new

    if bool(files) == (tokenizer is not None):
        raise click.UsageError("a tokenizer is trained on FILES, or taken with --tokenizer: give one of the two")
    if tokenizer is not None and not (vocab_size is None and separator is None):
        raise click.UsageError("--vocab-size and --separator are of a tokenizer that is trained; leave them out")
    config = write_new(
        folder,
        Sizes(**sizes),
        seed=seed,
        texts=files,
        separator=separator,
        vocab_size=vocab_size or DEFAULT_VOCAB_SIZE,
        tokenizer=tokenizer,
        bars=sys.stderr.isatty(),
    )
    n = parameters(config)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "parameters": n, "vocab_size": config.vocab_size}))
    else:
        click.echo(f"{n / 1e6:.2f}M parameters, {config.vocab_size:,} tokens", err=True)
        click.echo(str(folder))
