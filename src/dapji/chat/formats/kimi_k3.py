"""Whole answers of Kimi K3: elements for reasoning, response and tool calls, in control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dapji.chat.formats.arguments import arguments_of, check_plain_name, in_order, string_patterns
from dapji.chat.formats.parser import WholeAnswers
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import CONTENT, Form, Rules, Wanted
from dapji.chat.formats.values import check_json, json_members, types_of

_OPEN, _CLOSE, _SEPARATOR = "<|open|>", "<|close|>", "<|sep|>"
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def _begin(element: str) -> str:
    return f"{_OPEN}{element}{_SEPARATOR}"


def _end(element: str) -> str:
    return f"{_CLOSE}{element}{_SEPARATOR}"


@dataclass(frozen=True, kw_only=True)
class KimiK3(WholeAnswers):
    """`<|open|>think<|sep|>…<|close|>think<|sep|>`, likewise `response`, and `tools` with a `call` for each call."""

    within: str | None = None
    """The element that the prompt has opened."""

    @property
    def markers(self) -> Sequence[str]:
        return (_OPEN, _CLOSE, _SEPARATOR)

    def after(self, prompt: str) -> KimiK3:
        return replace(
            self, within=next((name for name in ("think", "response") if prompt.endswith(_begin(name))), None)
        )

    def answer(self, rules: Rules, wanted: Wanted) -> str:
        end = rules.text(_end("message"))
        message_end = f"({end})?"
        calls = f"{self._written_calls(rules, wanted)} {message_end}" if wanted.tools else ""
        response_end = rules.text(_end("response"))
        if wanted.content:
            response = f"{CONTENT} {response_end} {message_end}"
        else:
            rest = f"({calls} | {message_end})" if calls else message_end
            response = rules.until(Form(opener=_end("response"), rest=rest))
        answers = [] if wanted.required else [rules.text(_begin("response")) + f" {response}"]
        answers += [calls] if calls else []
        answer = rules.one_of(answers)
        thought = rules.until(Form(opener=_end("think"), rest=answer))
        if self.within == "think":
            return thought
        if self.within == "response" and not wanted.required:
            return response
        if self.within == "response":
            return f"{response_end} {calls}"
        return f"({rules.text(_begin('think'))} {thought} | {answer})"

    @staticmethod
    def _written_calls(rules: Rules, wanted: Wanted) -> str:
        number = rules.terminal("/[0-9]{1,3}/")
        calls = []
        for name, schema in wanted.tools.items():
            check_plain_name(name)
            written = []
            for argument in arguments_of(name, schema):
                check_plain_name(argument.name)
                types = types_of(argument.schema, argument.schema)
                begin = f"{rules.text(_OPEN)} {rules.literal(f'argument key={chr(34)}{argument.name}{chr(34)} type=')}"
                if types == {"string"} and string_patterns(argument) == [[]]:
                    value = rules.until(Form(opener=_end("argument"), rest=""))
                    kinds = ["string"]
                else:
                    value = f"{rules.json(argument.schema, argument.where)} {rules.text(_end('argument'))}"
                    kinds = sorted(types - {"string"} or {"object"})
                kind = rules.one_of(rules.literal(f'"{kind}"') for kind in kinds)
                written.append((f"{begin} {kind} {rules.text(_SEPARATOR)} {value}", argument.required))
            tool = rules.literal(f'call tool="{name}" index="')
            calls.append(
                f'{rules.text(_OPEN)} {tool} {number} "\\"" {rules.text(_SEPARATOR)} {in_order(rules, written)} '
                f"{rules.text(_end('call'))}"
            )
        elements = rules.one_of(calls) + ("+" if wanted.parallel else "")
        return f"{rules.text(_begin('tools'))} {elements} {rules.text(_end('tools'))}"

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
