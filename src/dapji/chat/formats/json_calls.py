"""Tool calls as JSON objects after a marker: Hermes, Qwen, EXAONE 4, Granite, Command R7B, older Mistral and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import check_name, json_call, json_members, unwrapped


@dataclass(frozen=True, kw_only=True)
class JsonCalls(Calls):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>` and its like.

    After the opener stands one object, several, or a list of them. The closer may be missing at the end of an answer.
    """

    opener: str
    closer: str | None
    name_is_key: bool = False
    """A call is {name: arguments}."""

    @property
    def openers(self) -> Sequence[str]:
        return (self.opener,)

    @property
    def markers(self) -> Sequence[str]:
        return (self.opener,) if self.closer is None else (self.opener, self.closer)

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
