"""Tool calls of DeepSeek V3, R1 and V3.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import json_members

_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE = "```"


@dataclass(frozen=True, kw_only=True)
class DeepSeekCalls(Calls):
    """A section of calls: `function<｜tool▁sep｜>f` and JSON in a code block, or since V3.1 `f<｜tool▁sep｜>{…}`."""

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
