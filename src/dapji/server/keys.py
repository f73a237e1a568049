"""`Keys`: who may ask, and how much in a day. One SQLite file, so that commands and servers share it safely.

A key is 256 random bits, so nobody can guess it from its hash however fast the hash is: BLAKE2 with a salt of its own
is enough, and a check takes microseconds. (Slow hashes are for passwords, which people think up.) The key itself is
nowhere on disk. Knows of HTTP only the `Problem` of a used-up quota.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dapji.errors import FormatError, UsageError
from dapji.server.problem import Problem
from dapji.weights import store

_SCHEMA = """
CREATE TABLE keys (
    name TEXT PRIMARY KEY, salt BLOB NOT NULL, hash BLOB NOT NULL, quota INTEGER, created TEXT NOT NULL, revoked TEXT
);
CREATE TABLE used (name TEXT, day TEXT, tokens INTEGER NOT NULL, PRIMARY KEY (name, day));
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is told of a key."""

    name: str
    quota: int | None
    """Tokens a day, of prompts and answers; None: any number."""
    used: int
    """Today."""
    created: str
    """UTC, ISO 8601; so `revoked`, None where it opens."""
    revoked: str | None


class Keys:
    """For one thread at a time. Sees at once what other processes change. Days are UTC's."""

    def __init__(self, path: Path) -> None:
        """path: of the file; it is made with the first key, readable by its owner alone."""
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def add(self, name: str, quota: int | None = None) -> str:
        """The new key, which cannot be had again. Raises UsageError: the name is taken, or is none."""
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise UsageError(f"{name!r} is no name of a key", hint="1 to 64 letters, digits and . _ -")
        key, salt = f"dapji-{secrets.token_urlsafe(32)}", secrets.token_bytes(16)
        if not self.path.exists():
            self._create()
        added = self._run(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?, NULL) ON CONFLICT (name) DO UPDATE SET salt = excluded.salt, "
            "hash = excluded.hash, quota = excluded.quota, created = excluded.created, revoked = NULL "
            "WHERE revoked IS NOT NULL RETURNING name",
            (name, salt, _hash(key, salt), quota, _now()),
        )
        if not added:
            raise UsageError(f"there is a key named {name!r} already", hint=f"dapji key revoke {name}")
        return key

    def revoke(self, name: str) -> None:
        """Raises UsageError where no key of that name opens."""
        if not self._run(
            "UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL RETURNING name", (_now(), name)
        ):
            raise UsageError(f"there is no key named {name!r}", hint="dapji key list")

    def all(self) -> list[Key]:
        """All that there ever were, by name."""
        rows = self._run(
            "SELECT keys.name, quota, COALESCE(tokens, 0), created, revoked FROM keys "
            "LEFT JOIN used ON used.name = keys.name AND day = ? ORDER BY keys.name",
            (_today(),),
        )
        return [
            Key(name=name, quota=quota, used=used, created=created, revoked=revoked)
            for name, quota, used, created, revoked in rows
        ]

    @property
    def asked(self) -> bool:
        """Whether a server must ask for a key: once there has been one, so that revoking the last opens nothing."""
        return bool(self._run("SELECT 1 FROM keys LIMIT 1"))

    def name_of(self, key: str) -> str | None:
        """None: it opens nothing."""
        for name, salt, digest in self._run("SELECT name, salt, hash FROM keys WHERE revoked IS NULL"):
            if hmac.compare_digest(_hash(key, salt), digest):
                found: str = name
                return found
        return None

    def opens(self, name: str) -> bool:
        """Whether there is a key of that name that is not revoked."""
        return bool(self._run("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", (name,)))

    def charge(self, name: str, tokens: int) -> None:
        """Counts tokens of today, over the quota too: an answer under way is finished."""
        self._run(
            "INSERT INTO used VALUES (?, ?, ?) ON CONFLICT (name, day) DO UPDATE SET tokens = tokens + excluded.tokens",
            (name, _today(), tokens),
        )

    def charge_prompt(self, name: str, tokens: int) -> None:
        """As `charge`; raises Problem instead where the quota does not hold the prompt and a token more."""
        rows = self._run(
            "SELECT quota, COALESCE(tokens, 0) FROM keys LEFT JOIN used ON used.name = keys.name AND day = ? "
            "WHERE keys.name = ?",
            (_today(), name),
        )
        for quota, used in rows:
            if quota is not None and used + tokens >= quota:
                raise Problem(
                    "busy",
                    f"key {name!r} has used {used} of its {quota} tokens of this day (UTC), and this prompt has "
                    f"{tokens}",
                    code="quota_exceeded",
                    headers={"Retry-After": str(_seconds_to_tomorrow())},
                )
        self.charge(name, tokens)

    def _create(self) -> None:
        """The file appears as a whole; where another process was quicker, its file stays."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            made = Path(folder) / self.path.name
            os.close(os.open(made, os.O_CREAT | os.O_RDWR, 0o600))
            with closing(sqlite3.connect(made, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(_SCHEMA)
            with suppress(FileExistsError):
                os.link(made, self.path)

    def _run(self, statement: str, values: tuple[object, ...] = ()) -> Sequence[Any]:
        """One statement, which is a transaction. Without a file there is nothing."""
        try:
            if self._connection is None:
                if not self.path.exists():
                    return []
                connection = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
                # A commit need not wait for the disk: a killed process loses nothing, a power cut a few counts.
                connection.execute("PRAGMA synchronous = NORMAL")
                self._connection = connection
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise FormatError(f"{self.path} cannot be used: {error}") from error


def path() -> Path:
    """Of the keys of this store."""
    return store.home() / "server" / "keys.db"


def _hash(key: str, salt: bytes) -> bytes:
    return hashlib.blake2b(key.encode(), salt=salt, digest_size=32).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _seconds_to_tomorrow() -> int:
    now = datetime.now(UTC)
    tomorrow = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return int((tomorrow - now).total_seconds()) + 1
