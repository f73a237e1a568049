"""Tool calls of Llama 3 and 4: JSON or a list of Python calls, as the whole answer or after a marker.

Format: Meta's model cards and prompt formats for Llama 3.1, 3.2 and 4. Which of the two forms a model takes depends on
its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapji.chat.formats.json_calls import begins_object
from dapji.chat.formats.parser import MarkedCalls
from dapji.chat.formats.pythonic import begins_list, read_list
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import json_call, python_calls


@dataclass(frozen=True, kw_only=True)
class LlamaCalls(MarkedCalls):
    """`{"name": …, "parameters": {…}}`, several with `;` between them, or `[f(a=1), g(b="x")]`.

    Built-in tools are called by `<|python_tag|>search.call(query="…")`. An answer that begins like neither form is
    content, JSON whose first key is another one included.
    """

    def steps(self, reader: Reader) -> Steps[None]:
        yield from reader.space()
        begin = reader.at
        first = yield from reader.sees("{", "[")
        begun = first is not None and (yield from (begins_object if first == "{" else begins_list)(reader))
        reader.at = begin if begun else 0
        if begun:
            yield from self.attempt(reader, self._objects(reader) if first == "{" else read_list(reader, None))
        yield from super().steps(reader)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        if self.closer is not None and (yield from reader.accept(self.closer)) is not None:
            yield from reader.space()  # Llama 4's template writes the markers before its JSON
        first = yield from reader.sees("{", "[")
        if first == "{":
            yield from self._objects(reader)
        elif first == "[":
            yield from read_list(reader, self.closer)
        else:
            yield from self._built_in(reader)

    def _built_in(self, reader: Reader) -> Steps[None]:
        """A call of a built-in tool; a program for one is none. Without a closer its end is that of the answer."""
        begin = reader.at
        if self.closer is not None:
            text, _ = yield from reader.until(self.closer)
        else:
            while not reader.ended:
                yield
            text, reader.at = reader.marks.decode(reader.text[begin:]), len(reader.text)
        calls = python_calls(text)
        if not calls or not all(name.endswith(".call") for name, _ in calls):
            raise Malformed
        for name, arguments in calls:
            reader.tool_call(name.removesuffix(".call"), arguments)

    def _objects(self, reader: Reader) -> Steps[None]:
        while True:
            yield from reader.space()
            name, arguments, _ = json_call((yield from reader.bracketed("json")), needs_arguments=True)
            if reader.schemas and name not in reader.schemas:
                raise Malformed
            reader.tool_call(name, arguments)
            yield from reader.space()
            if self.closer is not None and (yield from reader.accept(self.closer)) is not None:
                reader.markup()
                yield from reader.space()
            if (yield from reader.accept(";", ",")) is None and (yield from reader.sees("{")) is None:
                return
