"""`dapji cache`: what packed weights are kept for a quicker start, and deleting them."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import click


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, sizes in bytes, times in UTC.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show the weights that are kept as the native kernels read them, so that a second start need
    not pack them again. STATUS is ready, or outdated where the model has changed or gone.

    They take as much room as the models. Files that are outdated are deleted when another is
    written. DAPJI_CACHE names another folder, or is off.

    \b
    Examples:
      dapji cache
      dapji cache --json | jq .total
      dapji cache clear smollm2-135m
      dapji cache clear

    Exit codes: 0 done, 1 the folder cannot be read, 2 wrong usage.
    """
    if ctx.invoked_subcommand is not None:
        return
    from dapji.weights import panel_cache
    from dapji.weights.sources_base import human_size

    entries, folder = panel_cache.entries(), panel_cache.folder()
    total = sum(entry.size for entry in entries)
    models = [
        {
            "model": entry.model,
            "status": "ready" if entry.current else "outdated",
            "size": entry.size,
            "last_use": datetime.fromtimestamp(entry.last_use, UTC).isoformat(timespec="seconds"),
            "path": str(entry.path),
        }
        for entry in entries
    ]
    if as_json:
        report = {"folder": None if folder is None else str(folder), "total": total, "models": models}
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    if folder is None:
        click.echo("the cache is off (DAPJI_CACHE)", err=True)
        return
    click.echo(f"{'SIZE':10}{'STATUS':10}{'LAST USE':18}MODEL")
    for entry in entries:
        status = "ready" if entry.current else "outdated"
        last_use = datetime.fromtimestamp(entry.last_use)
        click.echo(f"{human_size(entry.size):10}{status:10}{last_use:%Y-%m-%d %H:%M}  {entry.model}")
    click.echo(f"{human_size(total)} in {folder}", err=True)


@command.command()
@click.argument("model", required=False)
def clear(model: str | None) -> None:
    """Delete what is kept of MODEL (a name of `dapji list`, or a path), or of every model. The models
    themselves stay; the next start packs them again.

    \b
    Examples:
      dapji cache clear smollm2-135m
      dapji cache clear

    Exit codes: 0 done, 1 no such model, 2 wrong usage.
    """
    from dapji.weights import panel_cache, store
    from dapji.weights.sources_base import human_size

    freed = panel_cache.clear(None if model is None else store.resolve(model))
    click.echo(f"{human_size(freed)} freed", err=True)
