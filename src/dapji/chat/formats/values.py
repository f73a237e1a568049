"""Arguments of tool calls, from the notations that models use to JSON text. Knows no format and no stream."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from dapji.chat.formats.reader import Malformed
from dapji.chat.schema import MAX_DEPTH, resolved

_DECODER = json.JSONDecoder()
_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character, which escapes can spell and no encoding can write."""
_SPACE = re.compile(r"[ \t\r\n]*")
_NAME_KEYS = ("name", "tool_name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_ID_KEYS = ("id", "tool_call_id")
_STRING = re.compile(r"""(\w*)("{3}|'{3}|["'])((?:\\.|(?!\2).)*)\2""", re.DOTALL)
"""Of Python: its prefix, quotation mark and inside."""
_IN_STRING = re.compile(r"\\(.)|[\n\r\0]", re.DOTALL)
_KNOWN_ESCAPES = "\n\r\\'\"abfnrtvxNuU01234567"
_JSON_NAMES: Mapping[str, object] = {"true": True, "false": False, "null": None}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,),
    "array": (list,), "null": (type(None),),
}  # fmt: skip
"""Of JSON schema."""


def json_call(text: str, *, needs_arguments: bool = False) -> tuple[str, str, str | None]:
    """Name, arguments exactly as written, and id of a call that is one JSON object.

    Its arguments are {} where they are missing and may be; a string that holds an object in JSON is read as that.
    Raises Malformed.
    """
    members = json_members(text)
    names, arguments, ids = (
        [members[key] for key in keys if key in members] for keys in (_NAME_KEYS, _ARGUMENT_KEYS, _ID_KEYS)
    )
    name = check_name(json.loads(names[0]) if names else None)
    if needs_arguments and not arguments:
        raise Malformed
    found = unwrapped(arguments[0]) if arguments else "{}"
    id = json.loads(ids[0]) if ids else None
    return name, found, id if isinstance(id, str) and not _SURROGATE.search(id) else None


def check_name(name: Any) -> str:
    """The name. Raises Malformed where it can be no function's."""
    if not isinstance(name, str) or not name or _SURROGATE.search(name):
        raise Malformed
    return name


def unwrapped(text: str) -> str:
    """JSON as it is, but of a string that holds an object in JSON that object: some models write their arguments so."""
    if text.startswith('"'):
        inner: str = json.loads(text)
        with suppress(Malformed):
            json_members(inner)
            return inner
    return text


def json_members(text: str) -> dict[str, str]:
    """Members of a JSON object, their values as they are written. Raises Malformed where the text is none."""
    try:
        if not isinstance(_DECODER.decode(text), dict):
            raise Malformed
        return dict(_members(text))
    except (ValueError, RecursionError) as error:
        raise Malformed from error


def _members(text: str) -> Iterator[tuple[str, str]]:
    """Of what is known to be an object."""
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # the colon
        _, end = _DECODER.raw_decode(text, at)
        yield key, text[at:end]
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def check_json(text: str) -> str:
    """The text. Raises Malformed where it is no JSON."""
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    return text


def python_calls(text: str) -> list[tuple[str, str]]:
    """Names and arguments of calls with keywords, `f(a=1)` or a list of them, whose values are literals.

    Nothing is evaluated. JSON's true, false and null, and line breaks in strings, are taken too. Raises Malformed.
    """
    text = _STRING.sub(_tidied, text)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_call(call) for call in calls]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed from error


def _tidied(string: re.Match[str]) -> str:
    """A string that Python reads without complaint: line breaks as escapes, unknown escapes as it would read them."""
    prefix, quote, inside = string.groups()
    if "r" in prefix.lower():
        return string[0]

    def escape(found: re.Match[str]) -> str:
        if found[1] is None:
            return f"\\x{ord(found[0]):02x}"
        return found[0] if found[1] in _KNOWN_ESCAPES else "\\" + found[0]

    return prefix + quote + _IN_STRING.sub(escape, inside) + quote


def _call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args:
        raise Malformed
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise Malformed
        arguments[keyword.arg] = _literal(keyword.value)
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return _dotted(node.func), _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", written)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise Malformed


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)):
            return -value if isinstance(sign, ast.USub) else value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            if len(names) < len(keys):
                raise Malformed
            return dict(zip(names, map(_literal, values), strict=True))
    raise Malformed


def text_argument(text: str, schema: Any) -> str:
    """JSON of an argument that is written as plain text: of the schema's types the first that it can be read as.

    A string where the schema says so, does not say, or nothing fits. Python's True, False and None are read too.
    """
    types = types_of(schema, schema)
    if types and types != {"string"}:
        for candidate in (text.strip(), text.strip().lower()):
            candidate = "null" if candidate == "none" else candidate
            try:
                value = json.loads(candidate, parse_constant=_refuse)
            except (ValueError, RecursionError):
                continue
            if any(_fits(value, name) for name in types - {"string"}):
                return candidate
    return json.dumps(text, ensure_ascii=False)


def allows(schema: Any, value: bool | None, root: Any, depth: int = 0) -> bool:
    """Whether a JSON schema, a part of `root`, allows this word. Of its keywords those that numbers and strings have
    say nothing of it."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth == MAX_DEPTH:
        return schema is not False
    named = schema.get("type", list(_TYPES))
    if not any(_fits(value, name) for name in ([named] if isinstance(named, str) else named)):
        return False
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None and not any(each is value for each in values):
        return False
    choices = {key: [allows(e, value, root, depth + 1) for e in schema.get(key, ())] for key in ("anyOf", "oneOf")}
    return all(allows(each, value, root, depth + 1) for each in schema.get("allOf", ())) and all(
        any(found) for key, found in choices.items() if key in schema
    )


def _refuse(name: str) -> NoReturn:
    """NaN and the infinities, which JSON has not."""
    raise ValueError(name)


def types_of(schema: Any, root: Any, depth: int = 0) -> set[str]:
    """Types that a JSON schema, a part of `root`, allows; empty where it does not say."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth == MAX_DEPTH:
        return set()
    named = schema.get("type")
    found = {name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        choices = schema.get(key)
        for choice in choices if isinstance(choices, list) else ():
            found |= types_of(choice, root, depth + 1)
    if not found and isinstance(schema.get("allOf"), list):
        found = next(filter(None, (types_of(each, root, depth + 1) for each in schema["allOf"])), set())
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not found and isinstance(values, list):
        found = {name for value in values for name in _TYPES if _fits(value, name)}
    return found & _TYPES.keys()


def _fits(value: Any, name: str) -> bool:
    if name != "boolean" and isinstance(value, bool):
        return False
    return isinstance(value, _TYPES[name]) or (name == "integer" and isinstance(value, float) and value.is_integer())
