"""Whole answers of gpt-oss: messages in channels, for reasoning, tool calls and the reader.

Format: OpenAI's "Harmony response format".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.parser import Grammar
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.values import json_members

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<\ud800-\udfff]+)")


@dataclass(frozen=True, kw_only=True)
class Harmony(Grammar):
    """`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`.

    The channel `analysis` is reasoning, a message to a function a call, everything else content.
    """

    @property
    def markers(self) -> Sequence[str]:
        return (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS)

    def steps(self, reader: Reader) -> Steps[None]:
        while not (reader.ended and not reader.text):
            try:
                yield from self._message(reader)
            except Malformed:
                reader.content(malformed=True)

    @staticmethod
    def _message(reader: Reader) -> Steps[None]:
        yield from reader.space()
        header = ""
        if (yield from reader.sees(_START, _CHANNEL, "to=")) is not None:
            header, _ = yield from reader.until(_MESSAGE)
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            yield from reader.space()
            arguments = yield from reader.bracketed("json")
            json_members(arguments)
            yield from reader.closed_by("<|call|>")
            reader.tool_call(recipient[1], arguments)
            return
        if header:
            reader.markup()
        else:  # no header: text for the reader, its white space included
            reader.at = 0
        kind = "reasoning" if "analysis" in header else "content"
        end = yield from reader.pass_until(kind, _START, *_ENDS)
        if end == _START:
            reader.at -= len(reader.marks.encode(_START))
        reader.markup()
