"""Tool calls as JSON objects after a marker: Hermes, Qwen, EXAONE 4, Granite, Command R7B, older Mistral and more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from dapji.chat.formats.parser import MarkedCalls
from dapji.chat.formats.reader import Malformed, Reader, Steps
from dapji.chat.formats.rules import SPACE, Form, Rules, Wanted, pattern_of
from dapji.chat.formats.values import check_name, json_call, json_members, unwrapped

_FIRST_KEYS = ('"name"', '"type"', '"function"', '"parameters"', '"arguments"', '"id"')
_FENCE = "```"


@dataclass(frozen=True, kw_only=True)
class JsonCalls(MarkedCalls):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>` and its like.

    After the opener stands one object, several, or a list of them. The closer may be missing at the end of an answer.
    """

    keys: tuple[str, str] | None = ("name", "arguments")
    """As models write them; others are read too. None: a call is {name: arguments}."""
    id_key: str | None = None
    """Models write an id, of letters and digits."""
    id_last: bool = False
    """Behind the arguments; else it stands first."""
    listed: bool = False
    """Models write a list."""
    bare: bool = False
    """Small models forget the markers: objects at the beginning of an answer that name tools are calls too, also in a
    block of code."""
    as_written: bool = False
    """Such objects count only where they begin as in `forms`."""

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        calls = rules.one_of(self._object(rules, name, wanted) for name in wanted.tools)
        if self.listed:
            written = f'"[" {rules.space} {several(rules, calls, wanted, ",")} {rules.space} "]"'
        else:
            written = calls if self.closer is None else several(rules, calls, wanted)
        closer = "" if self.closer is None else f"{rules.space} {rules.text(self.closer)}"
        forms = [Form(opener=self.opener, rest=f"{rules.space} {written} {closer}")]
        if self.bare and self.keys is not None:
            more = f"({rules.space} {calls})*" if wanted.parallel else ""
            for fence, end in (("", ""), (f"{_FENCE}(?:json)?{SPACE}", f"{rules.space} {rules.text(_FENCE)}")):
                for name in wanted.tools:
                    begin = SPACE + fence + object_begin([name], self.keys)
                    rest = f"{object_end(rules, name, wanted)} {more} {end}"
                    forms.append(Form(opener=begin, rest=rest, bare=True, last=True))
        return forms

    def _object(self, rules: Rules, name: str, wanted: Wanted) -> str:
        if self.keys is None:
            key = rules.literal(f"{json.dumps(name, ensure_ascii=False)}:")
            return f'"{{" {rules.space} {key} {object_end(rules, name, wanted)}'
        call = call_object(rules, name, wanted, self.keys)
        if self.id_key is None:
            return call
        id = f" {rules.space} ".join([rules.literal(f'"{self.id_key}"'), '":"', rules.terminal('/"[A-Za-z0-9]{1,9}"/')])
        if self.id_last:
            return call.removesuffix('"}"') + f'"," {rules.space} {id} {rules.space} "}}"'
        return f'"{{" {rules.space} {id} {rules.space} "," ' + call.removeprefix('"{"')

    def written(self) -> JsonCalls:
        return replace(self, as_written=True)

    def steps(self, reader: Reader) -> Steps[None]:
        if self.bare:
            with suppress(Malformed):  # then it is text for the reader, which nothing has marked as a call
                yield from self._bare(reader)
            reader.at = 0
        yield from super().steps(reader)

    def _bare(self, reader: Reader) -> Steps[None]:
        yield from reader.space()
        fence = (yield from reader.accept(f"{_FENCE}json", _FENCE)) is not None
        yield from reader.space()
        begin = reader.at
        calls = []
        while (yield from begins_object(reader)):
            reader.at = begin
            calls.append(json_call((yield from reader.bracketed("json")), needs_arguments=True))
            if calls[-1][0] not in reader.schemas or (self.as_written and not self._is_written(reader)):
                raise Malformed
            yield from reader.space()
            begin = reader.at
        reader.at = begin
        if not calls:
            raise Malformed
        if fence:
            yield from reader.expect(_FENCE)
        for call in calls:
            reader.tool_call(*call)
        yield from reader.space()
        if reader.at == len(reader.text):
            reader.markup()

    def _is_written(self, reader: Reader) -> bool:
        begin = f"{SPACE}(?:{_FENCE}(?:json)?{SPACE})?{object_begin(reader.schemas, self.keys)}" if self.keys else ""
        return re.match(begin, reader.text) is not None

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
        if self.keys is not None:
            return json_call(text)
        members = json_members(text)
        if len(members) != 1:
            raise Malformed
        ((name, arguments),) = members.items()
        return check_name(name), unwrapped(arguments), None


def begins_object(reader: Reader) -> Steps[bool]:
    """Whether an object whose first key is one of a call begins at the cursor, which may move."""
    yield from reader.accept("{")
    yield from reader.space()
    return (yield from reader.accept(*_FIRST_KEYS)) is not None


def object_begin(names: Iterable[str], keys: tuple[str, str]) -> str:
    """A regular expression of how the call of one of these tools begins, up to its arguments."""
    name = f"(?:{'|'.join(pattern_of(json.dumps(name, ensure_ascii=False)) for name in names)})"
    parts = (r"\{", f'"{keys[0]}"', ":", name, ",", f'"{keys[1]}"', ":")
    return "".join(part + SPACE for part in parts).removesuffix(SPACE)


def object_end(rules: Rules, name: str, wanted: Wanted) -> str:
    """Arguments and what closes the call."""
    return f'{rules.space} {rules.json(wanted.tools[name], f"tool {name!r}")} {rules.space} "}}"'


def call_object(rules: Rules, name: str, wanted: Wanted, keys: tuple[str, str]) -> str:
    """`{"name": …, "arguments": {…}}`."""
    parts = ("{", f'"{keys[0]}"', ":", json.dumps(name, ensure_ascii=False), ",", f'"{keys[1]}"', ":")
    return f" {rules.space} ".join(map(rules.literal, parts)) + f" {object_end(rules, name, wanted)}"


def several(rules: Rules, call: str, wanted: Wanted, separator: str = "") -> str:
    """One call or, where there may be, several."""
    between = f"{rules.space} {rules.literal(separator)} {rules.space}" if separator else rules.space
    return f"{call} ({between} {call})*" if wanted.parallel else call
