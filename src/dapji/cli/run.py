"""`dapji run`: continue a text, without a chat template."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.console import read_prompt, write
from dapji.cli.options import (
    adapter_option,
    context_option,
    executor_options,
    given_sampling,
    sampling_options,
    speculate_option,
)

if TYPE_CHECKING:
    from dapji.model import Reply
    from dapji.tokenizer import Tokenizer


@click.command()
@click.argument("model")
@click.argument("text", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end: text, tokens, usage, timings.")
@click.option(
    "--logprobs",
    type=click.IntRange(0),
    metavar="N",
    help="With --json: log-probability of each token and of the N likeliest, before any sampling option.",
)
@click.option("--stats", is_flag=True, help="Tokens per second, on stderr.")
@sampling_options
@adapter_option
@context_option
@executor_options
@speculate_option
def command(model: str, text: tuple[str, ...], as_json: bool, logprobs: int | None, stats: bool, **values: Any) -> None:
    """Print what MODEL writes after TEXT, or after the text on stdin. No chat template is applied.

    MODEL is a name of `dapji list`, or a path. A last word - stands for stdin. One newline at the
    end of stdin is dropped. The text's own control tokens, as <|im_end|>, are plain characters.

    \b
    Examples:
      dapji run smollm2-135m "Once upon a time" --max-tokens 50
      dapji run smollm2-135m --temperature 0 --stop $'\\n' < prompt.txt
      dapji run ./model.gguf "2 + 2 =" --max-tokens 1 --json --logprobs 5 | jq .tokens[0].top

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from dapji.cli.conversation import speed_line
    from dapji.model import load

    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    prompt = read_prompt(text)
    if prompt is None:
        raise click.UsageError("give a text as an argument or on stdin")
    sampling = given_sampling(values)
    with load(model, **values) as opened:
        reply = opened.complete(prompt, logprobs=logprobs, **sampling)
        for piece in reply:
            if not as_json:
                write(piece)
        write(json.dumps(_as_json(reply, opened.tokenizer), ensure_ascii=False, indent=2) + "\n" if as_json else "\n")
        if stats:
            click.echo(speed_line(reply), err=True)


def _as_json(reply: Reply, tokenizer: Tokenizer) -> dict[str, Any]:
    assert reply.finish is not None
    usage, timings = reply.finish.usage, reply.finish.timings
    tokens = [_token(token, tokenizer) for token in reply.tokens]
    for token, logprobs in zip(tokens, reply.logprobs, strict=False):  # none were asked for: none are there
        token["logprob"] = logprobs.chosen
        token["top"] = [_token(other, tokenizer) | {"logprob": value} for other, value in logprobs.top]
    return {
        "text": reply.text,
        "finish_reason": reply.finish.reason,
        "usage": asdict(usage),
        "seconds": {"first_token": timings.first_token, "decode": timings.decode},
        "tokens": tokens,
    }


def _token(token: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token need not be whole characters: its bytes (hexadecimal) say what its text cannot."""
    data = tokenizer.token_bytes(token)
    return {"id": token, "text": data.decode("utf-8", errors="replace"), "bytes": data.hex()}
