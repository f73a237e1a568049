"""What passes a check and what does not, and what is no check."""

from __future__ import annotations

from typing import Any

import pytest

from dapji.errors import FormatError
from dapji.evaluation.checks import make_check

DATE = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}
LIST = {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}}
HANGUL = "\u1112\u1161\u11ab"
"""한, spelled letter by letter."""


@pytest.mark.parametrize(
    ("name", "given", "passes", "fails"),
    [
        ("exact", "Seoul", ["Seoul", " Seoul\n"], ["seoul", "Seoul.", ""]),
        ("exact", ["yes", "예"], ["yes", "예"], ["yes 예"]),
        ("exact", "한", [HANGUL], []),
        ("exact", {"text": "New York", "ignore_case": True, "ignore_space": True}, ["new\n york"], ["newyork"]),
        ("contains", "45 days", ["within 45 days."], ["45  days", "45 Days"]),
        ("contains", {"text": ["45 days", "six weeks"], "ignore_case": True}, ["Six weeks", "45 DAYS"], ["weeks"]),
        ("regex", "^[A-D]$", ["A"], ["AB", " A", "E"]),
        ("regex", "(?i)a.c", ["xABCx"], ["ac"]),
        ("number", 4, ["2 + 2 is 4.", "4", "4.0", "2+2=4"], ["5", "4 and 5", "", "44", "-4"]),
        ("number", 1234567.5, ["1,234,567.5", "1234567.5 km"], ["1,234,567", "567.5"]),
        ("number", -3, ["it is -3", "−3", "(-3)"], ["3", "10-3"]),
        ("number", 7, ["10-7"], ["10 -7"]),
        ("number", 0.5, [".5", "5e-1"], ["0,5"]),
        ("number", {"value": 1, "tolerance": 0.1}, ["1.1", "0.9"], ["1.1001", "0.89"]),
        ("number", {"value": 45, "unit": ["days", "일"]}, ["45 days, 3 boxes", "45일입니다"], ["45", "45 boxes"]),
        ("number", {"value": 5, "unit": "m"}, ["5 m and 9 min", "5m."], ["5 min"]),
        ("number", {"value": 5, "unit": "$"}, ["$5 for 2", "5$"], ["5"]),
        ("schema", DATE, ['{"day": "2028-02-29"}', ' {"day": "2026-01-01", "more": 1}\n'], ['{"day": "2026-02-29"}']),
        ("schema", DATE, [], ["{}", "", "day", '```json\n{"day": "2028-02-29"}\n```', "[" * 100_000]),
        ("schema", LIST, ["[]", "[1, 2]", "[1.0]"], ['["1"]', "[1] [2]"]),
        ("schema", {"type": "number"}, ["1"], ["NaN", "Infinity"]),
    ],
)
def test_answers(name: str, given: Any, passes: list[str], fails: list[str]) -> None:
    check = make_check(name, given)
    for answer in passes:
        assert check.passes(answer), answer
    for answer in fails:
        assert not check.passes(answer), answer


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("exact", 4, 'exact is 4, expected a text, a list of texts, or {"text", "ignore_case", "ignore_space"}'),
        ("exact", " ", 'exact is " ", expected texts that are not empty'),
        ("contains", [], "contains is [], expected texts that are not empty"),
        ("contains", {"text": "a", "case": False}, "unknown field `case`"),
        ("regex", "(", 'regex is "(", expected a regular expression of Python\'s: missing )'),
        ("number", "4", 'number is "4", expected a number, or {"value", "tolerance", "unit"}'),
        ("number", True, "Expected `int | float`, got `bool`"),
        ("number", {"value": 1, "tolerance": -1}, "Expected `float` >= 0"),
        ("number", {"value": 1, "unit": ""}, "expected units that are not empty"),
        ("schema", "object", 'schema is "object", expected a JSON schema'),
        ("schema", {"type": "objekt"}, "expected a JSON schema: $.type: 'objekt' is not valid"),
        ("schema", {"$ref": "#/$defs/n"}, 'schema is "#/$defs/n", expected a `$ref` within the schema'),
        ("schema", {"$ref": "https://example.com/schema"}, "expected a `$ref` within the schema"),
        ("schema", {"items": {"format": "postcode"}}, 'schema is "postcode", expected a `format` that can be checked'),
    ],
)
def test_mistakes(name: str, given: Any, message: str) -> None:
    with pytest.raises(FormatError) as raised:
        make_check(name, given)
    assert message in raised.value.message
