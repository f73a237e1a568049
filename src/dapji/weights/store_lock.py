"""A lock between processes: held as long as the file is open, so that it ends with its process, however that ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
    import time

    def _acquire(fd: int, *, wait: bool) -> bool:
        while True:
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.2)
else:
    import fcntl

    def _acquire(fd: int, *, wait: bool) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def try_lock(path: Path) -> int | None:
    """The lock file `path`, held until the file descriptor is closed; None: another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if _acquire(fd, wait=False):
        return fd
    os.close(fd)
    return None


@contextmanager
def locked(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold the lock file `path`; `on_wait` is called once if another process has it. The file stays, as deleting it
    would let two processes lock two different files of one name."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _acquire(fd, wait=False):
            on_wait()
            _acquire(fd, wait=True)
        yield
    finally:
        os.close(fd)
