"""Checks of an answer, each made from what a row of an exam says. Knows no models and no files."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from dapji.errors import FormatError, UnavailableError

T = TypeVar("T")
Passes = Callable[[str], bool]

NUMBER = r"(?:(?<!\w)[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][+-]?\d+)?"
"""With a decimal point, and commas between thousands. A minus after a letter or digit is a hyphen."""

SomeTexts = str | list[str]


class Texts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer has to be, or to contain: one of these."""

    text: SomeTexts
    ignore_case: bool = False
    ignore_space: bool = False
    """Any white space is one space."""


class Number(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the last number of an answer has to be; with a unit, the last that has one of these beside it."""

    value: int | float
    tolerance: Annotated[float, msgspec.Meta(ge=0)] = 0
    unit: SomeTexts = msgspec.field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    expected: Any
    """As the row has it."""
    passes: Passes
    """Whether an answer does."""


def make_check(name: str, given: Any) -> Check:
    """name: one of CHECKS. Raises FormatError where `given` is nothing that an answer can be checked against,
    UnavailableError where that takes a library that is not installed."""
    return Check(name=name, expected=given, passes=CHECKS[name](given))


def folded(text: str, *, ignore_case: bool = False, ignore_space: bool = False) -> str:
    """As texts are compared: composed (Unicode's form NFC), without white space at both ends."""
    text = unicodedata.normalize("NFC", text)
    text = " ".join(text.split()) if ignore_space else text.strip()
    return text.casefold() if ignore_case else text


def _exact(given: Any) -> Passes:
    fold, accepted = _accepted("exact", given)
    return lambda answer: fold(answer) in accepted


def _contains(given: Any) -> Passes:
    fold, accepted = _accepted("contains", given)
    return lambda answer: any(text in fold(answer) for text in accepted)


def _accepted(name: str, given: Any) -> tuple[Callable[[str], str], list[str]]:
    """How a text is folded, and the folded texts of which an answer needs one."""
    expected = 'a text, a list of texts, or {"text", "ignore_case", "ignore_space"}'
    texts = _converted(name, {"text": given} if isinstance(given, str | list) else given, Texts, expected)

    def fold(text: str) -> str:
        return folded(text, ignore_case=texts.ignore_case, ignore_space=texts.ignore_space)

    accepted = [fold(text) for text in _listed(texts.text)]
    if not accepted or not all(accepted):
        _fail(name, given, "texts that are not empty")
    return fold, accepted


def _regex(given: Any) -> Passes:
    try:
        pattern = re.compile(_converted("regex", given, str, "a regular expression of Python's"))
    except re.error as error:
        _fail("regex", given, f"a regular expression of Python's: {error}")
    return lambda answer: pattern.search(answer) is not None


def _number(given: Any) -> Passes:
    expected = 'a number, or {"value", "tolerance", "unit"}'
    number = _converted("number", {"value": given} if isinstance(given, int | float) else given, Number, expected)
    if not all(unit.strip() for unit in _listed(number.unit)):
        _fail("number", given, "units that are not empty")
    units = "|".join(map(re.escape, _listed(number.unit)))
    beside = rf"(?<![A-Za-z])(?:{units})\s?(?P<after>{NUMBER})|(?P<before>{NUMBER})\s?(?:{units})(?![A-Za-z])"
    pattern = re.compile(beside if number.unit else rf"(?P<before>{NUMBER})")
    # Decimal, as a float's 1.1 is more than 0.1 away from 1
    value, tolerance = Decimal(str(number.value)), Decimal(str(number.tolerance))

    def passes(answer: str) -> bool:
        found = deque(pattern.finditer(answer), maxlen=1)
        if not found:
            return False
        last = found[0]
        written = last["before"] or last["after"]
        return abs(Decimal(written.replace("−", "-").replace(",", "")) - value) <= tolerance

    return passes


def _schema(given: Any) -> Passes:
    """JSON, and nothing else, that is valid under a schema (draft 2020-12 where `$schema` says no other)."""
    try:
        from jsonschema import exceptions, validators
        from referencing import Registry, Resource
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012, SchemaRegistry
    except ModuleNotFoundError as error:
        raise UnavailableError("the check schema needs jsonschema", hint="pip install 'dapji[eval]'") from error

    if not isinstance(given, Mapping):
        _fail("schema", given, "a JSON schema")
    kind = validators.validator_for(given, default=validators.Draft202012Validator)
    try:
        kind.check_schema(given)
    except exceptions.SchemaError as error:
        _fail("schema", given, f"a JSON schema: {error.json_path}: {error.message}")
    registry: SchemaRegistry = Registry().with_resource(
        "", Resource.from_contents(given, default_specification=DRAFT202012)
    )  # of this schema alone: nothing is fetched
    for key, value in _keywords(given):
        if key == "$ref":
            try:
                registry.resolver().lookup(value)
            except Unresolvable:
                _fail("schema", value, "a `$ref` within the schema")
        elif key == "format" and value not in kind.FORMAT_CHECKER.checkers:
            _fail("schema", value, f"a `format` that can be checked: {', '.join(sorted(kind.FORMAT_CHECKER.checkers))}")
    validator = kind(given, registry=registry, format_checker=kind.FORMAT_CHECKER)

    def passes(answer: str) -> bool:
        try:
            value = json.loads(answer, parse_constant=_no_json)
        except (ValueError, RecursionError):
            return False
        valid: bool = validator.is_valid(value)
        return valid

    return passes


def _keywords(schema: Any) -> Iterator[tuple[str, str]]:
    """Those of a schema and of the schemas in it that have a text. (A property of their name has a schema.)"""
    for key, value in schema.items() if isinstance(schema, Mapping) else enumerate(schema):
        if key in ("const", "enum", "default", "examples"):
            continue
        if isinstance(value, str):
            yield str(key), value
        elif isinstance(value, Mapping | list):
            yield from _keywords(value)


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _converted(name: str, given: Any, kind: type[T], expected: str) -> T:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        _fail(name, given, f"{expected}: {error}")


def _fail(name: str, given: Any, expected: str) -> NoReturn:
    shown = json.dumps(given, ensure_ascii=False)
    raise FormatError(f"{name} is {shown if len(shown) <= 60 else shown[:60] + '…'}, expected {expected}")


CHECKS: Mapping[str, Callable[[Any], Passes]] = {
    "exact": _exact,
    "contains": _contains,
    "regex": _regex,
    "number": _number,
    "schema": _schema,
}
"""What a row may ask of its answer; `grade`, which a model judges, is in `answering`."""
