"""`ConversationStore`: the conversations of the page, each a tree of turns, in one SQLite file.

Editing a turn or answering it again adds a sibling, so nothing that was said is lost. Knows neither models nor HTTP.
"""

from __future__ import annotations

import re
import sqlite3
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from dapji.server.answering import identifier
from dapji.server.database import Database
from dapji.server.openai.chat import Tool
from dapji.server.problem import Problem
from dapji.server.wire import Strict

T = TypeVar("T")

_LAYOUT = """
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, title TEXT NOT NULL, settings BLOB NOT NULL, leaf INTEGER,
    created REAL NOT NULL, changed REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_change ON conversations (key, changed DESC);
CREATE TABLE IF NOT EXISTS turns (
    conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE, number INTEGER NOT NULL, turn BLOB NOT NULL,
    PRIMARY KEY (conversation, number)
)
"""
_TITLE = 60
"""Characters of a title that nobody has chosen."""
_AROUND = 30
"""Characters told before what was found."""

Number = Annotated[int, Meta(ge=1, le=2**53 - 1)]
"""Of a turn, counted in its conversation."""
Title = Annotated[str, Meta(max_length=200)]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Seconds = Annotated[float, Meta(ge=0)]


class File(Strict):
    """A text file that belongs to a user's turn."""

    name: Annotated[str, Meta(min_length=1, max_length=255)]
    text: str


class Call(Strict):
    """Of a tool, in an answer."""

    name: str
    arguments: str
    """As the model wrote them."""


class Usage(Strict):
    prompt: Count
    """Tokens; so the next two."""
    cached: Count
    generated: Count
    context: Count
    """How many tokens prompt and answer could have had."""
    waited: Seconds
    """From the request to the first token."""
    seconds: Seconds
    """From the first token to the last."""


class Turn(Strict, omit_defaults=True):
    """A user's message or an answer. What follows the first four is of answers, `files` of messages."""

    number: Number
    parent: Number | None
    """The turn that it follows; None: it begins the conversation."""
    role: Literal["user", "assistant"]
    created: Seconds
    """Since 1970."""
    content: str = ""
    files: list[File] = msgspec.field(default_factory=list)
    reasoning: str = ""
    calls: list[Call] = msgspec.field(default_factory=list)
    model: str | None = None
    finish: Literal["stop", "length", "stopped", "failed"] | None = None
    """Why it ended: by itself, for want of room, by its reader, by `error`."""
    error: str | None = None
    usage: Usage | None = None

    def texts(self) -> str:
        """All that search looks at."""
        files = [part for file in self.files for part in (file.name, file.text)]
        calls = [part for call in self.calls for part in (call.name, call.arguments)]
        return "\n".join([self.content, *files, self.reasoning, *calls])


class Settings(Strict, omit_defaults=True):
    """How a conversation is answered; what is left out is as the model's makers recommend."""

    model: str | None = None
    """None: the server's first."""
    system: str = ""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: Count | None = None
    seed: Count | None = None
    thinking: bool | Literal["low", "medium", "high"] | None = None
    tools: list[Tool] = msgspec.field(default_factory=list)
    """That the model may call."""


class Summary(msgspec.Struct, kw_only=True):
    """A conversation without its turns."""

    id: str
    title: str
    created: float
    changed: float
    """When its last turn came."""


class Found(Summary, kw_only=True):
    found: str | None = None
    """Where a search was: the text around what it found in a turn."""


class Conversation(Summary, kw_only=True):
    settings: Settings
    leaf: int | None
    """The last turn of the branch that is shown; None: there is no turn."""
    turns: list[Turn]
    """By number; a turn comes after its parent."""

    def branch(self, leaf: int | None) -> list[Turn]:
        """The turns from the first to `leaf`. Raises Problem where there is no such turn."""
        by_number = {turn.number: turn for turn in self.turns}
        path: list[Turn] = []
        while leaf is not None:
            if leaf not in by_number:
                raise no_turn(leaf)
            path.append(by_number[leaf])
            leaf = path[-1].parent
        return path[::-1]


class Change(Strict):
    """What of a conversation becomes another; what is left out stays."""

    title: Title | UnsetType = UNSET
    settings: Settings | UnsetType = UNSET
    leaf: Number | UnsetType = UNSET


