"""`dapji list`: what is in the store, and what the catalogue offers."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array, sizes in bytes.")
def command(as_json: bool) -> None:
    """List the installed models and those that the catalogue offers.

    STATUS is installed, partial (a download that `dapji pull` continues) or available. SIZE of
    an available model is what it will take.

    \b
    Examples:
      dapji list
      dapji list --json | jq -r '.[] | select(.status == "installed") | .path'

    Exit codes: 0 done, 1 the store cannot be read, 2 wrong usage.
    """
    models = _models()
    if as_json:
        click.echo(json.dumps(models, indent=2, ensure_ascii=False))
        return
    from dapji.weights.sources_base import human_size

    rows = [("NAME", "STATUS", "SIZE", "LICENCE", "DESCRIPTION")]
    rows += [
        (m["name"], m["status"], human_size(m["size"]), m["licence"] or "?", m["description"] or m["source"])
        for m in models
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        name, status, size, licence = (text.ljust(width) for text, width in zip(row[:4], widths, strict=True))
        click.echo(f"{name}  {_coloured(status)}  {size}  {licence}  {row[4]}")


def _coloured(status: str) -> str:
    return click.style(status, fg={"installed": "green", "partial": "yellow"}.get(status.strip()))


def _models() -> list[dict[str, Any]]:
    """Installed models first; every one with the same keys, None where a value is not known."""
    from dapji.weights import catalogue, store

    entries = {entry.name: entry for entry in catalogue.entries()}
    records = {record.name: record for record in store.installed()}
    models = []
    for name in sorted({*entries, *records}, key=lambda n: (n not in records, n)):
        entry, record = entries.get(name), records.get(name)
        partial = 0 if record else store.partial_size(name)
        models.append(
            {
                "name": name,
                "status": "installed" if record else "partial" if partial else "available",
                "size": record.size if record else entry.size if entry else None,
                "downloaded": record.size if record else partial,
                "licence": record.licence if record else entry.licence if entry else None,
                "description": entry.description if entry else None,
                "aliases": list(entry.aliases) if entry else [],
                "family": entry.family if entry else None,
                "parameters": entry.parameters if entry else None,
                "quantisation": entry.quantisation if entry else None,
                "source": record.source if record else None,
                "path": str(store.model_path(record)) if record else None,
            }
        )
    return models
