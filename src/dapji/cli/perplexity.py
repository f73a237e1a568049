"""`dapji perplexity`: how well a model predicts a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dapji.cli.console import read_stdin
from dapji.cli.options import adapter_option, executor_options


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True), default="-")
@click.option("--chunk", type=click.IntRange(6), default=512, show_default=True, help="Tokens per chunk, even.")
@click.option("--max-chunks", type=click.IntRange(1), help="Stop after so many chunks [default: the whole text].")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@adapter_option
@executor_options
def command(model: str, file: Path, chunk: int, max_chunks: int | None, as_json: bool, **values: Any) -> None:
    """Measure the perplexity of MODEL on the text in FILE, or on stdin: exp of the mean negative
    log-likelihood of a token; lower is better.

    The procedure is that of llama.cpp's llama-perplexity, so that values can be compared at equal
    --chunk: the text is cut into chunks of that many tokens, which do not see each other; in each
    the second half is scored; where the model wants a BOS token it takes the place of a chunk's
    first. One newline at the end of the text is dropped, as there; what does not fill a chunk at the
    end is left out, and the output says how much. Values of models with different tokenizers
    cannot be compared.

    \b
    Examples:
      dapji perplexity smollm2-135m wiki.test.raw
      dapji perplexity ./model.gguf text.txt --chunk 2048 --max-chunks 20 --json
      zcat text.gz | dapji perplexity smollm2-135m

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from tqdm import tqdm

    from dapji.evaluation.perplexity import perplexity
    from dapji.model import load

    if chunk % 2:
        raise click.UsageError(f"--chunk must be even, got {chunk}")
    text = _text(file)
    with (
        load(model, context=chunk, **values) as opened,
        tqdm(desc="perplexity", unit="chunk", disable=None, delay=1, leave=False) as bar,
    ):
        tokenizer = opened.tokenizer
        bos_id = tokenizer.bos_id if tokenizer.add_bos else None
        tokens = ([] if bos_id is None else [bos_id]) + tokenizer.encode(text)

        def progress(done: int, total: int, so_far: float) -> None:
            bar.total = total
            bar.set_postfix_str(f"{so_far:.4f}", refresh=False)
            bar.update(done - bar.n)

        result = perplexity(
            opened.engine,
            tokens,
            chunk=chunk,
            max_chunks=max_chunks,
            bos_id=bos_id,
            adapter=opened.adapter_number(None),
            progress=progress,
        )
    left_out = len(tokens) - result.chunks * chunk
    if as_json:
        about = {"perplexity": result.value, "error": result.error, "chunk": chunk, "chunks": result.chunks}
        click.echo(json.dumps(about | {"scored_tokens": result.tokens, "left_out_tokens": left_out}, indent=2))
        return
    click.echo(
        f"perplexity {result.value:.4f} +/- {result.error:.4f} ({result.chunks} chunks of {chunk} tokens, "
        f"{result.tokens} scored, the last {left_out} of the text left out)"
    )


def _text(file: Path) -> str:
    if str(file) == "-":
        return read_stdin()
    try:
        return file.read_bytes().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
