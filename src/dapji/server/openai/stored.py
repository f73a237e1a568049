"""`ResponseStore`: answers of /v1/responses that clients may come back to."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dapji.server.answering import JsonObject
from dapji.server.database import Database
from dapji.server.problem import Problem

_LAYOUT = """
CREATE TABLE IF NOT EXISTS responses (id TEXT PRIMARY KEY, key TEXT NOT NULL, stored BLOB NOT NULL) WITHOUT ROWID
"""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    body: JsonObject
    """The response, as it is told."""
    input: list[JsonObject]
    """The items that it answered, without those of the responses before it."""


class ResponseStore:
    """What `put` has taken survives the process and the machine; what `delete` has taken is overwritten (`Database`). A
    response belongs to the key that asked for it: others do not find it."""

    def __init__(self, folder: Path) -> None:
        """Makes nothing before it is used."""
        self.path = folder / "responses.db"
        hint = "responses cannot be kept: ask with store false, or see to that file"
        self._database = Database(self.path, layout=_LAYOUT, version=1, hint=hint)

    async def put(self, key: str, stored: Stored) -> None:
        row = (stored.body["id"], key, msgspec.json.encode(stored))
        await self._database.run(lambda db: db.execute("INSERT INTO responses VALUES (?, ?, ?)", row))

    async def get(self, key: str, name: str) -> Stored:
        """Raises Problem where there is none."""
        query = "SELECT stored FROM responses WHERE id = ? AND key = ?"
        row = await self._database.run(lambda db: db.execute(query, (name, key)).fetchone())
        if row is None:
            raise _missing(name)
        return msgspec.json.decode(row[0], type=Stored)

    async def delete(self, key: str, name: str) -> None:
        """Raises Problem where there is none."""
        query = "DELETE FROM responses WHERE id = ? AND key = ?"
        if not await self._database.forget(lambda db: db.execute(query, (name, key)).rowcount):
            raise _missing(name)

    def close(self) -> None:
        self._database.close()


def _missing(name: str) -> Problem:
    return Problem("not_found", f"there is no response {name!r} here", "response_id")
