"""Tool calls as elements with the values as plain text: Qwen3-Coder, Seed-OSS, MiniMax M2, DeepSeek V3.2 and more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.arguments import Argument, arguments_of, check_plain_name, in_order, string_patterns, text_value
from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import Form, Rules, Wanted
from dapji.chat.formats.values import check_json, json_members, text_argument, types_of


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

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        before, after, end = self.function
        functions = []
        for name, schema in wanted.tools.items():
            check_plain_name(name)
            whole = f"{rules.json(schema, f'tool {name!r}')} {rules.space}"
            written = [(self._written(rules, argument), argument.required) for argument in arguments_of(name, schema)]
            arguments = f"{rules.space} ({in_order(rules, written)} | {whole})"
            functions.append(f"{rules.literal(name)} {rules.text(after)} {arguments} {rules.text(end)}")
        function = rules.one_of(functions)
        if self.opener is None:
            return [Form(opener=before, rest=function)]
        more = f"({rules.space} {rules.text(before)} {function})*" if wanted.parallel else ""
        closer = f"{rules.space} {rules.text(self.closer or '')}"
        whole = f"{rules.space} {rules.text(before)} {function} {more} {closer}"
        return [Form(opener=self.opener, rest=whole), Form(opener=before, rest=function)]

    def _written(self, rules: Rules, argument: Argument) -> str:
        before, after, end = self.parameter
        check_plain_name(argument.name)
        name = f"{rules.text(before)} {rules.literal(argument.name)}"
        if self.typed is None:
            value = text_value(rules, argument, end, newlines=True)
            return f"{name} {rules.text(after)} {value} {rules.space}"
        as_string, as_json = self.typed
        if types_of(argument.schema, argument.schema) == {"string"} and string_patterns(argument) == [[]]:
            return f"{name} {rules.text(as_string)} {rules.until(Form(opener=end, rest=''))} {rules.space}"
        value = rules.json(argument.schema, argument.where)
        return f"{name} {rules.text(as_json)} {value} {rules.text(end)} {rules.space}"

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
