"""`PanelCache`: a model's packed matrices in a file that the next start maps instead of packing again (docs/panels.md).

One file for each model that was opened, in `folder()`. It names the files that it was packed from by what changes when
they change (`files.stamp_of`); whatever does not fit is packed anew and replaces it. A cache is never needed: where it
cannot be read or written, the model runs without. Knows what panels are as little as what tensors mean.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import perf_counter, time

import msgspec
import numpy as np
from numpy.typing import NDArray

from dapji.errors import FormatError, ModelNotFound, UsageError
from dapji.ops import native
from dapji.ops.tensor import Tensor
from dapji.weights import store
from dapji.weights.checkpoint import Checkpoint
from dapji.weights.files import MappedFile, map_file, replacing, stamp_of
from dapji.weights.sources_base import human_size

Bytes = NDArray[np.uint8]

_MAGIC = b"DAPJI panels"
_HEAD = struct.Struct("<12sIII")
"""Magic, version of the panels, size of the header and its CRC-32; the header follows."""
_CHUNK = 2 << 20
"""The matrices begin at a multiple of it and are written so many bytes at once: the system then keeps the file in huge
pages and maps it as such, so that it is read as fast as memory of our own."""
_SAMPLED = 1 << 20
"""64 in so many bytes are checked at every start, which finds large parts that never reached the disk."""
_PATIENCE = 1.0
"""Seconds before writing begins, since the first token should come first, and before closing says why it waits."""
_STALE_SECONDS = 3600.0
"""A file that is being written is no older; one that is was left behind."""


class _GivenUp(Exception):
    """Nobody waits for the file any more."""


class _Matrix(msgspec.Struct, frozen=True, array_like=True):
    name: str
    format: str
    rows: int
    cols: int
    order: int
    """CRC-32 of the order of its rows; 0: the file's."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    """The path that was opened."""
    sources: list[tuple[str, list[int]]]
    """Path and stamp of each file that the matrices come from."""
    matrices: list[_Matrix]
    """Of what follows, which begins at the next multiple of _CHUNK."""
    n_bytes: int
    samples: int
    """`_samples` of it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of the cache."""

    path: Path
    model: str
    """A name of the store or, of another model, its path."""
    size: int
    last_use: float
    """Seconds since the epoch."""
    current: bool
    """Whether it fits the model as that is now: else it will not be used again."""


def folder() -> Path | None:
    """Where the files lie: $DAPJI_CACHE, else `panels` in the store; None where DAPJI_CACHE=off."""
    chosen = os.environ.get("DAPJI_CACHE")
    if chosen == "off":
        return None
    return Path(chosen).expanduser().absolute() if chosen else store.home() / "panels"


