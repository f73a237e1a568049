"""Tool calls as a list of Python calls: Llama 3.2 and 4, LFM 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import python_calls


@dataclass(frozen=True, kw_only=True)
class PythonicCalls(Calls):
    """`[f(a=1), g(b="x")]`: between markers anywhere, and where `bare` as the beginning of an answer too."""

    opener: str
    closer: str
    bare: bool

    @property
    def openers(self) -> Sequence[str]:
        return (self.opener,)

    @property
    def markers(self) -> Sequence[str]:
        return (self.opener, self.closer)

    def steps(self, reader: Reader) -> Steps[None]:
        if self.bare:
            yield from reader.space()
            if (yield from reader.accept("[")) is not None and (yield from self._begins_a_call(reader)):
                reader.at = 0
                try:
                    yield from reader.space()
                    yield from self._list(reader, None)
                except Malformed:
                    reader.content(malformed=True)
            else:
                reader.at = 0
        yield from super().steps(reader)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        yield from self._list(reader, self.closer)

    @staticmethod
    def _begins_a_call(reader: Reader) -> Steps[bool]:
        try:
            yield from reader.space()
            yield from reader.name()
            yield from reader.space()
            yield from reader.expect("(")
        except Malformed:
            return False
        return True

    @staticmethod
    def _list(reader: Reader, closer: str | None) -> Steps[None]:
        calls = python_calls((yield from reader.bracketed("python")))
        if not calls or not (yield from reader.closed_by(closer)):
            raise Malformed
        for name, arguments in calls:
            reader.tool_call(name, arguments)
