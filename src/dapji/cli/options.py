"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dapji.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MODEL = "qwen2.5-coder-0.5b"
SMALL_MODEL = "smollm2-135m"

EXECUTORS = click.Choice(["native", "torch", "reference"])

SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "0: always the likeliest token."),
    "top_p": (float, "Keep the likeliest tokens up to this mass."),
    "top_k": (int, "Keep the k likeliest tokens; 0: all."),
    "min_p": (float, "Drop tokens less likely than this share of the likeliest."),
    "typical_p": (float, "Keep the tokens of most typical surprise up to this mass."),
    "repetition_penalty": (float, "Over 1: fewer repetitions of prompt and answer."),
    "frequency_penalty": (float, "Over 0: a token gets less likely each time it appears in the answer."),
    "presence_penalty": (float, "Over 0: a token gets less likely once it has appeared in the answer."),
    "seed": (int, "Same seed, same answer."),
    "max_tokens": (int, "Longest answer [default: what fits the context]."),
    "stop": (str, "End the answer before this text; may be repeated."),
}
"""How an answer is drawn: name -> type and help. What is not given is the model's own default."""


def sampling_options(command: F) -> F:
    """--temperature … --stop: the names of SAMPLING, None (of --stop, an empty tuple) where not given."""
    for name, (kind, text) in reversed(SAMPLING.items()):
        names = ["--" + name.replace("_", "-"), *(["-t"] if name == "temperature" else [])]
        command = click.option(*names, type=kind, multiple=name == "stop", help=text)(command)
    return command


def given_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Takes the sampling options out of a command's values; returns those that were given."""
    taken = {name: values.pop(name) for name in SAMPLING}
    return {name: value for name, value in taken.items() if value not in (None, ())}


def executor_options(command: F) -> F:
    """--executor --threads --kv --device --dtype: how a model is opened, as `dapji.load` takes them."""
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16"]),
            default="float32",
            show_default=True,
            help="torch: of weights and activations.",
        ),
        click.option("--device", default="cpu", show_default=True, help="torch: cpu, cuda, cuda:1, mps."),
        click.option(
            "--kv",
            type=click.Choice(["f32", "f16", "q8"]),
            default="f16",
            show_default=True,
            help="Format of the cache of keys and values.",
        ),
        click.option("--threads", type=click.IntRange(1), help="native: threads [default: all processors]."),
        click.option(
            "--executor",
            type=EXECUTORS,
            help="What computes [default: native where it was built, else reference].",
        ),
    ):
        command = option(command)
    return command


separator_option = click.option(
    "--separator", help="The line between two texts of a text file [default: a file is one text]."
)

context_option = click.option(
    "--context", type=click.IntRange(1), help="Longest conversation in tokens [default: the model's, at most 8192]."
)

adapter_option = click.option(
    "--adapter",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="A LoRA adapter for the model: PEFT's folder, or a GGUF file.",
)

kv_memory_option = click.option(
    "--kv-memory",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="GB",
    help="For the conversations of one model, side by side and as long as they may be read again; room for one of "
    "--context there always is.",
)

speculate_option = click.option(
    "--no-speculate",
    "speculate",
    flag_value=False,
    default=True,
    help="Compute no tokens ahead where a text repeats itself; the answer is the same.",
)


def check_new_file(path: Path, *, force: bool) -> None:
    """Raises UsageError where something is at `path` that may not be replaced."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", hint="--force replaces it")
