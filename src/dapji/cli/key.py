"""`dapji key`: who may ask a server."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.group()
def command() -> None:
    """Make, list and revoke the keys of `dapji serve`.

    As soon as there is one, every server of this store asks for a key, and sees changes at once.
    Only salted hashes are stored, in $DAPJI_HOME/server/keys.db, which its owner alone may read.

    \b
    Examples:
      dapji key add laptop
      dapji key add guests --quota 100000
      dapji key list
      dapji key revoke laptop

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """


@command.command()
@click.argument("name")
@click.option("--quota", type=click.IntRange(1), metavar="TOKENS", help="A day (UTC), of prompts and answers.")
def add(name: str, quota: int | None) -> None:
    """Make a key and print it: it is shown this once.

    \b
    Examples:
      dapji key add laptop
      dapji key add guests --quota 100000
      OPENAI_API_KEY=$(dapji key add script)
    """
    from dapji.server import keys

    click.echo(keys.Keys(keys.path()).add(name, quota))
    click.echo("keep it: it cannot be shown again", err=True)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def list_(as_json: bool) -> None:
    """Names, quotas and what has been used today (UTC) of them; never the keys.

    \b
    Examples:
      dapji key list
      dapji key list --json | jq '.[].name'
    """
    from dapji.server import keys

    known = keys.Keys(keys.path()).all()
    if as_json:
        click.echo(json.dumps([asdict(key) for key in known], indent=2))
        return
    click.echo(f"{'NAME':24}{'QUOTA':>12}{'TODAY':>12}  STATUS")
    for key in known:
        quota = "none" if key.quota is None else str(key.quota)
        status = f"made {key.created}" if key.revoked is None else f"revoked {key.revoked}"
        click.echo(f"{key.name:24}{quota:>12}{key.used:>12}  {status}")
    if known and all(key.revoked for key in known):
        click.echo(f"no key opens, so servers refuse everybody; without {keys.path()} they ask for none", err=True)


@command.command()
@click.argument("name")
def revoke(name: str) -> None:
    """End a key; servers refuse it from now on. The name may be given to another.

    \b
    Example:
      dapji key revoke laptop
    """
    from dapji.server import keys

    keys.Keys(keys.path()).revoke(name)
