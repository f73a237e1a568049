"""`Database`: one SQLite file in which a server keeps what its clients may come back to."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TypeVar

from dapji.errors import UnavailableError

T = TypeVar("T")

_WAIT = 5.0
"""Seconds for another process that writes."""


class Database:
    """What `run` has done survives the process and the machine; what `forget` has deleted is overwritten with zeros
    (SQLite's secure_delete) and gone from the write-ahead log. Several processes may use the file."""

    def __init__(self, path: Path, *, layout: str, version: int, hint: str) -> None:
        """layout: statements that make what is missing. version: of the layout. hint: what to do where the file cannot
        be used. Makes nothing before it is used."""
        self.path = path
        self._layout = f"{layout}; PRAGMA user_version = {version};"
        self._version = version
        self._hint = hint
        self._connection: sqlite3.Connection | None = None
        self._lock = Lock()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` in a thread, as one transaction: all of it, or nothing where it raises. Raises UnavailableError."""

        def locked() -> T:
            with self._lock, self._explained(), self._transaction() as db:
                return work(db)

        return await asyncio.to_thread(locked)

    async def forget(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """As `run`, for what deletes."""
        result = await self.run(work)

        def locked() -> None:
            with self._lock, self._explained():
                (busy, *_) = self._opened().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise UnavailableError(
                    f"{self.path}: it is deleted, but another process reads the file, so the log still holds it",
                    hint="the next deletion empties the log",
                )

        await asyncio.to_thread(locked)
        return result

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._opened()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            # Without isolation level sqlite3 begins no transactions of its own.
            db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
            try:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version > self._version:
                    raise UnavailableError(
                        f"{self.path}: written by a newer version (layout {version}, here {self._version})"
                    )
                for pragma in (
                    "journal_mode = WAL",
                    "synchronous = FULL",
                    "secure_delete = ON",
                    "temp_store = MEMORY",  # no texts in files of their own
                    "foreign_keys = ON",
                ):
                    db.execute(f"PRAGMA {pragma}")
                db.executescript(self._layout)
            except BaseException:
                db.close()
                raise
            self._connection = db
        return self._connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(f"{self.path}: {error}", hint=self._hint) from error
