"""Tool calls as elements with the values as plain text: Qwen3-Coder, Seed-OSS, MiniMax M2, DeepSeek V3.2 and more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import check_json, json_members, text_argument


@dataclass(frozen=True, kw_only=True)
class XmlCalls(Calls):
    """`<tool_call><function=f><parameter=x>1</parameter></function></tool_call>` and its like, nothing escaped.

    Several functions may stand between opener and closer. Both may be missing, as models forget them: a function then
    stands alone. One newline at both ends of a value belongs to the markers. A function may hold one JSON object
    instead of parameters.
    """

    opener: str | None = "<tool_call>"
    closer: str | None = "</tool_call>"
    function: tuple[str, str, str] = ("<function=", ">", "</function>")
    """Before the name, after it, the end."""
    parameter: tuple[str, str, str] = ("<parameter=", ">", "</parameter>")
    typed: tuple[str, str] | None = None
    """What stands after a parameter's name instead, where that says whether the value is a string or JSON."""
    cdata: bool = False
    """A value may stand in <![CDATA[…]]>."""

    @property
    def openers(self) -> Sequence[str]:
        return tuple(filter(None, (self.opener, self.function[0])))

    @property
    def markers(self) -> Sequence[str]:
        around = filter(None, (self.opener, self.closer))
        return (*around, *self.function, *self.parameter, *(self.typed or ()))

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        if opener != self.opener:
            name, arguments = yield from self._function(reader)
            reader.tool_call(name, arguments)
            return
        yield from reader.space()
        yield from reader.expect(self.function[0])
        while True:
            name, arguments = yield from self._function(reader)
            if (yield from reader.closed_by(self.closer)):
                reader.tool_call(name, arguments)
                return
            if (yield from reader.sees(self.function[0])) is None:
                raise Malformed
            reader.tool_call(name, arguments)
            yield from reader.expect(self.function[0])

    def _function(self, reader: Reader) -> Steps[tuple[str, str]]:
        """After what stands before its name."""
        _, after_name, end = self.function
        name = yield from reader.name()
        yield from reader.expect(after_name)
        yield from reader.space()
        if (yield from reader.sees("{")) is not None:
            arguments = check_json((yield from reader.bracketed("json")))
            json_members(arguments)
            yield from reader.space()
            yield from reader.expect(end)
            return name, arguments
        values = {}
        while (yield from reader.expect(self.parameter[0], end)) != end:
            key, value = yield from self._parameter(reader, name)
            values[key] = value
        return name, "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {values[key]}" for key in values) + "}"

    def _parameter(self, reader: Reader, function: str) -> Steps[tuple[str, str]]:
        """Its name and its value in JSON; the cursor stands at the next parameter or at the function's end."""
        before, after_name, end = self.parameter
        name = yield from reader.name()
        after = yield from reader.expect(*(self.typed or (after_name,)))
        begin = reader.at
        while True:
            yield from reader.until(end)
            stop = reader.at - len(reader.marks.encode(end))
            yield from reader.space()
            if (yield from reader.sees(before, self.function[2])) is not None:
                break  # else the end marker is a part of the value
        value = reader.marks.decode(reader.text[begin:stop]).removeprefix("\n").removesuffix("\n")
        if self.cdata and value.startswith("<![CDATA[") and value.endswith("]]>"):
            value = value.removeprefix("<![CDATA[").removesuffix("]]>")
        if self.typed is None:
            return name, text_argument(value, reader.schema(function, name))
        if after == self.typed[0]:
            return name, json.dumps(value, ensure_ascii=False)
        return name, check_json(value.strip())
