"""`dapji serve --engine vllm`: its options, and the model whose tokens vLLM computes."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from dapji.errors import UsageError

if TYPE_CHECKING:
    from dapji.engine.vllm_process import VllmProcess
    from dapji.model import Model

F = TypeVar("F", bound=Callable[..., Any])

_COMMAND = "vllm serve"
_OWN = ("executor", "threads", "kv", "device", "dtype", "speculate", "kv_memory", "memory", "adapters")
"""Options of `dapji serve` that its own engine reads, and vLLM does not."""
_KEY = "VLLM_API_KEY"


def engine_options(command: F) -> F:
    """--engine --vllm-command --vllm-url."""
    for option in (
        click.option("--vllm-url", metavar="URL", help="vllm: a server that runs already, instead of starting one."),
        click.option(
            "--vllm-command",
            default=_COMMAND,
            show_default=True,
            metavar="COMMAND",
            help="vllm: what starts its server, with any of its own options.",
        ),
        click.option(
            "--engine",
            type=click.Choice(["dapji", "vllm"]),
            default="dapji",
            show_default=True,
            help="What computes tokens.",
        ),
    ):
        command = option(command)
    return command


def check_engine_options(context: click.Context) -> None:
    """Raises UsageError for an option of the engine that was not chosen: nothing is silently ignored."""
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if context.params["engine"] == "vllm":
        for name in given:
            if name in _OWN:
                raise UsageError(
                    f"{options[name]} is an option of Dapji's own engine, and --engine is vllm",
                    hint="vLLM's own go into --vllm-command",
                )
        if "vllm_url" in given and (other := {"vllm_command", "context"}.intersection(given)):
            raise UsageError(
                f"{options[min(other)]} is for a server that is started, and --vllm-url names one that runs"
            )
    else:
        for name in ("vllm_command", "vllm_url"):
            if name in given:
                raise UsageError(f"{options[name]} is an option of vLLM, and --engine is dapji", hint="--engine vllm")


@contextmanager
def model_on_vllm(
    names: Sequence[str], command: str, url: str | None, *, context: int | None
) -> Iterator[tuple[Model, VllmProcess | None]]:
    """The one model of `names`, and the server that was started to compute for it, unless one runs at `url`; both for
    as long as the context lasts. Raises UsageError, UnavailableError, and what `dapji.load` raises."""
    from dapji.engine.vllm_http import Address
    from dapji.engine.vllm_process import VllmProcess
    from dapji.model import load_on_vllm
    from dapji.weights import store

    if len(names) != 1:
        raise UsageError(
            f"a vLLM server computes for one model, and there are {len(names)}: {', '.join(names)}",
            hint="name one; for others start a `dapji serve` each, on ports of their own",
        )
    path = store.resolve(names[0])
    if not path.is_dir():
        raise UsageError(
            f"{path} is one file, and vLLM reads folders of safetensors with a config.json",
            hint="dapji quantize FILE FOLDER --to bf16 writes one",
        )
    with ExitStack() as held:
        process = None
        if url is not None:
            address = Address.of_url(url, key=os.environ.get(_KEY))
        else:
            start = time.monotonic()
            process = held.enter_context(VllmProcess(_words(command), path, context=context))
            click.echo(f"starting {process}", err=True)
            process.wait_until_ready()
            address = process.address
            click.echo(f"vLLM is ready after {time.monotonic() - start:.0f} s", err=True)
        yield held.enter_context(load_on_vllm(path, address)), process


def _words(command: str) -> list[str]:
    """As a shell reads it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--vllm-command {command!r} cannot be read: {error}") from None
    if not words:
        raise UsageError("--vllm-command is empty", hint=_COMMAND)
    return words
