"""JSON schemas (draft 2020-12) for llguidance: what it cannot hold an answer to is refused by name, not weakened.

Which keywords it enforces was found by drawing answers at random and validating them (tests/chat/test_json_schemas.py).
Knows no tokens and no formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from dapji.errors import RequestError

MAX_DEPTH = 64
"""Of nested schemas."""
WHITESPACE = r" |\n[ \t]{0,40}"
"""Between JSON's tokens: a space, or a line break with the next line's indentation. Models go on and on with more."""
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_LEAP_YEAR = r"(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|"
    r"02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = rf"(?:[1-9][0-9]{{3}}-{_DAY}|{_LEAP_YEAR}-02-29)"
FORMATS: Mapping[str, str | None] = {
    "date-time": f"^{_DATE}T{_TIME}$", "date": f"^{_DATE}$", "time": f"^{_TIME}$",
    **dict.fromkeys(("duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")),
}  # fmt: skip
"""Patterns of those formats for which llguidance lets too much pass, such as the 30th of February."""
_TYPES = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})
_UNSUPPORTED = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties"}
    | {"additionalItems", "$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary"}
)
_INLINE_FLAGS = re.compile(r"\(\?(?![:=!<])")
"""Rust's regular expressions have them and those of ECMA-262, which are meant, do not."""
_ESCAPES = '"\\bfnrt'
"""Of JSON's escapes those that spell a character in one way."""
_ONE = frozenset({"additionalProperties", "items"})
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_DEFINITIONS = frozenset({"$defs", "definitions"})
_MAPPINGS = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_number(value) and value == int(value) and value >= 0  # type: ignore[call-overload, operator]


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _is_type(value: object) -> bool:
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) and name in _TYPES for name in names) and len(set(names)) == len(names)


_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"one or several of {', '.join(sorted(_TYPES))}"),
    "const": (lambda _: True, ""),
    "enum": (lambda value: isinstance(value, list) and len(value) > 0, "a list with at least one value"),
    "required": (_is_names, "a list of different names"),
    "pattern": (lambda value: isinstance(value, str), "a regular expression"),
    "format": (lambda value: isinstance(value, str), "a name"),
    **dict.fromkeys(("$ref", "$id", "$anchor"), (lambda value: isinstance(value, str), "a text")),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        (_is_count, "an integer >= 0"),
    ),
}
"""Keywords that hold no schemas: what their values must be."""


def prepared(schema: Any, where: str) -> dict[str, Any]:
    """The schema as llguidance is to have it; `where` names it in errors.

    Raises RequestError for what is no schema, and for a keyword that answers cannot be held to, with its JSON pointer.
    """
    walk = _Walk(where)
    found = walk.schema(schema, "")
    found = {} if found is True else found
    if found is False:
        raise RequestError(f"{where}: false allows no value")
    if not _Finite(found).is_finite(found):
        raise RequestError(f"{where}: every value would go on for ever, as '$ref' leads back to itself")
    options = {"whitespace_pattern": WHITESPACE} | ({"json_allowed_escapes": _ESCAPES} if walk.open_names else {})
    return {**found, "$comment": where, "x-guidance": options}


def whole_subschemas(schema: Any, root: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema in a schema, the inner ones first: its JSON pointer, and itself with the definitions of `root`."""
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        below = f"{at}/{_token(key)}"
        if key in _ONE:
            yield from whole_subschemas(value, root, below)
        elif key in _LISTS:
            for i, each in enumerate(value):
                yield from whole_subschemas(each, root, f"{below}/{i}")
        elif key in _MAPPINGS:
            for name, each in value.items():
                yield from whole_subschemas(each, root, f"{below}/{_token(name)}")
    yield at, with_definitions(schema, root)


def resolved(schema: Any, root: Mapping[str, Any], *, once: bool = False) -> Any:
    """The schema that a schema with nothing but a reference within `root` means; any other as it is.

    once: not of that schema in turn."""
    for _ in range(1 if once else MAX_DEPTH):
        if not isinstance(schema, Mapping) or said(schema) != {"$ref"} or not _is_pointer(schema["$ref"]):
            return schema
        found: Any = root
        for part in unquote(schema["$ref"][1:]).split("/")[1:]:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        schema = found
    return schema


def said(schema: Mapping[str, Any]) -> set[str]:
    """The keywords that say something of values."""
    return schema.keys() & (_VALUES.keys() | _ONE | _LISTS | _MAPPINGS) - _DEFINITIONS


def with_definitions(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A part of `root` as a schema of its own, with the definitions that it may refer to."""
    definitions = {key: root[key] for key in _DEFINITIONS if key in root}
    return definitions | ({} if schema is True else dict(schema))


def without_definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in _DEFINITIONS}