class PanelCache:
    """The file of one model; what `ops.native.build` takes as its cache."""

    def __init__(self, path: Path, model: Path, sources: Sequence[MappedFile], version: int) -> None:
        self._path = path
        self._model = model
        self._sources = [(str(source.path.absolute()), list(source.stamp)) for source in sources]
        self._version = version
        self._closing = Event()
        self._idle = Event()  # and not Thread.join: interrupted, that takes the thread for ended (Python 3.11)
        self._idle.set()
        self._given_up = False

    @staticmethod
    def of(checkpoint: Checkpoint, version: int) -> PanelCache | None:
        """version: of the panels' layout. None where DAPJI_CACHE=off."""
        where = folder()
        maps = {id(tensor.data.obj): tensor.data.obj for tensor in checkpoint.tensors.stored.values()}
        sources = [source for source in maps.values() if isinstance(source, MappedFile)]
        if where is None or len(sources) != len(maps):
            return None
        model = checkpoint.path.absolute()
        return PanelCache(where / _file_name(model), model, sources, version)

    def read(self, matrices: Sequence[Tensor], n_bytes: int) -> Bytes | None:
        """What was kept of just these matrices; None where that is not there. Removes a broken file.

        Mapped where the system keeps the file in huge pages, else copied into such.
        """
        try:
            view = map_file(self._path)
            version, header, start = _read_header(self._path, view)
            if (version, header.sources, header.matrices) != (self._version, self._sources, _described(matrices)):
                return None
            mapped = view.obj
            assert isinstance(mapped, MappedFile)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages
                    mapped.madvise(mmap.MADV_HUGEPAGE)
            packed = np.frombuffer(mapped, dtype=np.uint8, offset=start)
            if len(packed) != n_bytes or _samples(packed) != header.samples:
                raise FormatError(f"{self._path}: the matrices are damaged")
        except ModelNotFound:
            return None
        except FormatError:
            with suppress(OSError):
                self._path.unlink()
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(self._path)  # its last use
        return packed if _in_huge_pages(packed) else _copied(mapped, start)

    def keep(self, matrices: Sequence[Tensor], packed: Bytes) -> None:
        """Write these bytes, which stay as they are, on a thread of its own, with pauses: answers do not wait for it.

        Unless a source has changed since it was opened, so that nobody knows of which version they are.
        """
        if all(_is_current(path, stamp) for path, stamp in self._sources):
            self._idle.clear()
            Thread(target=self._write, args=(_described(matrices), packed), name="dapji-panel-cache").start()

    def close(self) -> None:
        """Waits until what is being kept has been written, now without pauses; KeyboardInterrupt gives it up."""
        self._closing.set()
        try:
            if not self._idle.wait(_PATIENCE):
                _warn("writing packed weights for the next start; Ctrl-C leaves it")
                self._idle.wait()
        except KeyboardInterrupt:
            self._given_up = True
            self._idle.wait()
            raise

    def _write(self, matrices: list[_Matrix], packed: Bytes) -> None:
        try:
            self._write_file(matrices, packed)
        except _GivenUp:
            pass
        except (OSError, UsageError) as error:
            _warn(
                f"packed weights are not kept for the next start: {error} (DAPJI_CACHE names another folder, or is off)"
            )
        finally:
            self._idle.set()

    def _write_file(self, matrices: list[_Matrix], packed: Bytes) -> None:
        header = _Header(
            model=str(self._model),
            sources=self._sources,
            matrices=matrices,
            n_bytes=packed.nbytes,
            samples=_samples(packed),
        )
        encoded = msgspec.json.encode(header)
        head = _HEAD.pack(_MAGIC, self._version, len(encoded), zlib.crc32(encoded)) + encoded
        where = self._path.parent
        where.mkdir(parents=True, exist_ok=True)
        sweep()
        if shutil.disk_usage(where).free < 2 * packed.nbytes:
            raise UsageError(f"{where} has too little room for {human_size(packed.nbytes)} more")
        with replacing(self._path) as file:
            file.write(head)
            file.seek(_aligned(len(head)))
            pause = _PATIENCE
            for at in range(0, packed.nbytes, _CHUNK):
                self._closing.wait(pause)
                if self._given_up:
                    raise _GivenUp
                begin = perf_counter()
                file.write(packed[at : at + _CHUNK].data)
                pause = 3 * (perf_counter() - begin)


def entries() -> list[Entry]:
    """Every file of the cache that can be read, largest first."""
    where = folder()
    found = []
    for path in () if where is None else where.glob("*.panels"):
        with suppress(OSError, FormatError, ModelNotFound):
            _, header, _ = _read_header(path, map_file(path))
            status = path.stat()
            record = store.record_of(Path(header.model))
            found.append(
                Entry(
                    path=path,
                    model=header.model if record is None else record.name,
                    size=status.st_size,
                    last_use=status.st_mtime,
                    current=all(_is_current(path, stamp) for path, stamp in header.sources),
                )
            )
    return sorted(found, key=lambda entry: -entry.size)


def clear(model: Path | None = None) -> int:
    """Delete the file of a model, by the path that `store.resolve` gives, or all files; returns the bytes freed."""
    where = folder()
    if where is None:
        return 0
    pattern = "*.panels" if model is None else _file_name(model.absolute())
    return sum(map(_delete, [*where.glob(pattern), *where.glob(f".{pattern}.*.tmp")]))


