"""Tool calls of Llama 3: JSON as the whole answer, or after <|python_tag|>.

Format: Meta's model cards and prompt formats for Llama 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import json_call, python_calls

_TAG = "<|python_tag|>"
_FIRST_KEYS = ('"name"', '"type"', '"function"', '"parameters"', '"arguments"', '"id"')


@dataclass(frozen=True, kw_only=True)
class LlamaCalls(Calls):
    """`{"name": …, "parameters": {…}}`, several with `;` between them.

    Built-in tools are called by `<|python_tag|>search.call(query="…")`. An answer in JSON that begins with another key
    is content.
    """

    @property
    def openers(self) -> Sequence[str]:
        return (_TAG,)

    @property
    def markers(self) -> Sequence[str]:
        return (_TAG,)

    def steps(self, reader: Reader) -> Steps[None]:
        yield from reader.space()
        if (yield from reader.accept("{")) is not None:
            yield from reader.space()
            looks_like_a_call = (yield from reader.accept(*_FIRST_KEYS)) is not None
            reader.at = 0
            if looks_like_a_call:
                try:
                    yield from self._objects(reader)
                except Malformed:
                    reader.content(malformed=True)
        else:
            reader.at = 0
        yield from super().steps(reader)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        if (yield from reader.sees("{")) is not None:
            yield from self._objects(reader)
            return
        while not reader.ended:  # a built-in tool, or a program for one: its end is that of the answer
            yield
        begin, reader.at = reader.at, len(reader.text)
        for name, arguments in python_calls(reader.text[begin:]):
            if not name.endswith(".call"):
                raise Malformed
            reader.tool_call(name.removesuffix(".call"), arguments)

    def _objects(self, reader: Reader) -> Steps[None]:
        while True:
            yield from reader.space()
            name, arguments, _ = json_call((yield from reader.bracketed("json")), needs_arguments=True)
            if reader.schemas and name not in reader.schemas:
                raise Malformed
            reader.tool_call(name, arguments)
            yield from reader.space()
            if (yield from reader.accept(";", ",")) is None and reader.text[reader.at : reader.at + 1] != "{":
                reader.markup()
                return
