"""Tool calls of DeepSeek V3, R1 and V3.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.arguments import check_plain_name
from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import Form, Rules, Wanted
from dapji.chat.formats.values import json_members

_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE = "```"


@dataclass(frozen=True, kw_only=True)
class DeepSeekCalls(Calls):
    """A section of calls: `function<｜tool▁sep｜>f` and JSON in a code block, or since V3.1 `f<｜tool▁sep｜>{…}`."""

    fenced: bool = False
    """Models write the first of the two."""

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        calls = []
        for name, schema in wanted.tools.items():
            check_plain_name(name)
            arguments = f"{rules.space} {rules.json(schema, f'tool {name!r}')} {rules.space}"
            if self.fenced:
                begin = f"{rules.literal('function')} {rules.text(_SEPARATOR)} {rules.literal(name)} {rules.space}"
                calls.append(f"{begin} {rules.literal(_FENCE + 'json')} {arguments} {rules.literal(_FENCE)}")
            else:
                calls.append(f"{rules.literal(name)} {rules.text(_SEPARATOR)} {arguments}")
        call = f"{rules.text(_CALL)} {rules.one_of(calls)} {rules.text(_CALL_END)} {rules.space}"
        more = f"({call})*" if wanted.parallel else ""
        return [Form(opener=_SECTION, rest=f"{rules.space} {call} {more} {rules.text(_SECTION_END)}")]

    @property
    def openers(self) -> Sequence[str]:
        return (_SECTION, _CALL)

    @property
    def markers(self) -> Sequence[str]:
        return (_SECTION, _CALL, _SEPARATOR, _CALL_END, _SECTION_END)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        if opener == _SECTION:
            yield from reader.space()
            yield from reader.expect(_CALL)
        while True:
            name = yield from reader.name()
            yield from reader.expect(_SEPARATOR)
            yield from reader.space()
            if (yield from reader.sees("{")) is not None:
                arguments = yield from reader.bracketed("json")
            elif name == "function":
                name = yield from reader.name()
                yield from reader.space()
                yield from reader.expect(_FENCE + "json", _FENCE)
                yield from reader.space()
                arguments = yield from reader.bracketed("json")
                yield from reader.space()
                yield from reader.expect(_FENCE)
            else:
                raise Malformed
            json_members(arguments)
            if not (yield from reader.closed_by(_CALL_END)):
                raise Malformed
            reader.tool_call(name, arguments)
            yield from reader.space()
            if (yield from reader.accept(_CALL, _SECTION_END)) != _CALL:
                reader.markup()
                return
