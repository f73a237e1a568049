"""`dapji verify`: whether a model is, and does, what its certificate says; or write one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dapji.cli.console import visible
from dapji.cli.options import EXECUTORS

if TYPE_CHECKING:
    from dapji.models.executor import ExecutorKind
    from dapji.proof.verification import Check


@click.command()
@click.argument("model")
@click.option(
    "--executor",
    type=EXECUTORS,
    help="What replays the numbers [default: native where it was built, else reference].",
)
@click.option("--base", metavar="MODEL", help="What an adapter is for, if it lies elsewhere than its lineage says.")
@click.option("--certify", is_flag=True, help="Write a certificate of the model as it is, where it has none.")
@click.option("--force", is_flag=True, help="With --certify: replace the certificate that it has.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(
    model: str, executor: ExecutorKind | None, base: str | None, certify: bool, force: bool, as_json: bool
) -> None:
    """Check that MODEL is what its certificate and its lineage say, and does what they say.

    MODEL is a name of `dapji list`, a GGUF file, a folder, or an adapter. What `dapji tune` makes
    has a certificate in its dapji.json; --certify writes one of any other model, which takes
    seconds for a small one.

    Checked are the sha256 of every file, of the base of an adapter, and of what the lineage names
    as far as it is here; then, replayed: tokens of texts, rendered conversations, stop tokens and
    sampling, and on an executor the likeliest tokens of some passages, within the tolerance that
    was measured for it. ✓ passed, ✗ failed, - not here to be checked.

    \b
    Examples:
      dapji verify ./my-model
      dapji verify ./my-adapter --executor reference
      dapji verify smollm2-135m --certify

    Exit codes: 0 all passed (or written), 1 one failed or there is no certificate, 2 wrong usage,
    130 interrupted.
    """
    from dapji.errors import CertificateError, UsageError
    from dapji.proof.verification import verify
    from dapji.weights import store

    path = store.resolve(model)
    if certify:
        if executor is not None:
            raise UsageError("--executor is of a replay; a certificate is measured on every executor")
        _certify(path, base, force=force, as_json=as_json)
        return
    if force:
        raise UsageError("--force goes with --certify")
    from dapji.cli.pull import TerminalProgress

    checks: list[Check] = []
    for check in verify(path, executor=executor, base=base, progress=TerminalProgress()):
        checks.append(check)
        if not as_json:
            _show(check)
    counts = Counter(check.passed for check in checks)
    if as_json:
        about = {"passed": counts[True], "failed": counts[False], "not_checked": counts[None]}
        click.echo(json.dumps({"model": str(path), **about, "checks": list(map(asdict, checks))}, indent=2))
    else:
        click.echo(f"{counts[True]} passed, {counts[False]} failed, {counts[None]} not checked", err=True)
    if failed := [f"{check.part}: {check.name}" for check in checks if check.passed is False]:
        raise CertificateError(
            visible(f"{path} is not what its certificate says: {'; '.join(failed)}"),
            hint="take the files from where they came from; or, if the change is meant, --certify --force",
        )


def _show(check: Check) -> None:
    colour, sign = {True: ("green", "✓"), False: ("red", "✗"), None: ("yellow", "-")}[check.passed]
    detail = f": {check.detail}" if check.detail else ""
    click.echo(f"{click.style(sign, fg=colour, bold=True)} {visible(f'{check.part}: {check.name}{detail}')}")


def _certify(path: Path, base: str | None, *, force: bool, as_json: bool) -> None:
    import msgspec

    from dapji.cli.pull import TerminalProgress
    from dapji.errors import UsageError
    from dapji.proof.certificate import certify, read_certificate
    from dapji.proof.record import record_path, write_parts

    if not force and read_certificate(path) is not None:
        raise UsageError(f"{path} has a certificate already", hint="--force replaces it by one of the model as it is")
    certificate = certify(path, base=base, progress=TerminalProgress())
    write_parts(path, certificate=certificate)
    if as_json:
        tolerances = msgspec.to_builtins(certificate.tolerances)
        click.echo(json.dumps({"record": str(record_path(path)), "tolerances": tolerances}, indent=2))
    else:
        click.echo(record_path(path))
