"""Rules of arguments for formats that write them one by one: as plain text, or each as JSON of its own.

What such formats cannot write, a schema with more than properties for example, is refused. Knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapji.chat.formats.reader import PLAIN_NAME
from dapji.chat.formats.rules import Form, Rules, pattern_of
from dapji.chat.formats.values import allows, types_of
from dapji.chat.schema import FORMATS, resolved, said, with_definitions, without_definitions
from dapji.errors import RequestError

_OF_THE_WHOLE = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "enum", "const", "patternProperties", "minProperties", "maxProperties"}
)
_OF_STRINGS = frozenset({"type", "minLength", "maxLength", "pattern", "format"})
_WORDS: Mapping[str, Mapping[str, Any]] = {
    "null": {"null": None, "none": None},
    "boolean": {"true": True, "false": False},
}
_NUMBERS = {
    "integer": "-?(?:0|[1-9][0-9]*)",
    "number": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
}
"""Text that is read as a value of the type, not as a string."""
_FIRST = {"integer": "-0-9", "number": "-0-9", "object": "{", "array": r"\["}


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One of a tool's parameters."""

    name: str
    schema: Mapping[str, Any]
    """With the definitions that it may refer to."""
    required: bool
    where: str
    """Its name in errors."""


def arguments_of(tool: str, schema: Mapping[str, Any]) -> Iterator[Argument]:
    """Of a tool, in order. Raises RequestError where its schema says more than what its properties are."""
    whole = resolved(schema, schema)
    if said := whole.keys() & _OF_THE_WHOLE:
        raise _unwritable(f"tool {tool!r}", f"the keyword {min(said)!r} of all arguments")
    properties = whole.get("properties", {})
    for name in whole.get("required", ()):
        if properties.get(name, False) is False:
            raise _unwritable(f"tool {tool!r}", f"the required {name!r}, which is not among the properties")
    for name, each in properties.items():
        if each is not False:
            given = with_definitions(each, schema)
            required = name in whole.get("required", ())
            yield Argument(name=name, schema=given, required=required, where=f"tool {tool!r}: {name}")


def check_plain_name(name: str) -> None:
    """Raises RequestError for a tool's or an argument's name that no format can write as it is."""
    if not name or not PLAIN_NAME.fullmatch(name):
        raise RequestError(f"this model writes names as they are: {name!r} is empty, or has white space or marks")


def in_order(rules: Rules, written: Sequence[tuple[str, bool]], separator: str = "") -> str:
    """Expressions one after another, each at most once; (expression, whether it must stand there)."""
    if not separator:
        return " ".join(one if required else f"({one})?" for one, required in written)
    first, later = "", ""
    """What may follow nothing, and what an expression before it, from the last one to the first."""
    for one, required in reversed(written):
        begun, nothing = f"{one} {later}", rules.literal("")
        first = rules.one_of([begun] if required else [begun, first or nothing])
        begun = f"{separator} {begun}"
        later = rules.one_of([begun] if required else [begun, later or nothing])
    return first


