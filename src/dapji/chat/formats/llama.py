"""Tool calls of Llama 3 and 4: JSON or a list of Python calls, as the whole answer or after a marker.

Format: Meta's model cards and prompt formats for Llama 3.1, 3.2 and 4. Which of the two forms a model takes depends on
its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from dapji.chat.formats.json_calls import begins_object, call_object, object_begin, object_end
from dapji.chat.formats.parser import MarkedCalls
from dapji.chat.formats.pythonic import begins_list, read_list, written_list
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import SPACE, Form, Rules, Wanted, pattern_of
from dapji.chat.formats.values import json_call, python_calls

_KEYS = ("name", "parameters")


@dataclass(frozen=True, kw_only=True)
class LlamaCalls(MarkedCalls):
    """`{"name": …, "parameters": {…}}`, several with `;` between them, or `[f(a=1), g(b="x")]`.

    Built-in tools are called by `<|python_tag|>search.call(query="…")`. An answer that begins like neither form is
    content, JSON whose first key is another one included.
    """

    listed: bool = False
    """Models write the second of the two."""
    as_written: bool = False
    """An answer begins with a call only as in `forms`."""

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        if self.listed:
            whole, ends = written_list(rules, wanted)
            begun = [Form(opener=_list_begin([name]), rest=end, bare=True, last=True) for name, end in ends.items()]
        else:
            call = rules.one_of(call_object(rules, name, wanted, _KEYS) for name in wanted.tools)
            more = f'({rules.space} ";" {rules.space} {call})*' if wanted.parallel else ""
            begun = [
                Form(
                    opener=SPACE + object_begin([name], _KEYS),
                    rest=f"{object_end(rules, name, wanted)} {more}",
                    bare=True,
                    last=True,
                )
                for name in wanted.tools
            ]
            whole = f"{call} {more}"
        closer = "" if self.closer is None else f"{rules.space} {rules.text(self.closer)}"
        return [*begun, Form(opener=self.opener, rest=f"{rules.space} {whole} {closer}", last=True)]

    def written(self) -> LlamaCalls:
        return replace(self, as_written=True)

    def steps(self, reader: Reader) -> Steps[None]:
        yield from reader.space()
        begin = reader.at
        first = yield from reader.sees("{", "[")
        begun = first is not None and (yield from (begins_object if first == "{" else begins_list)(reader))
        if begun and self.as_written:
            reader.at = begin
            begun = yield from self._begins_as_written(reader, first)
        reader.at = begin if begun else 0
        if begun:
            yield from self.attempt(reader, self._objects(reader) if first == "{" else read_list(reader, None))
        yield from super().steps(reader)

    @staticmethod
    def _begins_as_written(reader: Reader, first: str | None) -> Steps[bool]:
        """Whether the answer begins as in `forms`, which is known when all that the brackets hold is there."""
        with suppress(Malformed):
            yield from reader.bracketed("json" if first == "{" else "python")
        pattern = SPACE + object_begin(reader.schemas, _KEYS) if first == "{" else _list_begin(reader.schemas)
        return re.match(pattern, reader.text) is not None

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


def _list_begin(names: Iterable[str]) -> str:
    """A regular expression of how a list of calls of these tools begins."""
    return rf"{SPACE}\[(?:{'|'.join(map(pattern_of, names))})\("
