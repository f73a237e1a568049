"""Tool calls of Gemma 4: like JSON, with a control token for the quotation marks and keys that have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import MAX_DEPTH, Malformed, Reader, Steps
from dapji.chat.formats.values import check_json

_OPENER, _CLOSER, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'


@dataclass(frozen=True, kw_only=True)
class GemmaCalls(Calls):
    """`<|tool_call>call:f{x:<|"|>text<|"|>,y:[1,true]}<tool_call|>`."""

    @property
    def openers(self) -> Sequence[str]:
        return (_OPENER,)

    @property
    def markers(self) -> Sequence[str]:
        return (_OPENER, _CLOSER, _QUOTE)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.expect("call:")
        name = yield from reader.name()
        if (yield from reader.sees("{")) is None:
            raise Malformed
        arguments = yield from self._value(reader, MAX_DEPTH)
        if not (yield from reader.closed_by(_CLOSER)):
            raise Malformed
        reader.tool_call(name, arguments)

    def _value(self, reader: Reader, depth: int) -> Steps[str]:
        """JSON of the value at the cursor."""
        if not depth:
            raise Malformed
        yield from reader.space()
        begins = yield from reader.accept(_QUOTE, "{", "[")
        if begins == _QUOTE:
            text, _ = yield from reader.until(_QUOTE)
            return json.dumps(text, ensure_ascii=False)
        if begins is None:
            word = yield from reader.name()
            return "null" if word == "None" else check_json(word)
        end = "}" if begins == "{" else "]"
        items: list[str] = []
        yield from reader.space()
        if (yield from reader.accept(end)) is None:
            while True:
                key = (yield from self._key(reader)) + ": " if begins == "{" else ""
                items.append(key + (yield from self._value(reader, depth - 1)))
                yield from reader.space()
                if (yield from reader.expect(",", end)) == end:
                    break
        return begins + ", ".join(items) + end

    @staticmethod
    def _key(reader: Reader) -> Steps[str]:
        yield from reader.space()
        if (yield from reader.accept(_QUOTE)) is not None:
            key, _ = yield from reader.until(_QUOTE)
            yield from reader.space()
            yield from reader.expect(":")
        else:
            key, _ = yield from reader.until(":")
        return json.dumps(key.strip(), ensure_ascii=False)