def text_value(rules: Rules, argument: Argument, end: str, *, newlines: bool = False) -> str:
    """An argument as `text_argument` reads it, up to a marker and with it. newlines: one at both ends is no part of it.

    Raises RequestError.
    """
    schema, closer = argument.schema, rules.text(end)
    types = types_of(schema, schema)
    edge = '("\\n")?' if newlines else ""
    if types and "string" not in types:
        return f"{edge} {rules.json(schema, argument.where)} {edge} {closer}"
    others = types - {"string"}
    strings = string_patterns(argument)
    if not others and strings == [[]]:
        return rules.until(Form(opener=end, rest=""))
    without, found, constrained = [], [], []
    for name in sorted(others):  # what is read as a value of these types is no string, whether it is valid or not
        if name in _WORDS:
            without += [rf"\s*(?i:{word})\s*" for word in _WORDS[name]]
            found += [f"/(?i:{word})/" for word, value in _WORDS[name].items() if allows(schema, value, schema)]
        elif name in _NUMBERS and said(schema) <= _OF_STRINGS:
            without.append(rf"\s*(?:{_NUMBERS[name]})\s*")
            found.append(f"/{_NUMBERS[name]}/")
        else:
            without.append(rf"\s*[{_FIRST[name]}](?s:.*)")
            constrained.append(name)
    if newlines:
        without += [r"\n(?s:.*)", r"(?s:.*)\n"]
    if not rules.is_token(end):
        without.append(f"(?s:.*){pattern_of(end)}(?s:.*)")
    for terms in strings:
        found.append(" & ".join([f"/{term}/" for term in terms or ["(?s:.*)"]] + [f"~/{each}/" for each in without]))
    text = rules.terminal(" | ".join(f"({one})" for one in found))
    if newlines:
        text = rules.terminal(r"/\n?/ " + text + r" /\n?/")
    expression = f"{text} {closer}" if rules.is_token(end) else rules.terminal(f"{text} {closer}")
    if constrained:
        rest = {"allOf": [without_definitions(schema), {"type": constrained}]}
        json = rules.json(with_definitions(rest, schema), argument.where)
        expression = f"({expression} | {edge} {json} {edge} {closer})"
    return expression


def string_patterns(argument: Argument) -> list[list[str]]:
    """The strings that a schema allows: regular expressions, of which all of one of the lists match as a whole.

    Raises RequestError for what no regular expression can say.
    """
    return list(_strings(argument.schema, argument.schema, argument.where))


def _strings(schema: Any, root: Mapping[str, Any], where: str) -> Iterator[list[str]]:
    if schema is True:
        schema = {}
    schema = resolved(schema, root)
    keywords = said(schema)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in keywords:
            choices = schema[key]
            if keywords - {key, "type"} or (key == "allOf" and len(choices) > 1):
                raise _unwritable(where, f"the keyword {key!r} beside others")
            for choice in choices:
                if not (types := types_of(choice, root)) or "string" in types:
                    yield from _strings(choice, root, where)
            return
    if "const" in keywords or "enum" in keywords:
        values = [schema["const"]] if "const" in keywords else schema["enum"]
        strings = [pattern_of(value) for value in values if isinstance(value, str)]
        if keywords - {"const", "enum", "type"}:
            raise _unwritable(where, "const or enum beside other keywords")
        yield [f"(?:{'|'.join(strings)})"]
        return
    terms = []
    if keywords & {"minLength", "maxLength"}:
        least, most = int(schema.get("minLength", 0)), int(schema["maxLength"]) if "maxLength" in schema else ""
        terms.append(f"(?s:.){{{least},{most}}}")
    if "pattern" in keywords:
        terms.append(whole_pattern(schema["pattern"], where))
    if "format" in keywords:
        pattern = FORMATS.get(schema["format"])
        if pattern is None:
            raise _unwritable(where, f"the keyword 'format' {schema['format']!r}")
        terms.append(whole_pattern(pattern, where))
    if "$ref" in keywords:
        raise _unwritable(where, "the keyword '$ref' beside others")
    yield terms


def whole_pattern(pattern: str, where: str) -> str:
    """A schema's pattern, which may match anywhere, as one that matches the whole."""
    begins, ends = pattern.startswith("^"), bool(re.search(r"(?<!\\)(?:\\\\)*\$$", pattern))
    inner = pattern[begins : len(pattern) - ends]
    outside, within = re.sub(r"\\.|\[[^\]]*\]", "", inner), ""
    while within != outside:
        within, outside = outside, re.sub(r"\([^()]*\)", "", outside)
    if (begins or ends) and "|" in outside:
        raise _unwritable(where, "a pattern with ^ or $ and alternatives")
    inner = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", inner)  # as it stands between slashes
    return ("" if begins else "(?s:.*)") + f"(?:{inner})" + ("" if ends else "(?s:.*)")


def _unwritable(where: str, what: str) -> RequestError:
    return RequestError(f"{where}: arguments as this model writes them, one by one, cannot be held to {what}")
