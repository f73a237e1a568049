"""Whole answers of Kimi K3: elements for reasoning, response and tool calls, in control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dapji.chat.formats.parser import Grammar
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import check_json, json_members

_OPEN, _CLOSE, _SEPARATOR = "<|open|>", "<|close|>", "<|sep|>"
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def _begin(element: str) -> str:
    return f"{_OPEN}{element}{_SEPARATOR}"


def _end(element: str) -> str:
    return f"{_CLOSE}{element}{_SEPARATOR}"


@dataclass(frozen=True, kw_only=True)
class KimiK3(Grammar):
    """`<|open|>think<|sep|>…<|close|>think<|sep|>`, likewise `response`, and `tools` with a `call` for each call."""

    within: str | None = None
    """The element that the prompt has opened."""

    @property
    def markers(self) -> Sequence[str]:
        return (_OPEN, _CLOSE, _SEPARATOR)

    @property
    def begins_in_reasoning(self) -> bool:
        return self.within == "think"

    def after(self, prompt: str) -> KimiK3:
        return replace(
            self, within=next((name for name in ("think", "response") if prompt.endswith(_begin(name))), None)
        )

    def steps(self, reader: Reader) -> Steps[None]:
        element = self.within
        while True:
            if element == "tools":
                try:
                    yield from self._calls(reader)
                except Malformed:
                    reader.content(malformed=True)
            elif element is not None:
                kind = "reasoning" if element == "think" else "content"
                if (yield from reader.pass_until(kind, _end(element))) is None:
                    return
            reader.markup()
            begin = yield from reader.pass_until(
                "content", *map(_begin, ("think", "response", "tools")), _end("message")
            )
            if begin is None:
                return
            element = begin.removeprefix(_OPEN).removesuffix(_SEPARATOR) if begin.startswith(_OPEN) else None
            if element != "tools":  # its marker is a part of the first call
                reader.markup()

    def _calls(self, reader: Reader) -> Steps[None]:
        while (yield from reader.expect(f"{_OPEN}call ", _end("tools"))) != _end("tools"):
            name = (yield from self._attributes(reader)).get("tool")
            if not name:
                raise Malformed
            reader.tool_call(name, (yield from self._arguments(reader)))

    def _arguments(self, reader: Reader) -> Steps[str]:
        """To behind the call's end: JSON as it is, or made of one element for each argument."""
        arguments: list[str] = []
        while True:
            what = yield from reader.expect(f"{_OPEN}argument ", f"{_OPEN}json ", _end("call"))
            if what == _end("call"):
                return "{" + ", ".join(arguments) + "}"
            attributes = yield from self._attributes(reader)
            element = what.removeprefix(_OPEN).strip()
            value, _ = yield from reader.until(_end(element))
            if element == "json":
                json_members(value)
                yield from reader.expect(_end("call"))
                return value
            if "key" not in attributes:
                raise Malformed
            written = json.dumps(value, ensure_ascii=False) if attributes.get("type") == "string" else check_json(value)
            arguments.append(f"{json.dumps(attributes['key'], ensure_ascii=False)}: {written}")

    @staticmethod
    def _attributes(reader: Reader) -> Steps[dict[str, str]]:
        text, _ = yield from reader.until(_SEPARATOR)
        return {key: value.replace("&quot;", '"').replace("&amp;", "&") for key, value in _ATTRIBUTE.findall(text)}
