"""Tool calls as a list of Python calls, `[f(a=1), g(b="x")]`."""

from __future__ import annotations

from dataclasses import dataclass

from dapji.chat.formats.parser import MarkedCalls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import python_calls


@dataclass(frozen=True, kw_only=True)
class PythonicCalls(MarkedCalls):
    """A list between two markers."""

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        yield from read_list(reader, self.closer)


def read_list(reader: Reader, closer: str | None) -> Steps[None]:
    """The list at the cursor and what closes it. Raises Malformed."""
    calls = python_calls((yield from reader.bracketed("python")))
    if not calls or not (yield from reader.closed_by(closer)):
        raise Malformed
    for name, arguments in calls:
        reader.tool_call(name, arguments)


def begins_list(reader: Reader) -> Steps[bool]:
    """Whether a list with a call begins at the cursor, which may move."""
    try:
        yield from reader.expect("[")
        yield from reader.space()
        yield from reader.name()
        yield from reader.space()
        yield from reader.expect("(")
    except Malformed:
        return False
    return True
