"""`dapji.json`: what Dapji wrote down about a file or a folder, in parts, each of which has its digest beside it.

Of a folder it lies inside; of any file, a GGUF model as well as a file of examples, beside it as `NAME.dapji.json`. A
part is a msgspec struct; `lineage` and `certificate` say what theirs hold. The store has a part of its own there. A
digest tells of a change that nobody meant: whoever means one can write another digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from dapji.errors import FormatError
from dapji.weights.files import replacing
from dapji.weights.sources_base import RECORD

_LARGEST = 64 << 20
"""Bytes; what is written has some ten thousand."""

_NUMBERS = re.compile(r"\[\n[-+0-9.eE,\s]+\]")
"""A list of numbers, a line for each: they are many. In a text no line ends as it is."""

Part = Literal["lineage", "certificate"]
T = TypeVar("T", bound=msgspec.Struct)


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    lineage: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    store: dict[str, Any] | None = None
    sha256: dict[Part, str] = {}
    """Of each part as `_digest` counts it."""


def record_path(path: Path) -> Path:
    """Where the record of a folder, or of a file (of a split GGUF the first), lies."""
    return path / RECORD if path.is_dir() else path.with_name(f"{path.name}.{RECORD}")


def has_part(path: Path, part: Part) -> bool:
    """Whether the record of a file or folder has it. Raises FormatError where the record is damaged."""
    return getattr(_read(record_path(path)), part) is not None


def read_part(path: Path, part: Part, kind: type[T]) -> T | None:
    """A part of the record of a file or folder; None where there is none.

    Raises FormatError where the record is damaged, or the part is not what it was when it was written.
    """
    file = record_path(path)
    record = _read(file)
    value = getattr(record, part)
    if value is None:
        return None
    try:
        if record.sha256.get(part) != (digest := _digest(value)):
            raise FormatError(
                f"{file}: its {part} was changed: the sha256 is {digest}, the file says {record.sha256.get(part)}",
                hint="take the file from where the model came from",
            )
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise FormatError(f"{file}: {part}: {error}", hint="another version of Dapji may have written it") from error


def write_parts(path: Path, **parts: msgspec.Struct | None) -> None:
    """Writes parts, by their names, into the record of a file or folder; what is None goes, others stay.

    Raises FormatError where there is another record that is damaged, UsageError where the disk refuses.
    """
    file = record_path(path)
    record = _read(file)
    built = {name: msgspec.to_builtins(part) for name, part in parts.items()}
    digests: dict[str, str] = {name: digest for name, digest in record.sha256.items() if name not in built}
    digests |= {name: _digest(part) for name, part in built.items() if part is not None}
    changed = msgspec.structs.replace(record, **built, sha256=digests)
    text = json.dumps(msgspec.to_builtins(changed), indent=2, ensure_ascii=False)
    with replacing(file) as out:
        out.write(_NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text).encode() + b"\n")


def _read(file: Path) -> _Record:
    try:
        with file.open("rb") as opened:
            data = opened.read(_LARGEST + 1)
    except FileNotFoundError:
        return _Record()
    if len(data) > _LARGEST:
        raise FormatError(f"{file} has more than {_LARGEST} bytes")
    try:
        return msgspec.convert(json.loads(data), _Record)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise FormatError(
            f"{file} cannot be read: {error}", hint="take the file from where the model came from"
        ) from error


def _digest(value: dict[str, Any]) -> str:
    """sha256 of a part written without white space, its keys in order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
