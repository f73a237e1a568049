"""`dapji remove`: delete a model from the store."""

from __future__ import annotations

import click


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(name: str, yes: bool) -> None:
    """Delete the model NAME, or its unfinished download, from the store for good, and what
    `dapji cache` keeps of it.

    Only what `dapji pull` installed can be removed; files elsewhere are never touched, and the
    original of a file: source stays.

    \b
    Examples:
      dapji remove smollm2-135m
      dapji remove mine --yes

    Exit codes: 0 removed, 1 not in the store or you said no, 2 wrong usage, 130 interrupted.
    """
    from dapji.weights import panel_cache, store
    from dapji.weights.sources_base import human_size

    size = store.stored_size(name)
    if not yes and not click.confirm(f"Delete {name} ({human_size(size)}) from {store.home()}?", err=True):
        raise click.exceptions.Exit(1)
    freed = store.remove(name) + panel_cache.sweep()
    click.echo(f"removed {name}, {human_size(freed)} freed", err=True)
