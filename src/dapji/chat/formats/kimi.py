"""Tool calls of Kimi K2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.arguments import check_plain_name
from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import Form, Rules, Wanted
from dapji.chat.formats.values import json_members

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


@dataclass(frozen=True, kw_only=True)
class KimiCalls(Calls):
    """A section of calls `functions.f:0<|tool_call_argument_begin|>{…}`; `functions.f:0` is the call's id."""

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        number = rules.terminal("/:[0-9]{1,3}/")
        calls = rules.one_of(
            f"{rules.literal(f'functions.{name}')} {number} {rules.space} {rules.text(_ARGUMENTS)} {rules.space} "
            f"{rules.json(schema, f'tool {name!r}')} {rules.space} {rules.text(_CALL_END)}"
            for name, schema in wanted.tools.items()
        )
        for name in wanted.tools:
            check_plain_name(name)
        call = f"{rules.text(_CALL)} {rules.space} {calls} {rules.space}"
        more = f"({call})*" if wanted.parallel else ""
        return [Form(opener=_SECTION, rest=f"{rules.space} {call} {more} {rules.text(_SECTION_END)}")]

    @property
    def openers(self) -> Sequence[str]:
        return (_SECTION,)

    @property
    def markers(self) -> Sequence[str]:
        return (_SECTION, _CALL, _ARGUMENTS, _CALL_END, _SECTION_END)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        yield from reader.expect(_CALL)
        while True:
            yield from reader.space()
            id = yield from reader.name()
            yield from reader.space()
            yield from reader.expect(_ARGUMENTS)
            yield from reader.space()
            arguments = yield from reader.bracketed("json")
            json_members(arguments)
            name = id.removeprefix("functions.")
            name = name.rpartition(":")[0] or name
            if not (yield from reader.closed_by(_CALL_END)):
                raise Malformed
            reader.tool_call(name, arguments, id)
            yield from reader.space()
            if (yield from reader.accept(_CALL, _SECTION_END)) != _CALL:
                reader.markup()
                return
