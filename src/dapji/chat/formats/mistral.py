"""Tool calls of Mistral's models: a list in JSON, or since 2025 one marker for each call.

Format: the tokenizers v3 to v13 of mistral-common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.arguments import check_plain_name
from dapji.chat.formats.json_calls import JsonCalls
from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Reader, Steps
from dapji.chat.formats.rules import Form, Rules, Wanted
from dapji.chat.formats.values import json_members

_CALLS, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_LIST = JsonCalls(opener=_CALLS, closer=None, listed=True, id_key="id", id_last=True)


@dataclass(frozen=True, kw_only=True)
class MistralCalls(Calls):
    """`[TOOL_CALLS][{"name": …, "arguments": {…}, "id": …}]`, or `[TOOL_CALLS]f[CALL_ID]…[ARGS]{…}` without a list.

    The id may be missing.
    """

    listed: bool = True
    """Models write the first of the two."""
    id: bool = False
    """Models write an id."""

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        if self.listed:
            return _LIST.forms(rules, wanted)
        for name in wanted.tools:
            check_plain_name(name)
        id = f"{rules.text(_ID)} {rules.terminal('/[A-Za-z0-9]{9}/')} " if self.id else ""
        calls = rules.one_of(
            f"{rules.literal(name)} {id}{rules.text(_ARGUMENTS)} {rules.space} {rules.json(schema, f'tool {name!r}')}"
            for name, schema in wanted.tools.items()
        )
        return [Form(opener=_CALLS, rest=calls)]

    @property
    def openers(self) -> Sequence[str]:
        return (_CALLS,)

    @property
    def markers(self) -> Sequence[str]:
        return (_CALLS, _ID, _ARGUMENTS)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        if (yield from reader.sees("[", "{")) is not None:
            yield from _LIST.call(reader, opener)
            return
        name = yield from reader.name()
        id = None
        yield from reader.space()
        if (yield from reader.expect(_ID, _ARGUMENTS)) == _ID:
            id = yield from reader.name()
            yield from reader.expect(_ARGUMENTS)
        yield from reader.space()
        arguments = yield from reader.bracketed("json")
        json_members(arguments)
        reader.tool_call(name, arguments, id)
