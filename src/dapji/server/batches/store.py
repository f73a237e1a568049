"""`BatchStore`: files of clients, batches, and the answers of those that are not finished."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
from starlette.requests import Request

from dapji.server.answering import JsonObject, identifier
from dapji.server.batches.lines import LineError, parse, read_lines
from dapji.server.database import Database
from dapji.server.problem import Problem

Purpose = Literal["batch", "batch_output", "messages"]
"""`messages`: the input of a batch that came without a file, which no client sees."""
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ACTIVE: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
WINDOW = 24 * 3600
"""Seconds in which a batch is answered, or expires."""
_LAYOUT = """
CREATE TABLE IF NOT EXISTS files (
    n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, key TEXT NOT NULL, purpose TEXT NOT NULL, filename TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
);
CREATE TABLE IF NOT EXISTS batches (
    n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, key TEXT NOT NULL, endpoint TEXT NOT NULL, status TEXT NOT NULL,
    completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, stored BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (
    batch TEXT NOT NULL, line INTEGER NOT NULL, ok INTEGER NOT NULL, told BLOB NOT NULL, UNIQUE (batch, line)
)
"""
_AT_ONCE = 256
"""Answers that are read into memory together."""
_ORPHAN = 24 * 3600
"""Seconds after which a body without an entry belongs to nobody who still works on it."""


class File(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    key: str
    """Of its owner."""
    purpose: Purpose
    filename: str
    bytes: int
    created_at: int
    """Seconds since 1970."""
    expires_at: int | None


class Batch(msgspec.Struct, kw_only=True):
    id: str
    key: str
    """Of its owner."""
    endpoint: str
    input_file_id: str
    created_at: int
    """Seconds since 1970."""
    status: Status = "validating"
    times: dict[Status, int] = {}
    """When a status began."""
    window: int = WINDOW
    """Seconds from its making to its expiry."""
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None
    """After which its output files expire."""
    errors: list[LineError] = []
    """Of the input file."""
    total: int = 0
    completed: int = 0
    """With an answer; so `failed`, whose answer is an error."""
    failed: int = 0
    unanswered: int = 0
    """When the batch had ended before they were."""
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def expires_at(self) -> int:
        return self.created_at + self.window


class BatchStore:
    """What is kept survives the process and the machine. Files and batches belong to the key that made them: others do
    not find them. Bodies lie in a folder that their owner alone can enter."""

    def __init__(self, folder: Path) -> None:
        """Makes nothing before it is used."""
        self.path = folder / "batches.db"
        self.lock = folder / "batches.lock"
        self._bodies = folder / "files"
        hint = "files and batches cannot be kept: see to that file"
        self._database = Database(self.path, layout=_LAYOUT, version=1, hint=hint)

    def close(self) -> None:
        self._database.close()

    # Files

    def body(self, name: str) -> Path:
        """Where a file's bytes lie."""
        return self._bodies / name

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[tuple[str, BinaryIO]]:
        """A new file's name, and its body to be written, which `add` then makes a file; what raises removes it."""
        self._bodies.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = identifier("file")
        path = self.body(name)
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as body:
                yield name, body
                body.flush()
                await asyncio.to_thread(os.fsync, body.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    async def add(self, key: str, name: str, purpose: Purpose, filename: str, seconds: int | None) -> File:
        """The file whose body has been written. seconds: after which it expires."""
        return await self._database.run(lambda db: self._add(db, key, name, purpose, filename, seconds))

    async def file(self, key: str, name: str) -> File:
        """Raises Problem where there is none."""
        return await self._database.run(lambda db: self._file(db, key, name))

    async def files(
        self, key: str, purposes: Sequence[Purpose], *, after: str | None, limit: int, newest_first: bool
    ) -> list[File]:
        """A page of a key's files of those purposes, behind the file `after`. Raises Problem."""
        kinds = f"purpose IN ({', '.join('?' * len(purposes))}) AND (expires_at IS NULL OR expires_at > ?)"
        values = (*purposes, int(time.time()))
        rows = await self._database.run(lambda db: _page(db, "files", key, kinds, values, after, limit, newest_first))
        return [_file(row) for row in rows]

    async def delete(self, key: str, name: str) -> None:
        """The bytes first. Raises Problem where there is none, or a batch still reads it."""

        def work(db: sqlite3.Connection) -> None:
            self._file(db, key, name)
            for batch in _batches(db, f"status IN {ACTIVE}", ()):
                if batch.input_file_id == name:
                    told = f"batch {batch.id} still reads file {name!r}: cancel it first, or wait for its end"
                    raise Problem("invalid_request", told, code="file_in_use")
            self.body(name).unlink(missing_ok=True)
            db.execute("DELETE FROM files WHERE id = ?", (name,))

        await self._database.forget(work)

    # Batches

    async def create(self, batch: Batch, purpose: Purpose) -> None:
        """Raises Problem where its input is no file of its key for that purpose."""

        def work(db: sqlite3.Connection) -> None:
            file = self._file(db, batch.key, batch.input_file_id)
            if file.purpose != purpose:
                told = f"file {file.id!r} has the purpose {file.purpose!r}, not {purpose!r}"
                raise Problem("invalid_request", told, "input_file_id")
            db.execute(
                "INSERT INTO batches (id, key, endpoint, status, stored) VALUES (?, ?, ?, ?, ?)",
                (batch.id, batch.key, batch.endpoint, batch.status, msgspec.json.encode(batch)),
            )

        await self._database.run(work)

    async def batch(self, key: str, name: str, endpoints: Iterable[str]) -> Batch:
        """Raises Problem where there is none of those endpoints."""
        found = await self._database.run(lambda db: _batches(db, "id = ? AND key = ?", (name, key)))
        if not found or found[0].endpoint not in endpoints:
            raise Problem("not_found", f"there is no batch {name!r} here", "batch_id")
        return found[0]

    async def batches(
        self, key: str, endpoints: Sequence[str], *, after: str | None = None, before: str | None = None, limit: int
    ) -> list[Batch]:
        """A page of a key's batches of those endpoints, the newest first: those behind `after`, or the last before
        `before`. Raises Problem."""
        kinds = f"endpoint IN ({', '.join('?' * len(endpoints))})"

        def work(db: sqlite3.Connection) -> list[Any]:
            if before is not None:
                return _page(db, "batches", key, kinds, tuple(endpoints), before, limit, False)[::-1]
            return _page(db, "batches", key, kinds, tuple(endpoints), after, limit, True)

        return [_batch(row) for row in await self._database.run(work)]

    async def active(self) -> list[Batch]:
        """Of all keys, in the order of their making."""
        if not self.path.exists():
            return []
        return await self._database.run(lambda db: _batches(db, f"status IN {ACTIVE}", ()))

    async def change(self, name: str, change: Callable[[Batch], None]) -> Batch:
        """The batch, after `change` in one transaction."""

        def work(db: sqlite3.Connection) -> Batch:
            (batch,) = _batches(db, "id = ?", (name,))
            change(batch)
            _write(db, batch)
            return batch

        return await self._database.run(work)

    async def cancel(self, name: str) -> Batch:
        """Lets what is done stand; nothing happens to a batch that has ended."""

        def change(batch: Batch) -> None:
            if batch.status in ("validating", "in_progress"):
                begin(batch, "cancelling")

        return await self.change(name, change)

    async def remove(self, batch: Batch) -> None:
        """Deletes a batch with its files. Raises Problem where it has not ended."""

        def work(db: sqlite3.Connection) -> None:
            if batch.status in ACTIVE:
                told = f"batch {batch.id!r} has not ended: cancel it first, or wait for its end"
                raise Problem("invalid_request", told)
            for name in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
                if name is not None:
                    self.body(name).unlink(missing_ok=True)
                    db.execute("DELETE FROM files WHERE id = ?", (name,))
            db.execute("DELETE FROM batches WHERE id = ?", (batch.id,))

        await self._database.forget(work)

    # What the runner does

    async def answered(self, name: str) -> set[int]:
        """The numbers of a batch's lines that have an answer."""
        rows = await self._database.run(
            lambda db: db.execute("SELECT line FROM answers WHERE batch = ?", (name,)).fetchall()
        )
        return {line for (line,) in rows}

    async def answer(self, name: str, line: int, told: JsonObject, *, ok: bool) -> None:
        """A line's, with the counts of its batch."""
        row = (name, line, ok, msgspec.json.encode(told))

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", row)
            db.execute(
                "UPDATE batches SET completed = completed + ?, failed = failed + ? WHERE id = ?", (ok, not ok, name)
            )

        await self._database.run(work)

    async def finish(self, batch: Batch, status: Status, *, unanswered: JsonObject | None, most_bytes: int) -> Batch:
        """The batch as it ends, its answers in files. unanswered: the error of lines without an answer, in the second
        file; None: there are none, or lines have no form. most_bytes: of a line of input."""
        output = await self._gather(batch, ok=True)
        errors = await self._gather(batch, ok=False, unanswered=unanswered, most_bytes=most_bytes)

        def work(db: sqlite3.Connection) -> Batch:
            (ended,) = _batches(db, "id = ?", (batch.id,))
            # Also of an input that has expired meanwhile.
            (asked,) = db.execute("SELECT purpose FROM files WHERE id = ?", (batch.input_file_id,)).fetchone()
            purpose: Purpose = "messages" if asked == "messages" else "batch_output"
            if output is not None:
                ended.output_file_id = output
                self._add(db, batch.key, output, purpose, f"{batch.id}_output.jsonl", batch.output_seconds)
            if errors is not None:
                ended.error_file_id = errors
                self._add(db, batch.key, errors, purpose, f"{batch.id}_error.jsonl", batch.output_seconds)
            if unanswered is not None:
                ended.unanswered = ended.total - ended.completed - ended.failed
            begin(ended, status)
            _write(db, ended)
            db.execute("DELETE FROM answers WHERE batch = ?", (batch.id,))
            return ended

        return await self._database.forget(work)

    async def _gather(
        self, batch: Batch, *, ok: bool, unanswered: JsonObject | None = None, most_bytes: int = 0
    ) -> str | None:
        """Writes the body of an output file, in the order of the input; its name, None where it would be empty."""

        def page(after: int) -> Callable[[sqlite3.Connection], list[Any]]:
            query = "SELECT line, told FROM answers WHERE batch = ? AND ok = ? AND line > ? ORDER BY line LIMIT ?"
            return lambda db: db.execute(query, (batch.id, ok, after, _AT_ONCE)).fetchall()

        async with self.writing() as (name, body):
            last = 0
            while rows := await self._database.run(page(last)):
                body.writelines(told + b"\n" for _, told in rows)
                last = rows[-1][0]
            if unanswered is not None:
                done = await self.answered(batch.id)
                await asyncio.to_thread(self._write_unanswered, batch, body, done, unanswered, most_bytes)
            empty = body.tell() == 0
        if empty:
            self.body(name).unlink()
        return None if empty else name

    def _write_unanswered(
        self, batch: Batch, body: BinaryIO, done: set[int], error: JsonObject, most_bytes: int
    ) -> None:
        for number, line in read_lines(self.body(batch.input_file_id), most_bytes):
            if number not in done:
                told = {"id": identifier("batch_req", "_"), "custom_id": parse(line).custom_id, "response": None}
                body.write(msgspec.json.encode(told | {"error": error}) + b"\n")

    async def sweep(self) -> None:
        """Deletes the files that have expired, and bodies that an end in the middle of something left behind."""
        if not self.path.exists():
            return
        now = int(time.time())

        def work(db: sqlite3.Connection) -> bool:
            busy = {batch.input_file_id for batch in _batches(db, f"status IN {ACTIVE}", ())}
            rows = db.execute("SELECT id FROM files WHERE expires_at <= ?", (now,)).fetchall()
            expired = [name for (name,) in rows if name not in busy]
            for name in expired:
                self.body(name).unlink(missing_ok=True)
                db.execute("DELETE FROM files WHERE id = ?", (name,))
            known = {name for (name,) in db.execute("SELECT id FROM files")}
            for path in self._bodies.iterdir() if self._bodies.is_dir() else ():
                with suppress(FileNotFoundError):
                    if path.name not in known and path.stat().st_mtime < now - _ORPHAN:
                        path.unlink()
            return bool(expired)

        await self._database.forget(work)

    def _file(self, db: sqlite3.Connection, key: str, name: str) -> File:
        row = db.execute("SELECT * FROM files WHERE id = ? AND key = ?", (name, key)).fetchone()
        if row is not None:
            file = _file(row)
            if file.expires_at is None or file.expires_at > time.time():
                return file
        raise Problem("not_found", f"there is no file {name!r} here", "file_id")

    def _add(
        self, db: sqlite3.Connection, key: str, name: str, purpose: Purpose, filename: str, seconds: int | None
    ) -> File:
        now = int(time.time())
        file = File(
            id=name,
            key=key,
            purpose=purpose,
            filename=filename,
            bytes=self.body(name).stat().st_size,
            created_at=now,
            expires_at=None if seconds is None else now + seconds,
        )
        db.execute("INSERT INTO files VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", msgspec.structs.astuple(file))
        return file


def begin(batch: Batch, status: Status) -> None:
    """A status, from now on."""
    batch.status = status
    batch.times[status] = int(time.time())


def _file(row: Sequence[Any]) -> File:
    return File(**dict(zip(File.__struct_fields__, row[1:], strict=True)))


def _batch(row: Sequence[Any]) -> Batch:
    batch = msgspec.json.decode(row[7], type=Batch)
    batch.completed, batch.failed = row[5], row[6]
    return batch


def _batches(db: sqlite3.Connection, which: str, values: Sequence[Any]) -> list[Batch]:
    return [_batch(row) for row in db.execute(f"SELECT * FROM batches WHERE {which} ORDER BY n", values)]


def _write(db: sqlite3.Connection, batch: Batch) -> None:
    db.execute(
        "UPDATE batches SET status = ?, completed = ?, failed = ?, stored = ? WHERE id = ?",
        (batch.status, batch.completed, batch.failed, msgspec.json.encode(batch), batch.id),
    )


def _page(
    db: sqlite3.Connection,
    table: str,
    key: str,
    kinds: str,
    values: Sequence[Any],
    after: str | None,
    limit: int,
    newest_first: bool,
) -> list[Any]:
    """Rows of a key behind that of the name `after`; kinds: a condition with values."""
    place = ""
    bounds: list[Any] = []
    if after is not None:
        row = db.execute(f"SELECT n FROM {table} WHERE id = ? AND key = ?", (after, key)).fetchone()
        if row is None:
            raise Problem("invalid_request", f"after: there is no {after!r} here", "after")
        place = "AND n < ?" if newest_first else "AND n > ?"
        bounds = [row[0]]
    order = "DESC" if newest_first else "ASC"
    query = f"SELECT * FROM {table} WHERE key = ? AND {kinds} {place} ORDER BY n {order} LIMIT ?"
    return db.execute(query, (key, *values, *bounds, limit)).fetchall()


def store_of(request: Request) -> BatchStore:
    """The server's."""
    store: BatchStore = request.app.state.batches
    return store
