"""Whole answers of gpt-oss: messages in channels, for reasoning, tool calls and the reader.

Format: OpenAI's "Harmony response format".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.arguments import check_plain_name
from dapji.chat.formats.parser import WholeAnswers
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import CONTENT, Form, Rules, Wanted
from dapji.chat.formats.values import json_members

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<\ud800-\udfff]+)")


@dataclass(frozen=True, kw_only=True)
class Harmony(WholeAnswers):
    """`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`.

    The channel `analysis` is reasoning, a message to a function a call, everything else content.
    """

    @property
    def markers(self) -> Sequence[str]:
        return (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS)

    def answer(self, rules: Rules, wanted: Wanted) -> str:
        """A call ends the answer, so there is one at most."""
        notes = rules.one_of(
            rules.text(f"{_CHANNEL}{channel}{_MESSAGE}") + f" {rules.until(Form(opener='<|end|>', rest=''))}"
            for channel in (("analysis", "commentary") if wanted.free else ("analysis",))
        )
        again = f"{notes} {rules.text(_START + 'assistant')}"
        ends = []
        json = f'((" ")? ({rules.text(_CONSTRAIN)})? "json")? {rules.text(_MESSAGE)}'
        for name, schema in wanted.tools.items():
            check_plain_name(name)
            to, channel = rules.literal(f" to=functions.{name}"), rules.text(f"{_CHANNEL}commentary")
            arguments = f"{json} {rules.json(schema, f'tool {name!r}')}"
            ends += [f"{channel} {to} {arguments}", f"{to} {channel} {arguments}"]
        if not wanted.required:
            final = rules.text(f"{_CHANNEL}final")
            if wanted.content:
                ends.append(f"{final} {json} {CONTENT}")
            else:
                text = rules.until(end=True)
                ends.append(f"{final} {rules.text(_MESSAGE)} {text}")
        return f"({again})* {rules.one_of(ends)}"

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
