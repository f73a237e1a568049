"""`Lineage`: what a model was made of. A part of its record (`record`).

Whatever derives a model writes one: `parent` describes each model that it began from, `data_file` each file that it
learned from, and `write_lineage` keeps all that beside the result. A parent's own lineage is a part of it, so that the
whole chain is known where no other file is at hand.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from dapji.proof.record import read_part, write_parts
from dapji.weights import store
from dapji.weights.adapter_file import CONFIG_NAME, TENSORS_NAME, is_adapter
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.sources_base import RECORD, Progress, gguf_shards, model_files, sha256_file
from dapji.weights.summary import folder_licence, licence_of

Kind: TypeAlias = Literal["new", "tune", "merge", "quantize", "convert", "distill"]
"""How it was made; `distill`: a file of examples, by a teacher."""
Role: TypeAlias = Literal["base", "adapter", "teacher", "tokenizer", "source"]
"""What a parent was to it; `tokenizer`: only its vocabulary was taken; `source`: the same model in other formats."""
FileName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[^/\\.][^/\\]*(/[^/\\.][^/\\]*)?$")]
"""Of a file in a model's folder, or in a folder there; it leads nowhere else."""
Use: TypeAlias = Literal["train", "evaluate", "reward", "prompts"]


class DataFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    use: Use
    file: str
    """As it was given."""
    sha256: str
    licence: str | None = None
    """None: nobody said."""
    lineage: Lineage | None = None
    """Of examples that a model wrote."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.use} {self.file}"


class Parent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Role
    model: str
    """Its name or path, as it was given."""
    files: dict[FileName, str]
    """Name in its folder -> sha256; all that make the model."""
    licence: str | None = None
    """None: its files do not say."""
    lineage: Lineage | None = None

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.role} {self.model}"


class Lineage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: Kind
    parents: tuple[Parent, ...] = ()
    data: tuple[DataFile, ...] = ()
    settings: dict[str, Any] = {}
    """A recipe, the seed included, or what the command was told."""
    outcome: dict[str, Any] = {}
    """What can be told of how it went: steps, tokens, seconds."""
    versions: dict[str, str] = {}


def read_lineage(path: Path) -> Lineage | None:
    """Of a model's file or folder, or of a file of examples. Raises FormatError."""
    return read_part(path, "lineage", Lineage)


def write_lineage(path: Path, lineage: Lineage) -> None:
    """Beside what it tells of, which must be there and is new: a certificate that lies there is of something else, and
    goes. Raises FormatError, UsageError."""
    write_parts(path, lineage=lineage, certificate=None)


def parent(role: Role, model: str, progress: Progress | None = None) -> Parent:
    """Of a model that something is derived from: a name of the store, a GGUF file, a folder, or an adapter.

    Reads all of its files. Raises ModelNotFound, FormatError.
    """
    path = store.resolve(model)
    return Parent(
        role=role,
        model=model,
        files=file_hashes(path, progress),
        licence=model_licence(path),
        lineage=read_lineage(path),
    )


def data_file(use: Use, file: str, sha256: str, licence: str | None = None) -> DataFile:
    """Of a file of examples. Raises FormatError where its own record is damaged."""
    return DataFile(use=use, file=file, sha256=sha256, licence=licence, lineage=read_lineage(Path(file)))


def versions(*packages: str) -> dict[str, str]:
    """Of Dapji, of other packages that were used, and of Python."""
    from importlib import metadata  # takes its time, which reading a lineage can do without

    return {name: metadata.version(name) for name in ("dapji", *packages)} | {"python": platform.python_version()}


def model_paths(path: Path) -> Mapping[str, Path]:
    """The files that make a model or an adapter, by their names in its folder; without its record.

    Raises UsageError or DownloadError where there is none.
    """
    if path.is_file():
        return {name: path.parent / name for name in gguf_shards(path.name)}
    found = [*path.iterdir(), *path.glob("*/config.json")]
    names = [each.relative_to(path).as_posix() for each in found if each.is_file()]
    if is_adapter(path):
        return {name: path / name for name in (CONFIG_NAME, TENSORS_NAME) if name in names}
    return {name: path / name for name in model_files(names, str(path)) if not name.endswith(RECORD)}


def file_hashes(path: Path, progress: Progress | None = None) -> dict[str, str]:
    """sha256 of each of `model_paths`. Raises as that."""
    return {name: sha256_file(each, progress) for name, each in model_paths(path).items()}


def model_licence(path: Path) -> str | None:
    """What the store, a GGUF file's header or a folder's README.md says. Raises FormatError."""
    if (record := store.record_of(path)) is not None and record.licence:
        return record.licence
    return folder_licence(path) if path.is_dir() else licence_of(open_checkpoint(path))


def ancestors(lineage: Lineage) -> Iterator[Parent | DataFile]:
    """All that a model was made of, directly or not."""
    made_of: tuple[Parent | DataFile, ...] = (*lineage.parents, *lineage.data)
    for each in made_of:
        yield each
        if each.lineage is not None:
            yield from ancestors(each.lineage)