def sweep() -> int:
    """Delete what no model will use again: of models that have gone or changed, and what a killed process left; returns
    the bytes freed."""
    freed = sum(_delete(entry.path) for entry in entries() if not entry.current)
    where = folder()
    for path in () if where is None else where.glob(".*.panels.*.tmp"):
        with suppress(FileNotFoundError):
            if time() - path.stat().st_mtime > _STALE_SECONDS:
                freed += _delete(path)
    return freed


def _warn(message: str) -> None:
    import logging  # takes 2 ms, and this is rare

    logging.getLogger("dapji").warning(message)


def _file_name(model: Path) -> str:
    """One for each path, so that a model that changes replaces its file."""
    return f"{model.name}-{hashlib.sha256(os.fsencode(model)).hexdigest()[:12]}.panels"


def _read_header(path: Path, mapped: memoryview) -> tuple[int, _Header, int]:
    """Version, header, and where the matrices begin; their bytes are there. Raises FormatError."""
    if len(mapped) < _HEAD.size:
        raise FormatError(f"{path}: {len(mapped)} bytes are too few")
    magic, version, size, checksum = _HEAD.unpack_from(mapped)
    encoded = mapped[_HEAD.size : _HEAD.size + size]
    if magic != _MAGIC or len(encoded) != size or zlib.crc32(encoded) != checksum:
        raise FormatError(f"{path}: the header is damaged")
    try:
        header = msgspec.json.decode(encoded, type=_Header)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{path}: not the header that is expected here: {error}") from error
    start = _aligned(_HEAD.size + size)
    if header.n_bytes < 1 or len(mapped) != start + header.n_bytes:
        raise FormatError(f"{path}: {len(mapped)} bytes, the header says {start + header.n_bytes}")
    return version, header, start


def _described(matrices: Iterable[Tensor]) -> list[_Matrix]:
    described = []
    for tensor in matrices:
        order = 0 if tensor.order is None else zlib.crc32(tensor.order.tobytes())
        described.append(_Matrix(tensor.name, tensor.format.name, tensor.rows, tensor.cols, order))
    return described


def _samples(packed: Bytes) -> int:
    """CRC-32 of some bytes in every _SAMPLED."""
    checksum = 0
    for at in range(0, len(packed), _SAMPLED):
        checksum = zlib.crc32(packed[at : at + 64].data, checksum)
    return checksum


def _in_huge_pages(packed: Bytes) -> bool:
    """Whether nine tenths of the map are; `_samples` has touched them all. False where the system does not tell."""
    address = packed.__array_interface__["data"][0]
    inside = False
    with suppress(OSError), Path("/proc/self/smaps").open("rb") as lines:
        for line in lines:
            key, value = line.split(maxsplit=1)
            if not key.endswith(b":"):
                start, end = (int(part, 16) for part in key.split(b"-"))
                inside = start <= address < end
            elif inside and key == b"FilePmdMapped:":
                return int(value.split()[0]) << 10 >= 0.9 * len(packed)
    return False


def _copied(mapped: mmap.mmap, start: int) -> Bytes:
    """The map from `start` on, in memory of our own; its pages are given back as they are copied."""
    packed = np.frombuffer(mapped, dtype=np.uint8, offset=start)
    memory: Bytes = native.module().allocate_panels(len(packed))
    n_threads = native.default_threads()

    def copy(first: int) -> None:
        for at in range(first * _CHUNK, len(packed), n_threads * _CHUNK):
            piece = packed[at : at + _CHUNK]
            np.copyto(memory[at : at + _CHUNK], piece)
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED, start + at, len(piece))

    threads = [Thread(target=copy, args=(first,)) for first in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return memory


def _aligned(size: int) -> int:
    return -(-size // _CHUNK) * _CHUNK


def _is_current(path: str, stamp: Sequence[int]) -> bool:
    try:
        return list(stamp_of(Path(path).stat())) == list(stamp)
    except OSError:
        return False


def _delete(path: Path) -> int:
    """Bytes freed; 0 where another process was first."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