class _Walk:
    """Over one schema."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.open_names = False
        """Whether an object has names beside those of its properties: one of these must not be spelled otherwise."""

    def schema(self, schema: Any, at: str, depth: int = 0) -> Any:
        """A copy, of which all is checked. `at`: its JSON pointer."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            self._fail(at, f"must be a JSON schema (an object, true or false), not {_short(schema)}")
        if depth == MAX_DEPTH:
            raise RequestError(f"{self._where}: schemas are nested more than {MAX_DEPTH} deep at {at[:80]}…")
        found: dict[str, Any] = {}
        for key, value in schema.items():
            below = f"{at}/{_token(key)}"
            if key in _ONE:
                found[key] = self.schema(value, below, depth + 1)
            elif key in _LISTS:
                if not isinstance(value, list) or not value:
                    self._fail(below, f"must be a list of schemas, at least one, not {_short(value)}")
                found[key] = [self.schema(each, f"{below}/{i}", depth + 1) for i, each in enumerate(value)]
            elif key in _MAPPINGS:
                if not isinstance(value, Mapping):
                    self._fail(below, f"must be an object of schemas, not {_short(value)}")
                found[key] = {
                    name: self.schema(each, f"{below}/{_token(name)}", depth + 1) for name, each in value.items()
                }
            elif key in _VALUES:
                is_right, told = _VALUES[key]
                if not is_right(value):
                    self._fail(below, f"must be {told}, not {_short(value)}")
                found[key] = int(value) if is_right is _is_count else value
            elif key in _UNSUPPORTED and not self._changes_nothing(key, schema):
                self._unsupported(below)
            # What is left is an annotation, or unknown, which a schema's keywords may be (section 6.5 of the core).
        return self._checked(found, at)

    @staticmethod
    def _changes_nothing(key: str, schema: Mapping[str, Any]) -> bool:
        if key == "uniqueItems":
            return schema[key] is False or schema.get("maxItems") in (0, 1)
        if key in ("then", "else"):
            return "if" not in schema
        if key in ("minContains", "maxContains"):
            return "contains" not in schema
        return False

    def _checked(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        """What depends on values."""
        format = schema.get("format")
        if format is not None and format not in FORMATS:
            self._unsupported(f"{at}/format", f" {format!r}", f"formats: {', '.join(sorted(FORMATS))}")
        if pattern := FORMATS.get(format or ""):
            del schema["format"]
            schema["allOf"] = [*schema.get("allOf", ()), {"pattern": pattern}]
        if _INLINE_FLAGS.search(schema.get("pattern", "")):
            self._fail(f"{at}/pattern", f"must be a regular expression, not {_short(schema['pattern'])}")
        if schema.get("minProperties", 0) > max(1, len(schema.get("required", ()))):
            # The same name twice would count twice.
            self._unsupported(f"{at}/minProperties", " above 1 and the number of required names")
        if "$ref" in schema:
            schema["$ref"] = quote(unquote(schema["$ref"]), safe="#/:?&=~@!$'()*+,;", errors="surrogatepass")
        self.open_names |= bool({"properties", "required", "patternProperties"} & schema.keys()) and (
            schema.get("additionalProperties") is not False or "patternProperties" in schema
        )
        return schema

    def _unsupported(self, at: str, value: str = "", hint: str = "leave it out") -> NoReturn:
        keyword = at.rpartition("/")[2].replace("~1", "/").replace("~0", "~")
        told = f"{self._where}: answers cannot be held to the keyword {keyword!r}{value} at {at}"
        raise RequestError(told, hint=hint)

    def _fail(self, at: str, told: str) -> NoReturn:
        raise RequestError(f"{self._where}: {at or 'the schema'} {told}")


class _Finite:
    """Whether a value of a schema can end, though schemas refer to themselves."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: set[str] = set()
        """References that have finite values."""
        references = _references(root)
        found = {each for each in references if self.is_finite(resolved({"$ref": each}, root, once=True))}
        while found != self._known:
            self._known = found
            found = {each for each in references if self.is_finite(resolved({"$ref": each}, root, once=True))}

    def is_finite(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return True
        if _is_pointer(schema.get("$ref")) and schema["$ref"] not in self._known:
            return False
        if not all(map(self.is_finite, schema.get("allOf", ()))):
            return False
        for key in ("anyOf", "oneOf"):
            if key in schema and not any(map(self.is_finite, schema[key])):
                return False
        if schema.get("type") == "object":
            properties = schema.get("properties", {})
            return all(self.is_finite(properties.get(name)) for name in schema.get("required", ()))
        if schema.get("type") == "array":
            first, least = schema.get("prefixItems", ()), schema.get("minItems", 0)
            rest = schema.get("items") if least > len(first) else None
            return all(map(self.is_finite, first[:least])) and self.is_finite(rest)
        return True


def _references(schema: Any) -> set[str]:
    """All within it."""
    found = {each["$ref"] for _, each in whole_subschemas(schema, {}) if "$ref" in each}
    return set(filter(_is_pointer, found))


def _is_pointer(reference: Any) -> bool:
    """Whether it is a JSON pointer within the same schema."""
    return isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))


def _token(key: str) -> str:
    """As a part of a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
