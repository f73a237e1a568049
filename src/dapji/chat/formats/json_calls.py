"""Tool calls as JSON objects after a marker: Hermes, Qwen, EXAONE 4, Granite, Command R7B, older Mistral and more."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from dapji.chat.formats.parser import MarkedCalls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import check_name, json_call, json_members, unwrapped

_FIRST_KEYS = ('"name"', '"type"', '"function"', '"parameters"', '"arguments"', '"id"')
_FENCE = "```"


@dataclass(frozen=True, kw_only=True)
class JsonCalls(MarkedCalls):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>` and its like.

    After the opener stands one object, several, or a list of them. The closer may be missing at the end of an answer.
    """

    name_is_key: bool = False
    """A call is {name: arguments}."""
    bare: bool = False
    """Small models forget the markers: objects at the beginning of an answer that name tools are calls too, also in a
    block of code."""

    def steps(self, reader: Reader) -> Steps[None]:
        if self.bare:
            with suppress(Malformed):  # then it is text for the reader, which nothing has marked as a call
                yield from self._bare(reader)
            reader.at = 0
        yield from super().steps(reader)

    @staticmethod
    def _bare(reader: Reader) -> Steps[None]:
        yield from reader.space()
        fence = (yield from reader.accept(f"{_FENCE}json", _FENCE)) is not None
        yield from reader.space()
        begin = reader.at
        calls = []
        while (yield from begins_object(reader)):
            reader.at = begin
            calls.append(json_call((yield from reader.bracketed("json")), needs_arguments=True))
            if calls[-1][0] not in reader.schemas:
                raise Malformed
            yield from reader.space()
            begin = reader.at
        reader.at = begin
        if not calls:
            raise Malformed
        if fence:
            yield from reader.expect(_FENCE)
        for call in calls:
            reader.tool_call(*call)
        yield from reader.space()
        if reader.at == len(reader.text):
            reader.markup()

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        in_list = (yield from reader.accept("[")) is not None
        while True:
            yield from reader.space()
            call = self._call((yield from reader.bracketed("json")))
            if in_list:
                yield from reader.space()
                in_list = (yield from reader.expect(",", "]")) == ","
                if in_list:
                    reader.tool_call(*call)
                    continue
            if (yield from reader.closed_by(self.closer)):
                reader.tool_call(*call)
                return
            if reader.text[reader.at] != "{":
                raise Malformed
            reader.tool_call(*call)

    def _call(self, text: str) -> tuple[str, str, str | None]:
        if not self.name_is_key:
            return json_call(text)
        members = json_members(text)
        if len(members) != 1:
            raise Malformed
        ((name, arguments),) = members.items()
        return check_name(name), unwrapped(arguments), None


def begins_object(reader: Reader) -> Steps[bool]:
    """Whether an object whose first key is one of a call begins at the cursor, which may move."""
    yield from reader.accept("{")
    yield from reader.space()
    return (yield from reader.accept(*_FIRST_KEYS)) is not None
