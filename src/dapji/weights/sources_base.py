"""The nouns of fetching: what is wanted, what a source delivers, how progress is told, which files make a model.

A source brings files into a folder that the store gives it. It knows neither names in the store nor how models
become visible there, and nothing of terminals: whoever calls passes a `Progress`.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from dapji.errors import DownloadError, UsageError

CHUNK = 1 << 20
"""Bytes read at a time: memory stays constant whatever the model's size."""


class Progress(Protocol):
    """How a long job talks to whoever started it."""

    def say(self, message: str) -> None:
        """One line about what happens now."""

    def bar(self, label: str, total: int | None, initial: int = 0) -> AbstractContextManager[Callable[[int], object]]:
        """A count of bytes up to `total` (None: unknown), `initial` of them done before; yields `advance(bytes)`."""


class Silent:
    """Says nothing: the default of the library."""

    def say(self, message: str) -> None:
        pass

    @contextmanager
    def bar(self, label: str, total: int | None, initial: int = 0) -> Iterator[Callable[[int], object]]:
        yield lambda n_bytes: None


@dataclass(frozen=True, kw_only=True)
class Want:
    """What is known beforehand of the one file that is fetched; None: not known."""

    file: str | None = None
    """The name it gets in the model's folder."""
    size: int | None = None
    """Bytes."""
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeliveredFile:
    """One file that lies in the source's folder now; the store may move it."""

    name: str
    """In the model's folder."""
    path: Path
    promised: str | None = None
    """sha256 that the source announced."""
    sha256: str | None = None
    """Its sha256, where it was computed while writing."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    files: tuple[DeliveredFile, ...]
    licence: str | None = None
    revision: str | None = None
    """The commit, where the source has such a thing."""


class Source(Protocol):
    @property
    def spec(self) -> str:
        """The text that `sources.parse` turns into this source."""

    @property
    def name(self) -> str:
        """Name of the model in the store, unless the user chooses another."""

    def fetch(self, folder: Path, want: Want, progress: Progress) -> Delivery:
        """Bring the files into `folder`, which this source alone uses and which may hold the rest of a try that was
        cut off. Raises DownloadError (IntegrityError where bytes are not what they should be), UnavailableError where
        this installation lacks something, UsageError where the request is ambiguous, OSError where the disk fails."""


FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No room on the disk, for this user, or in a file of this file system (FAT ends at 4 GB)."""
STORAGE_ERRNOS = FULL_ERRNOS | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
"""Our disk's fault: no other source would help."""


def require_space(folder: Path, n_bytes: int) -> None:
    """OSError(ENOSPC) before a download rather than in the middle of it."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"{human_size(n_bytes)} needed, {human_size(free)} free", str(folder))


def human_size(n_bytes: int) -> str:
    """Decimal units, as disks and download pages count: 491.4 MB."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def copy_stream(source: IO[bytes], targets: Iterable[Callable[[bytes], object]]) -> None:
    """Read to the end in constant memory, handing every chunk to each target."""
    while chunk := source.read(CHUNK):
        for target in targets:
            target(chunk)


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        (progress or Silent()).bar(f"verifying {path.name}", path.stat().st_size) as advance,
    ):
        copy_stream(file, (digest.update, lambda chunk: advance(len(chunk))))
    return digest.hexdigest()


def checked_file_name(name: str) -> str:
    """`name` if it is a plain file name on every platform, or a module's; else DownloadError."""
    if not _MODULE.fullmatch(name) and not re.fullmatch(r"[A-Za-z0-9_][^/\\:*?\"<>|\x00-\x1f]*", name):
        raise DownloadError(f"unsafe file name {name!r}")
    return name


RECORD = "dapji.json"
"""What a folder's file is called that says where the model came from (docs/proof.md)."""

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_LAYOUT = re.compile(
    r"(generation_)?config\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json"
    r"|(tokenizer|tiktoken)\.model|tekken\.json|vocab\.json|merges\.txt"
    r"|chat_template\.(jinja|json)"
    r"|(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*"
    r"|modules\.json|config_sentence_transformers\.json|sentence_bert_config\.json"
    rf"|{re.escape(RECORD)}"
)
"""What a folder in the Hugging Face layout holds beside its safetensors."""

_MODULE = re.compile(r"\d+_[A-Za-z]+/config\.json")
"""What sentence-transformers does with hidden states, a folder for each step."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of pickled weights, which are never opened."""


def gguf_shards(name: str) -> list[str]:
    """All files of the GGUF that `name` belongs to: itself, or every shard of a split model."""
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return [name]
    stem, _, count = shard.groups()
    return [f"{stem}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1)]


def record_name(gguf: str) -> str:
    """What it is called beside a GGUF file, of a split one the first."""
    return f"{gguf_shards(gguf)[0]}.{RECORD}"


def local_name(name: str) -> str:
    """Under which a model's file is stored. Raises DownloadError."""
    return checked_file_name(name if _MODULE.fullmatch(name) else PurePosixPath(name).name)


def model_files(names: Iterable[str], where: str, *, separator: str = "/") -> list[str]:
    """Which of a folder's files make the model: config, safetensors, tokenizer, template, licence; or its one GGUF.

    Names are relative to the folder; of those in subfolders only modules belong to the layout. `where` is for messages,
    `separator` what stands between it and the name of one file. Raises UsageError where several GGUF files offer a
    choice, DownloadError where there is nothing that we load.
    """
    names = sorted(names)
    root = [n for n in names if PurePosixPath(n).name == n]
    tensors = [n for n in root if n.startswith("model") and n.endswith((".safetensors", ".safetensors.index.json"))]
    if "config.json" in root and any(n.endswith(".safetensors") for n in tensors):
        return tensors + [n for n in names if _LAYOUT.fullmatch(n) or _MODULE.fullmatch(n)]
    ggufs = {gguf_shards(n)[0] for n in names if n.endswith(".gguf")}
    if len(ggufs) > 1:
        raise UsageError(
            f"{where} holds {len(ggufs)} GGUF files: {', '.join(sorted(ggufs))}",
            hint=f"name one: {where}{separator}FILE",
        )
    if ggufs:
        first = ggufs.pop()
        return gguf_shards(first) + [
            n
            for n in names
            if n == record_name(first) or (n in root and _LAYOUT.fullmatch(n) and n.startswith(("LICEN", "NOTICE")))
        ]
    if any(n.endswith(PICKLES) for n in names):
        raise DownloadError(
            f"{where} holds its weights as pickle files only, which can run code when they are opened",
            hint="look for a safetensors or GGUF version of the model",
        )
    raise DownloadError(f"{where} holds neither config.json with model*.safetensors nor a GGUF file")
