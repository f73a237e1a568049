"""The catalogue: models by name, each with what it is, one pinned sha256 and several sources (`catalogue.toml`)."""

from __future__ import annotations

from functools import cache
from importlib import resources

import msgspec

from dapji.weights.sources_base import Want


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model, which is one file."""

    name: str
    aliases: tuple[str, ...]
    description: str
    family: str
    parameters: int
    quantisation: str
    licence: str
    """SPDX identifier."""
    file: str
    """What the file is called, whichever source it comes from."""
    size: int
    """Bytes."""
    sha256: str
    sources: tuple[str, ...]
    """In the order in which they are tried."""

    @property
    def want(self) -> Want:
        return Want(file=self.file, size=self.size, sha256=self.sha256)


class _Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: tuple[Entry, ...]


@cache
def entries() -> tuple[Entry, ...]:
    import tomllib  # takes 2 ms; opening an installed model does not need it

    text = resources.files("dapji.weights").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), _Catalogue).model


def find(name: str) -> Entry | None:
    """The entry of that name or alias, whatever its case."""
    wanted = name.lower()
    return next((entry for entry in entries() if wanted in (entry.name, *entry.aliases)), None)
