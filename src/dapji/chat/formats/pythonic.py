"""Tool calls as a list of Python calls, `[f(a=1), g(b="x")]`."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapji.chat.formats.arguments import arguments_of, in_order
from dapji.chat.formats.parser import MarkedCalls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import Form, Rules, Wanted
from dapji.chat.formats.values import python_calls
from dapji.errors import RequestError

_COMMA = '"," (" ")?'


@dataclass(frozen=True, kw_only=True)
class PythonicCalls(MarkedCalls):
    """A list between two markers."""

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        closer = "" if self.closer is None else f"{rules.space} {rules.text(self.closer)}"
        return [Form(opener=self.opener, rest=f"{rules.space} {written_list(rules, wanted)[0]} {closer}")]

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


def written_list(rules: Rules, wanted: Wanted) -> tuple[str, Mapping[str, str]]:
    """Expressions of a list, and of what follows the name and its bracket in the first call, by the tool's name.

    Values are written as JSON, which `python_calls` reads too. Raises RequestError.
    """
    ends = {name: _call_end(rules, name, schema) for name, schema in wanted.tools.items()}
    call = rules.one_of(f"{rules.literal(f'{name}(')} {end}" for name, end in ends.items())
    more = (f"({_COMMA} {call})* " if wanted.parallel else "") + '"]"'
    return f'"[" {call} {more}', {name: f"{end} {more}" for name, end in ends.items()}


def _call_end(rules: Rules, name: str, schema: Mapping[str, Any]) -> str:
    for word in name.split("."):
        _check_identifier(word)
    written = []
    for argument in arguments_of(name, schema):
        _check_identifier(argument.name)
        value = rules.json(argument.schema, argument.where)
        written.append((f"{rules.literal(f'{argument.name}=')} {value}", argument.required))
    return f'{in_order(rules, written, _COMMA)} ")"'


def _check_identifier(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise RequestError(f"this model writes calls in Python, where {name!r} can be no name")


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
