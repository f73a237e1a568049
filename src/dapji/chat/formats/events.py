"""What an answer consists of. The `text` of all events, joined, is the answer to the last character."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Event:
    """A stretch of an answer."""

    text: str
    """As the model wrote it, control tokens by their spelling; empty where an earlier event has it already."""


@dataclass(frozen=True, kw_only=True)
class Content(Event):
    """Text for the reader."""

    malformed: bool = False
    """It began as a tool call and cannot be read as one."""


@dataclass(frozen=True, kw_only=True)
class Reasoning(Event):
    """Text that the model wrote to itself before it answered."""


@dataclass(frozen=True, kw_only=True)
class ToolCall(Event):
    """A whole call. `text` is all that stands for it, its markers included."""

    name: str
    arguments: str
    """JSON: as the model wrote it, where its format is JSON."""
    id: str | None = None
    """Where the format has one."""


@dataclass(frozen=True, kw_only=True)
class Markup(Event):
    """Markers, and white space beside them, that belong to the format and to no reader."""
