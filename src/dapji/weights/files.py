"""Files of tensors: mapped for reading, replaced atomically when written. What GGUF and safetensors share.

Knows no file format; `gguf` and `safetensors` parse their headers into `StoredTensor`s.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import get_ident
from typing import BinaryIO

import numpy as np

from dapji.errors import FormatError, ModelNotFound, UsageError
from dapji.ops.formats import F8_E4M3, FORMATS, Bytes, Format
from dapji.ops.tensor import Tensor

MAX_TENSORS = 1 << 18
"""A file that claims more is refused: the largest open models have some 100,000."""


class MappedFile(mmap.mmap):
    """A map that knows what it is a map of."""

    path: Path
    stamp: tuple[int, ...]
    """`stamp_of` the file, taken before its first byte was read."""


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Differs for any two files at one path, and for one file before and after it was written to: the time of its last
    change (st_ctime) is the system's own, which no program can set back."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def map_file(path: Path) -> memoryview:
    """The file's bytes, mapped, read-only: a view of a `MappedFile`. Raises ModelNotFound or FormatError."""
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file")
    if not path.is_file():
        raise FormatError(f"{path}: not a file")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise FormatError(f"{path}: the file is empty")
            mapped = MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.path, mapped.stamp = path, stamp_of(status)
            return memoryview(mapped)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as a file's header describes it: inside the file's bounds, but perhaps of a type that we do not read."""

    file: str
    name: str
    type: str
    """A name in FORMATS, or another one that the file's format defines."""
    shape: tuple[int, ...]
    """numpy order: the last dimension is contiguous."""
    start: int
    """Offset in the file."""
    data: memoryview
    """Its bytes, mapped."""

    def tensor(self) -> Tensor:
        """The weight, not copied. Raises FormatError where its type is none of FORMATS."""
        format = F8_E4M3 if self.type == F8_E4M3.name else FORMATS.get(self.type)
        if format is None:
            raise FormatError(
                f"{self.file}: tensor {self.name!r} has type {self.type}, which is not supported",
                hint=f"supported: {', '.join(FORMATS)}",
            )
        shape = self.shape or (1,)
        data = np.frombuffer(self.data, dtype=np.uint8).reshape(-1, format.row_bytes(shape[-1]))
        return Tensor(name=self.name, format=format, shape=shape, source=data, release=self._release)

    def _release(self) -> None:
        """The whole pages of a map; of its two ends others may lie in the same page."""
        first, end = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE, self.start + len(self.data)
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size > 0 and isinstance(self.data.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.data.obj.madvise(mmap.MADV_DONTNEED, first, size)


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name; each is made when it is asked for, so that one unsupported type does not hide the others."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def check_no_overlap(stored: Iterable[StoredTensor]) -> None:
    """Raise FormatError where two tensors of one file share bytes."""
    for a, b in pairwise(sorted(stored, key=lambda tensor: (tensor.start, len(tensor.data)))):
        if a.start + len(a.data) > b.start and len(b.data):
            raise FormatError(
                f"{a.file}: tensor {a.name!r} (bytes {a.start} to {a.start + len(a.data)}) overlaps tensor {b.name!r} "
                f"(from byte {b.start})"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorToWrite:
    """A tensor that a writer asks for when its turn comes, so that a model larger than memory can be written."""

    name: str
    format: Format
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Bytes]]
    """Its rows in order, as uint8 arrays of any number of rows."""

    @property
    def nbytes(self) -> int:
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * self.format.row_bytes(self.shape[-1])

    @staticmethod
    def of(name: str, tensor: Tensor) -> TensorToWrite:
        return TensorToWrite(
            name=name,
            format=tensor.format,
            shape=tensor.shape,
            chunks=lambda: (piece.data for piece in tensor.pieces()),
        )

    def write(self, file: BinaryIO) -> None:
        """Append the bytes; checks that they are as many as the header promised."""
        written = 0
        for chunk in self.chunks():
            written += file.write(np.ascontiguousarray(chunk).data)
        assert written == self.nbytes, f"{self.name}: {written} bytes, the header says {self.nbytes}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it appears at `path` when the block ends without an exception, whole and synced to disk.

    Raises UsageError where the disk refuses: no such folder, no permission, no space.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        raise


def whole_lines(path: Path) -> bytes:
    """Of a file that lines are added to, without a last one that was cut off. Nothing where there is no file."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def keep_whole_lines(path: Path) -> bytes:
    """`whole_lines`, which are all that the file has afterwards. Raises UsageError as `replacing`."""
    lines = whole_lines(path)
    with replacing(path) as file:
        file.write(lines)
    return lines


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target` when the block ends without an exception.

    Raises UsageError where `target` is there and not an empty folder, or the disk refuses.
    """
    check_new_folder(target)
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    except OSError as error:
        raise UsageError(f"cannot write into {target.parent}: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_new_folder(target: Path) -> None:
    """Raises UsageError where it is there and not an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} exists already", hint="give the name of a new folder; none is ever replaced")
