"""`dapji bench`: a model's speed beside what this machine could do."""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.options import DEFAULT_MODEL, executor_options

if TYPE_CHECKING:
    from dapji.evaluation.speed import Speed, Work


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--decode", type=click.IntRange(1), default=128, show_default=True, help="Tokens of the answer.")
@click.option("--depth", type=click.IntRange(0), default=0, show_default=True, help="Tokens before the answer.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Medians are of so many runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@executor_options
def command(
    model: str, prompt: int, decode: int, depth: int, repeats: int, as_json: bool, threads: int | None, **values: Any
) -> None:
    """Measure how fast MODEL reads a prompt and writes an answer, one request at a time.

    Beside each speed stands the limit that this machine sets. Writing reads all weights and the
    cache once per token: the limit is the measured read bandwidth. Reading a prompt multiplies
    each token with all weights: the limit is the measured peak of 8-bit dot products. Limits and
    speeds are measured in turn and medians compared, so that a busy machine slows both.

    MODEL is an installed model or a path; by default the default model of `dapji chat`.

    \b
    Examples:
      dapji bench
      dapji bench smollm2-135m --threads 1
      dapji bench ./model.gguf --prompt 2048 --depth 2048 --kv q8 --json

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from tqdm import tqdm

    from dapji.evaluation.machine import describe_machine
    from dapji.evaluation.speed import Work, measure_speed
    from dapji.model import load
    from dapji.models.executor import default_kind
    from dapji.ops import native

    if values["device"] != "cpu":
        raise click.UsageError(f"the limits are those of the processor: --device must be cpu, got {values['device']}")
    kind = values["executor"] or default_kind()
    n_threads = threads or (native.default_threads() if native.available() else describe_machine().processors)
    context = max(prompt + 1, max(depth, 1) + decode + 1)
    with (
        load(model, context=context, threads=threads, speculate=False, **values) as opened,
        tqdm(desc="measuring", total=3 * (repeats + 1), unit="run", disable=None, delay=1, leave=False) as bar,
    ):
        work = Work.of(opened.config, opened.files.tensors, values["kv"])
        speed = measure_speed(
            opened.engine,
            vocab_size=opened.tokenizer.vocab_size,
            threads=n_threads,
            n_prompt=prompt,
            n_decode=decode,
            depth=depth,
            repeats=repeats,
            progress=bar.update,
        )
    what = f"{kind} ({native.isa()}, {n_threads} threads)" if kind == "native" else kind
    if as_json:
        about = {"model": opened.name, "executor": kind, "threads": n_threads, "kv": values["kv"]}
        click.echo(json.dumps(about | _as_json(speed, work), indent=2))
        return
    click.echo(f"{opened.name}: {opened.summary}; {what}, cache {values['kv']}")
    peak = "" if speed.int8_peak is None else f", {speed.int8_peak / 1e9:.0f} Gop/s in 8-bit dot products"
    click.echo(f"this machine: {speed.read_bandwidth / 1e9:.1f} GB/s read{peak}")
    click.echo(f"{'':<12} {'tokens/s':>9} {'slowest':>9} {'fastest':>9} {'limit':>9} {'share':>6}")
    mega = speed.decode_bytes(work) / 1e6
    giga = speed.prompt_operations(work) / 1e9
    for name, rates, limit, reason in (
        (f"prompt {prompt}", speed.prompt, speed.prompt_limit(work), f"{giga:.3g} Gop a token"),
        (f"decode {decode}", speed.decode, speed.decode_limit(work), f"{mega:.4g} MB a token"),
    ):
        numbers = " ".join(f"{rate:>9.1f}" for rate in (median(rates), min(rates), max(rates)))
        bound = "        ?      ?" if limit is None else f"{limit:>9.1f} {median(rates) / limit:>6.0%}"
        click.echo(f"{name:<12} {numbers} {bound}  {reason}")


def _as_json(speed: Speed, work: Work) -> dict[str, Any]:
    """Rates in tokens/s, the rest in bytes and operations (per second where they are limits)."""
    return {
        "machine": {"read_bandwidth": speed.read_bandwidth, "int8_peak": speed.int8_peak},
        "prompt": {
            "tokens": speed.n_prompt,
            "median": median(speed.prompt),
            "runs": speed.prompt,
            "operations_per_token": speed.prompt_operations(work),
            "limit": speed.prompt_limit(work),
        },
        "decode": {
            "tokens": speed.n_decode,
            "depth": speed.depth,
            "median": median(speed.decode),
            "runs": speed.decode,
            "bytes_per_token": speed.decode_bytes(work),
            "limit": speed.decode_limit(work),
        },
    }
