"""`file:PATH`: a GGUF file (with its other shards) or a folder in the Hugging Face layout on this machine.

The store gets hard links, so that nothing is stored twice, or copies where the file lies on another file system.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from dapji.errors import DownloadError
from dapji.weights.sources_base import (
    DeliveredFile,
    Delivery,
    Progress,
    Want,
    checked_file_name,
    copy_stream,
    gguf_shards,
    model_files,
    record_name,
    require_space,
)


@dataclass(frozen=True, kw_only=True)
class FileSource:
    path: Path
    """Absolute, links followed: a link in the store must not die with one elsewhere."""

    @property
    def spec(self) -> str:
        return f"file:{self.path}"

    @property
    def name(self) -> str:
        return self.path.stem if self.path.suffix == ".gguf" else self.path.name

    def fetch(self, folder: Path, want: Want, progress: Progress) -> Delivery:
        if self.path.is_dir():
            base, names = self.path, model_files(_files_below(self.path), self.spec)
        elif self.path.suffix == ".gguf":
            base, names = self.path.parent, gguf_shards(self.path.name)
            if want.file is None and (base / record_name(self.path.name)).is_file():
                names = [*names, record_name(self.path.name)]
        elif self.path.exists():
            base, names = self.path.parent, model_files([self.path.name], self.spec)
        else:
            raise DownloadError(f"no such file or folder: {self.path}")
        missing = [n for n in names if not (base / n).is_file()]
        if missing:
            raise DownloadError(f"{base} lacks {', '.join(missing)}")
        return Delivery(
            files=tuple(
                _take(base / n, folder, checked_file_name(want.file if want.file and len(names) == 1 else n), progress)
                for n in names
            )
        )


def _files_below(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _take(path: Path, folder: Path, name: str, progress: Progress) -> DeliveredFile:
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(path, target, follow_symlinks=True)
        return DeliveredFile(name=name, path=target)
    except OSError:
        # Another file system, or one without hard links: copy. If the disk is at fault, copying says so.
        require_space(folder, path.stat().st_size)
    digest = hashlib.sha256()
    with (
        path.open("rb") as source,
        target.open("wb") as copy,
        progress.bar(f"copying {name}", path.stat().st_size) as advance,
    ):
        copy_stream(source, (copy.write, digest.update, lambda chunk: advance(len(chunk))))
    return DeliveredFile(name=name, path=target, sha256=digest.hexdigest())
