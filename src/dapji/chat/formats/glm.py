"""Tool calls of GLM 4.5 and later, and of models that took the format over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dapji.chat.formats.arguments import Argument, arguments_of, check_plain_name, in_order, text_value
from dapji.chat.formats.parser import Calls
from dapji.chat.formats.reader import Reader, Steps
from dapji.chat.formats.rules import Form, Rules, Wanted
from dapji.chat.formats.values import text_argument

_OPENER, _CLOSER = "<tool_call>", "</tool_call>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


@dataclass(frozen=True, kw_only=True)
class GlmCalls(Calls):
    """`<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>`, with white space between.

    The closer must be there: without it nobody knows whether another argument was to come.
    """

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        calls = []
        for name, schema in wanted.tools.items():
            check_plain_name(name)
            written = [(self._written(rules, argument), argument.required) for argument in arguments_of(name, schema)]
            calls.append(f"{rules.literal(name)} {rules.space} {in_order(rules, written)}")
        return [Form(opener=_OPENER, rest=f"{rules.space} {rules.one_of(calls)} {rules.text(_CLOSER)}")]

    @staticmethod
    def _written(rules: Rules, argument: Argument) -> str:
        check_plain_name(argument.name)
        name = f"{rules.text(_KEY)} {rules.literal(argument.name)} {rules.text(_KEY_END)}"
        return f"{name} {rules.space} {rules.text(_VALUE)} {text_value(rules, argument, _VALUE_END)} {rules.space}"

    @property
    def openers(self) -> Sequence[str]:
        return (_OPENER,)

    @property
    def markers(self) -> Sequence[str]:
        return (_OPENER, _CLOSER, _KEY, _KEY_END, _VALUE, _VALUE_END)

    def call(self, reader: Reader, opener: str) -> Steps[None]:
        yield from reader.space()
        name = yield from reader.name()
        arguments = []
        yield from reader.space()
        while (yield from reader.expect(_KEY, _CLOSER)) == _KEY:
            key, _ = yield from reader.until(_KEY_END)
            yield from reader.space()
            yield from reader.expect(_VALUE)
            value, _ = yield from reader.until(_VALUE_END)
            key = key.strip()
            arguments.append(f"{json.dumps(key, ensure_ascii=False)}: {text_argument(value, reader.schema(name, key))}")
            yield from reader.space()
        reader.tool_call(name, "{" + ", ".join(arguments) + "}")
