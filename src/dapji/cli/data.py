"""`dapji data`: look at examples before anything is trained on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.console import visible, wants_colour
from dapji.cli.options import separator_option

if TYPE_CHECKING:
    from dapji.training.data.report import Report, Shown

MAX_SHOWN = 400
"""Characters of each part of an example, learned or not, at its beginning and at its end."""
MAX_LISTED = 10
"""Lines of each kind that the report for people lists."""
BARS = 12
WIDTH = 40
"""Characters of the longest bar."""


@click.group()
def command() -> None:
    """Look at examples before a model learns from them.

    \b
    Examples:
      dapji data check train.jsonl --model smollm2-135m
      dapji data check train.jsonl --model smollm2-135m --eval test.jsonl --json

    Exit codes: as each command says; 2 wrong usage.
    """


@command.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--model", required=True, help="Whose tokenizer and chat template: a name of `dapji list`, or a path.")
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Look for its rows in FILES.",
)
@click.option("--format", "convention", help="The files' convention [default: told by their fields].")
@separator_option
@click.option("--context", type=click.IntRange(1), help="Longest sequence in tokens [default: the model's].")
@click.option("--truncate", is_flag=True, help="Cut longer ones at their end instead of refusing them.")
@click.option("--show", type=click.IntRange(0), default=3, show_default=True, help="Examples to show with their masks.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every line.")
def check(
    files: tuple[Path, ...],
    model: str,
    evaluation: Path | None,
    convention: str | None,
    separator: str | None,
    context: int | None,
    truncate: bool,
    show: int,
    as_json: bool,
) -> None:
    """Read FILES as training would: counts, lengths, what is learned, duplicates, rows that are wrong.

    A file is JSON lines (.jsonl), a JSON array (.json), a table (.csv, .tsv, .parquet) or plain text
    (.txt, .md), each also gzipped. Its convention is told by its fields:

    \b
      chat               messages [tools]            OpenAI's files for fine-tuning
      openai-preference  input preferred_output non_preferred_output
      sharegpt           conversations [system tools]
      alpaca             instruction output [input system history]
      completion         prompt completion           texts without a template, or messages
      preference         chosen rejected [prompt]    texts, messages or whole conversations
      rated              prompt completion label, or messages label
      text               text                        plain text, all of it learned

    The first examples are shown as the model sees them: what it learns is green, or between ⟦ and ⟧
    where there is no colour. An answer's end token is always learned.

    \b
    Examples:
      dapji data check train.jsonl --model smollm2-135m
      dapji data check train.jsonl --model smollm2-135m --eval test.jsonl
      dapji data check *.csv --model ./model --format alpaca --context 2048
      dapji data check train.jsonl --model smollm2-135m --json | jq .invalid

    Exit codes: 0 all rows can be learned, 1 some cannot, or a file cannot be read, 2 wrong usage.
    """
    from tqdm import tqdm

    from dapji.files import open_files
    from dapji.training.data.encoding import Encoder
    from dapji.training.data.reading import Reader
    from dapji.training.data.report import check as check_files

    opened = open_files(model)
    tokenizer = opened.tokenizer()
    length = opened.config.max_context if context is None else context
    encoder = Encoder(tokenizer, max_length=length, truncate=truncate)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(unit="row", disable=None, delay=1, leave=False))

        def progress(step: str) -> None:
            bar.set_description(step, refresh=False)
            bar.update()

        report = check_files(
            [Reader(path, encoder, convention=convention, separator=separator) for path in files],
            tokenizer,
            evaluation=None if evaluation is None else Reader(evaluation, encoder, separator=separator),
            show=show,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(_as_json(report), ensure_ascii=False, indent=2))
    else:
        _print(report, length, evaluation)
    if report.invalid:
        raise click.exceptions.Exit(1)


def _as_json(report: Report) -> dict[str, Any]:
    lengths = sorted(report.lengths)
    return {
        "conventions": report.conventions,
        "unread_fields": report.unread,
        "rows": report.rows,
        "invalid": [{"line": line, "reason": reason, "hint": hint} for line, reason, hint in report.invalid],
        "samples": report.samples,
        "tokens": sum(lengths),
        "learned_tokens": report.learned,
        "lengths": {f"p{q}": _quantile(lengths, q) for q in (0, 50, 90, 99, 100)} if lengths else {},
        "notes": dict(report.notes),
        "duplicates": [{"line": line, "earlier": earlier} for line, earlier in report.same],
        "near_duplicates": [
            {"line": line, "earlier": earlier, "similarity": round(similarity, 4)}
            for line, earlier, similarity in report.near
        ],
        "evaluation_rows": report.evaluation_rows,
        "overlap": [{"evaluation": line, "line": other} for line, other in report.overlap],
        "shown": [
            {
                "line": shown.where,
                "sequences": shown.sequences,
                "tokens": shown.tokens,
                "learned_tokens": shown.learned,
                "end": shown.end,
            }
            for shown in report.shown
        ],
    }


def _print(report: Report, context: int, evaluation: Path | None) -> None:
    for path, name in report.conventions.items():
        click.echo(f"{path}: {name}")
    for path, fields in report.unread.items():
        told = ", ".join(f"{name} ({n:,} rows)" for name, n in fields.items())
        click.echo(f"{path}: fields that are not read: {told}")
    click.echo(f"rows       {report.rows:,}, of which {len(report.invalid):,} cannot be learned")
    if report.lengths:
        tokens = sum(report.lengths)
        share = report.learned / tokens
        click.echo(f"samples    {report.samples:,} of {tokens:,} tokens, {report.learned:,} learned ({share:.1%})")
        lengths = sorted(report.lengths)
        named = ", ".join(f"{label} {_quantile(lengths, q):,}" for label, q in (("median", 50), ("99 %", 99)))
        click.echo(f"lengths    {named}, longest {lengths[-1]:,}; the context has {context:,}")
        for line in _histogram(lengths):
            click.echo(f"           {line}")
    for note, n in report.notes.most_common():
        click.echo(f"{note + ':':28}{n:,} rows")
    _list("say the same as an earlier row", [f"{line} = {earlier}" for line, earlier in report.same])
    near = [f"{line} ~ {earlier} ({similarity:.2f})" for line, earlier, similarity in report.near]
    _list("say nearly the same as an earlier row", near)
    if evaluation is not None:
        title = f"of {report.evaluation_rows:,} rows of {evaluation} ask what stands in an example (8 words in a row)"
        _list(title, [f"{line} with {other}" for line, other in report.overlap], always=True)
    _list("cannot be learned", [f"{line}: {reason}" for line, reason, _ in report.invalid])
    for hint in dict.fromkeys(hint for _, _, hint in report.invalid if hint):
        click.echo(click.style("  hint: ", fg="cyan") + hint, color=wants_colour())
    for shown in report.shown:
        _show(shown)


def _list(title: str, lines: Sequence[str], *, always: bool = False) -> None:
    if lines or always:
        click.echo(f"{len(lines):,} {title}")
    for line in lines[:MAX_LISTED]:
        click.echo(f"  {visible(line)}")
    if len(lines) > MAX_LISTED:
        click.echo(f"  and {len(lines) - MAX_LISTED:,} more (--json lists all)")


def _show(shown: Shown) -> None:
    end = "no end, which was cut off" if shown.end is None else f"the end {shown.end!r} too"
    where = click.style(shown.where, bold=True)
    click.echo(f"\n{where}  {shown.learned} of {shown.tokens} tokens learned, {end}", color=wants_colour())
    coloured = sys.stdout.isatty() and wants_colour() is not False
    for pieces in shown.sequences:
        click.echo("".join(_marked(pieces, coloured)), color=wants_colour())


def _marked(pieces: Iterable[tuple[str, bool]], coloured: bool) -> Iterable[str]:
    for text, learned in pieces:
        if len(text) > 2 * MAX_SHOWN:
            left_out = len(text) - 2 * MAX_SHOWN
            text = f"{text[:MAX_SHOWN]} … {left_out:,} characters … {text[-MAX_SHOWN:]}"
        if coloured:
            yield click.style(visible(text), fg="green" if learned else None, dim=not learned)
        else:
            yield f"⟦{text}⟧" if learned else text


def _quantile(ordered: Sequence[int], percent: int) -> int:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def _histogram(ordered: Sequence[int]) -> list[str]:
    """Bars of equal widths up to the 99th percentile; one more for what is longer."""
    step = max(1, -(-(_quantile(ordered, 99) + 1) // BARS))
    counts = [0] * (BARS + 1)
    for length in ordered:
        counts[min(length // step, BARS)] += 1
    first, *_, last = [i for i, n in enumerate(counts) if n] * 2
    lines = []
    for i, n in list(enumerate(counts))[first : last + 1]:
        span = f"{i * step:,}-{(i + 1) * step - 1:,}" if i < BARS else f"{i * step:,}-"
        bar = "█" * -(-n * WIDTH // max(counts))
        lines.append(f"{span:>15} {bar} {n:,}")
    return lines
