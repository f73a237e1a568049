"""`dapji doctor`: what this installation and this machine offer, and what is wrong with them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from dapji import __version__
from dapji.errors import DapjiError

COMPILERS = ("c++", "g++", "clang++", "cl")
OPTIONAL = {"huggingface_hub": "hf: sources", "torch": "--executor torch"}
"""Package -> what it is for; each is an extra of its own."""
ROOM = 300 << 20
"""Bytes that a small model needs beside its weights: a cache of 8192 tokens, buffers, the interpreter."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    serious: bool
    """Something will fail; else it only could be better."""
    what: str
    remedy: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object, sizes in bytes.")
def command(as_json: bool) -> None:
    """Tell which kernels were chosen and why, what this machine has, where models live, and what is
    wrong, with remedies. Downloads nothing, measures nothing, writes nothing.

    \b
    Examples:
      dapji doctor
      dapji doctor --json | jq .problems

    Exit codes: 0 all is well or could only be better, 1 something will fail, 2 wrong usage.
    """
    report = _report()
    problems = list(_problems(report))
    if as_json:
        click.echo(json.dumps(report | {"problems": [asdict(p) for p in problems]}, indent=2, ensure_ascii=False))
    else:
        _print(report, problems)
    if any(problem.serious for problem in problems):
        raise click.exceptions.Exit(1)


def _report() -> dict[str, Any]:
    from dapji.evaluation.machine import describe_machine

    return {
        "version": __version__,
        "python": {"version": sys.version.split()[0], "path": sys.executable},
        "machine": asdict(describe_machine()),
        "native": _native(),
        "compiler": next(filter(None, map(shutil.which, COMPILERS)), None),
        "optional": {name: _installed_version(name) for name in OPTIONAL},
        "store": _store(),
    }


def _native() -> dict[str, Any]:
    from dapji.ops import native

    found: dict[str, Any] = {
        "available": native.available(),
        "reason": native.unavailable_reason(),
        "built": importlib.util.find_spec("dapji.ops._native") is not None,
        "isa": None,
        "isas": [],
        "threads": None,
        "forced": os.environ.get("DAPJI_ISA"),
    }
    if found["available"]:
        try:
            found |= {"isas": native.isas(), "threads": native.default_threads(), "isa": native.isa()}
        except (DapjiError, ValueError) as error:  # DAPJI_ISA names what this machine lacks
            found["reason"] = str(error)
    return found


def _store() -> dict[str, Any]:
    from dapji.weights import catalogue, panel_cache, store

    home = store.home()
    existing = next(path for path in (home, *home.parents) if path.exists())
    cache = panel_cache.folder()
    installed: list[str] = []
    broken: list[str] = []
    try:
        installed = [record.name for record in store.installed()]
    except (DapjiError, OSError) as error:
        broken.append(str(error))
    return {
        "path": str(home),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free": shutil.disk_usage(existing).free,
        "installed": installed,
        "broken": broken,
        "cache": None if cache is None else str(cache),
        "cached": sum(entry.size for entry in panel_cache.entries()),
        "catalogue": {entry.name: entry.size for entry in catalogue.entries()},
    }


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problems(report: dict[str, Any]) -> Iterator[Problem]:
    native, store, available = report["native"], report["store"], report["machine"]["memory_available"]
    if native["isa"] is None and native["built"]:
        yield Problem(
            serious=True,
            what=f"the native kernels do not load: {native['reason']}",
            remedy="unset DAPJI_ISA" if native["forced"] else "install dapji again, for this Python and this system",
        )
    elif native["isa"] is None:
        compiler = "" if report["compiler"] else f"install a C++17 compiler ({_compiler_hint()}), then "
        yield Problem(
            serious=False,
            what=f"no native kernels, so that everything runs on the slow reference: {native['reason']}",
            remedy=f"{compiler}install dapji again without DAPJI_NATIVE=OFF",
        )
    elif native["isa"] == "generic":
        yield Problem(
            serious=False,
            what="this processor has neither AVX2 nor AVX-512 VNNI, so that only the slow portable kernels run",
            remedy="another machine",
        )
    for message in store["broken"]:
        yield Problem(serious=True, what=f"the store cannot be read: {message}", remedy="as it says")
    if not store["writable"]:
        yield Problem(
            serious=True,
            what=f"{store['path']} cannot be written",
            remedy="set DAPJI_HOME to a folder that you may write to",
        )
    for name, size in store["catalogue"].items():
        if name not in store["installed"] and size > store["free"]:
            yield Problem(
                serious=False,
                what=f"no room on the disk for {name}: {_size(size)} are needed, {_size(store['free'])} free",
                remedy="free some space, or set DAPJI_HOME to a folder on another disk",
            )
    if available is not None and available < min(store["catalogue"].values()) + ROOM:
        yield Problem(
            serious=True,
            what=f"{_size(available)} of memory are available, too little for any model of the catalogue",
            remedy="close other programs, or take a smaller --context",
        )
    if report["machine"]["huge_pages"] == "never":
        yield Problem(
            serious=False,
            what="transparent huge pages are off, which costs some speed",
            remedy="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _compiler_hint() -> str:
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "win32":
        return "Visual Studio Build Tools, the C++ workload"
    return "sudo dnf install gcc-c++" if Path("/etc/fedora-release").exists() else "sudo apt install g++"


def _size(n_bytes: int | None) -> str:
    from dapji.weights.sources_base import human_size

    return "an unknown amount" if n_bytes is None else human_size(n_bytes)


def _print(report: dict[str, Any], problems: list[Problem]) -> None:
    machine, native, store = report["machine"], report["native"], report["store"]
    installed = ", ".join(store["installed"]) or "none"
    threads = "" if native["threads"] is None else f", {native['threads']} threads by default"
    features = "unknown" if machine["features"] is None else " ".join(machine["features"]) or "none that matter"
    fitting = [
        f"{name} {'fits' if size + ROOM <= machine['memory_available'] else 'does not fit'}"
        for name, size in store["catalogue"].items()
        if machine["memory_available"] is not None
    ]
    if native["isa"] is None:
        kernels = "none; the numpy reference computes"
    else:
        why = f"DAPJI_ISA={native['forced']}" if native["forced"] else "the best that this processor runs"
        kernels = f"{native['isa']}: {why} (it runs {', '.join(native['isas'])})"
    for key, value in (
        ("dapji", f"{report['version']}, Python {report['python']['version']} ({report['python']['path']})"),
        ("system", machine["system"]),
        ("processor", machine["processor"] or "unknown"),
        ("instructions", features),
        ("kernels", kernels),
        ("processors", f"{machine['processors']} logical processors for this process{threads}"),
        ("memory", f"{_size(machine['memory_available'])} available of {_size(machine['memory'])}"),
        ("models", "; ".join(fitting) or "unknown"),
        ("huge pages", machine["huge_pages"] or "unknown"),
        ("compiler", report["compiler"] or "none found"),
        *((name, report["optional"][name] or f"not installed (for {use})") for name, use in OPTIONAL.items()),
        ("store", f"{store['path']}, {_size(store['free'])} free"),
        ("installed", installed),
        ("cache", "off" if store["cache"] is None else f"{store['cache']}, {_size(store['cached'])}"),
    ):
        click.echo(f"{key:<16} {value}")
    click.echo()
    for problem in problems:
        label, colour = ("problem: ", "red") if problem.serious else ("note: ", "yellow")
        click.echo(click.style(label, fg=colour, bold=True) + problem.what)
        click.echo(click.style("remedy: ", fg="cyan", bold=True) + problem.remedy)
    if not problems:
        click.echo(click.style("No problems found.", fg="green"))