class ConversationStore:
    """Of a server. A conversation belongs to the key that began it: others do not find it. Every method raises Problem
    where it finds none, and UnavailableError where the file cannot be used."""

    def __init__(self, folder: Path) -> None:
        """Makes nothing before it is used."""
        self.path = folder / "conversations.db"
        self._database = Database(self.path, layout=_LAYOUT, version=1, hint="see to that file: it keeps conversations")

    async def create(
        self,
        key: str,
        settings: Settings,
        *,
        title: str = "",
        leaf: int | None = None,
        created: float | None = None,
        turns: list[Turn] | None = None,
    ) -> Conversation:
        """turns: as of a `Conversation`."""
        now = time.time()
        made = Conversation(
            id=identifier("conv"),
            title=title,
            created=now if created is None else created,
            changed=now,
            settings=settings,
            leaf=leaf,
            turns=turns or [],
        )

        def work(db: sqlite3.Connection) -> None:
            row = (made.id, key, title, msgspec.json.encode(settings), leaf, made.created, made.changed)
            db.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            rows = [(made.id, turn.number, msgspec.json.encode(turn)) for turn in made.turns]
            db.executemany("INSERT INTO turns VALUES (?, ?, ?)", rows)

        await self._database.run(work)
        return made

    async def get(self, key: str, name: str) -> Conversation:
        def work(db: sqlite3.Connection) -> Conversation:
            title, settings, leaf, created, changed = _row(db, key, name)
            rows = db.execute("SELECT turn FROM turns WHERE conversation = ? ORDER BY number", (name,))
            return Conversation(
                id=name,
                title=title,
                created=created,
                changed=changed,
                settings=msgspec.json.decode(settings, type=Settings),
                leaf=leaf,
                turns=[_turn(turn) for (turn,) in rows],
            )

        return await self._database.run(work)

    async def list(self, key: str, *, search: str, limit: int, offset: int) -> tuple[list[Found], bool]:
        """Those whose title or any turn has `search` in it, in any case of letters, the last changed first; and whether
        there are more after these."""
        wanted = _folded(search)

        def work(db: sqlite3.Connection) -> list[Found]:
            db.create_function("has", 1, lambda text: wanted in _folded(text), deterministic=True)
            db.create_function("turn_has", 1, lambda turn: wanted in _folded(_turn(turn).texts()), deterministic=True)
            where, found = "", "NULL"
            if wanted:
                found = "(SELECT turn FROM turns WHERE conversation = id AND turn_has(turn) ORDER BY number LIMIT 1)"
                where = "WHERE found IS NOT NULL OR has(title)"
            rows = db.execute(
                f"SELECT * FROM (SELECT id, title, created, changed, {found} AS found FROM conversations WHERE key = ? "
                f"ORDER BY changed DESC, id) {where} LIMIT ? OFFSET ?",
                (key, limit + 1, offset),
            )
            return [
                Found(
                    id=id,
                    title=title,
                    created=created,
                    changed=changed,
                    found=None if turn is None else _around(_turn(turn).texts(), search),
                )
                for id, title, created, changed, turn in rows
            ]

        found = await self._database.run(work)
        return found[:limit], len(found) > limit

    async def change(self, key: str, name: str, change: Change) -> None:
        """Raises Problem also where the leaf is no turn of it."""

        def work(db: sqlite3.Connection) -> None:
            _row(db, key, name)
            if change.title is not UNSET:
                db.execute("UPDATE conversations SET title = ? WHERE id = ?", (change.title, name))
            if change.settings is not UNSET:
                settings = msgspec.json.encode(change.settings)
                db.execute("UPDATE conversations SET settings = ? WHERE id = ?", (settings, name))
            if change.leaf is not UNSET:
                _found_turn(db, name, change.leaf)
                db.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (change.leaf, name))

        await self._database.run(work)

    async def add(self, key: str, name: str, make: Callable[..., Turn]) -> Turn:
        """Adds the turn that `make` gives for its `number`, after its parent, and makes it the leaf. The first turn
        names the conversation. Raises Problem also where it does not follow its parent: a user's message begins a
        conversation or follows an answer, an answer follows a message."""

        def work(db: sqlite3.Connection) -> Turn:
            title, *_ = _row(db, key, name)
            (last,) = db.execute("SELECT MAX(number) FROM turns WHERE conversation = ?", (name,)).fetchone()
            turn = make(number=(last or 0) + 1)
            parent = None if turn.parent is None else _found_turn(db, name, turn.parent)
            check_order(turn, parent)
            db.execute("INSERT INTO turns VALUES (?, ?, ?)", (name, turn.number, msgspec.json.encode(turn)))
            db.execute(
                "UPDATE conversations SET leaf = ?, changed = ?, title = ? WHERE id = ?",
                (turn.number, time.time(), title or title_of(turn), name),
            )
            return turn

        return await self._database.run(work)

    async def delete(self, key: str, name: str) -> None:
        """Overwrites it."""

        def work(db: sqlite3.Connection) -> None:
            _row(db, key, name)
            db.execute("DELETE FROM conversations WHERE id = ?", (name,))

        await self._database.forget(work)

    def close(self) -> None:
        self._database.close()


def title_of(turn: Turn) -> str:
    """What a conversation that begins with it is called before somebody names it."""
    text = " ".join((turn.content.strip() or "".join(file.name for file in turn.files[:1])).split())
    return text if len(text) <= _TITLE else text[: _TITLE - 1].rstrip() + "…"


def check_order(turn: Turn, parent: Turn | None) -> None:
    """Raises Problem where the turn does not follow its parent."""
    before = "nothing" if parent is None else f"a turn of {parent.role!r}"
    if (turn.role == "user") == (parent is not None and parent.role == "user"):
        raise Problem("invalid_request", f"a turn of {turn.role!r} does not follow {before}", "parent")


def no_turn(number: int) -> Problem:
    return Problem("not_found", f"the conversation has no turn {number}")


def _row(db: sqlite3.Connection, key: str, name: str) -> tuple[str, bytes, int | None, float, float]:
    query = "SELECT title, settings, leaf, created, changed FROM conversations WHERE id = ? AND key = ?"
    row: tuple[str, bytes, int | None, float, float] | None = db.execute(query, (name, key)).fetchone()
    if row is None:
        raise Problem("not_found", f"there is no conversation {name!r} here")
    return row


def _found_turn(db: sqlite3.Connection, name: str, number: int) -> Turn:
    row = db.execute("SELECT turn FROM turns WHERE conversation = ? AND number = ?", (name, number)).fetchone()
    if row is None:
        raise no_turn(number)
    return _turn(row[0])


def _turn(stored: bytes) -> Turn:
    return msgspec.json.decode(stored, type=Turn)


def _folded(text: str) -> str:
    """Without differences of case, nor of how Unicode composes a character."""
    return unicodedata.normalize("NFC", text).casefold()


def _around(text: str, search: str) -> str:
    text, search = (unicodedata.normalize("NFC", each) for each in (text, search))
    match = re.search(re.escape(search), text, re.IGNORECASE)
    start = max(0, (match.start() if match else 0) - _AROUND)
    return ("…" if start else "") + " ".join(text[start : start + 160].split())
