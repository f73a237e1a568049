"""`ResponseStore`: answers of /v1/responses that clients may come back to, in one SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TypeVar

import msgspec

from dapji.errors import UnavailableError
from dapji.server.answering import JsonObject
from dapji.server.problem import Problem

T = TypeVar("T")

_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS responses (id TEXT PRIMARY KEY, key TEXT NOT NULL, stored BLOB NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
"""
_WAIT = 5.0
"""Seconds for another process that writes."""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    body: JsonObject
    """The response, as it is told."""
    input: list[JsonObject]
    """The items that it answered, without those of the responses before it."""


class ResponseStore:
    """What `put` has taken survives the process and the machine; what `delete` has taken is overwritten with zeros
    (SQLite's secure_delete) and gone from the write-ahead log. A response belongs to the key that asked for it: others
    do not find it."""

    def __init__(self, folder: Path) -> None:
        """Makes nothing before it is used."""
        self.path = folder / "responses.db"
        self._connection: sqlite3.Connection | None = None
        self._lock = Lock()

    async def put(self, key: str, stored: Stored) -> None:
        row = (stored.body["id"], key, msgspec.json.encode(stored))
        await self._run(lambda db: db.execute("INSERT INTO responses VALUES (?, ?, ?)", row))

    async def get(self, key: str, name: str) -> Stored:
        """Raises Problem where there is none."""
        query = "SELECT stored FROM responses WHERE id = ? AND key = ?"
        row = await self._run(lambda db: db.execute(query, (name, key)).fetchone())
        if row is None:
            raise _missing(name)
        return msgspec.json.decode(row[0], type=Stored)

    async def delete(self, key: str, name: str) -> None:
        """Raises Problem where there is none."""
        query = "DELETE FROM responses WHERE id = ? AND key = ?"
        if not await self._run(lambda db: db.execute(query, (name, key)).rowcount):
            raise _missing(name)
        await self._run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def locked() -> T:
            with self._lock, self._explained():
                return work(self._opened())

        return await asyncio.to_thread(locked)

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            # Without isolation level each statement is a transaction of its own, committed when `execute` returns.
            db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
            try:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version > _VERSION:
                    raise UnavailableError(
                        f"{self.path}: written by a newer version (layout {version}, here {_VERSION})"
                    )
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                    db.execute(f"PRAGMA {pragma}")
                db.executescript(_SCHEMA)
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
            raise UnavailableError(
                f"{self.path}: {error}", hint="responses cannot be kept: ask with store false, or see to that file"
            ) from error


def _missing(name: str) -> Problem:
    return Problem("not_found", f"there is no response {name!r} here", "response_id")
