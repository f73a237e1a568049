"""JSON schemas with hard keywords: answers are valid to `jsonschema`, or the schema is refused and the place told."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from random_answers import FORMATS_OF_CALLS, Vocabulary

from dapji.chat.formats import AnswerFormat
from dapji.chat.grammar import Grammar, Grammars
from dapji.errors import RequestError
from dapji.model import load
from tiny import COUNTING, write_tiny

CASES = json.loads((Path(__file__).parent / "json_schemas.json").read_text(encoding="utf-8"))
VALID = [case for case in CASES if "refused" not in case]
REFUSED = [case for case in CASES if "refused" in case]
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


def named(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary()


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    model = load(write_tiny(tmp_path_factory.mktemp("model") / "model.gguf", COUNTING))
    return Grammars(model.tokenizer)


def test_there_are_enough() -> None:
    assert len(VALID) >= 150
    assert {"duration", "hostname", "uri", "date-time"} <= FORMATS.checkers.keys()


@named(VALID)
def test_answers_are_valid(case: Any, vocabulary: Vocabulary) -> None:
    schema = case["schema"]
    matcher = vocabulary.matcher(Grammar.json_schema(schema))
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    whole = [tokens for seed in range(8) if (tokens := vocabulary.draw(matcher, seed)) is not None]
    assert whole
    for tokens in whole:
        validator.validate(json.loads(bytes(tokens)))


@named(REFUSED)
def test_what_cannot_be_enforced_is_named(case: Any, grammars: Grammars) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.start(Grammar.json_schema(case["schema"], "the schema"))
    assert caught.value.message.startswith("the schema: ")
    assert case["refused"] in caught.value.message


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        # The date that a calendar does not have, the second that clocks jump over
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"2100-02-29"'),
        ({"type": "string", "format": "time"}, '"23:59:60Z"'),
        # The name of a property that is spelled otherwise
        ({"properties": {"a": {"const": 1}}, "additionalProperties": {"type": "boolean"}}, r'{"\u0061":true}'),
        ({"properties": {"a": {"const": 1}}, "additionalProperties": {"type": "boolean"}}, '{"b":true,"a":true}'),
        # What a keyword forbids though a plainer one allows it
        ({"oneOf": [{"const": 1}, {"type": "boolean"}]}, "2"),
        ({"type": "integer", "multipleOf": 4, "allOf": [{"multipleOf": 6}]}, "4"),
        ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, "[1,1]"),
    ],
)
def test_what_is_not_valid_cannot_be_written(schema: Any, text: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))
    matcher = vocabulary.matcher(Grammar.json_schema(schema))
    tokens = list(text.encode())
    accepted = matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens)
    assert not (accepted and matcher.is_accepting())


def test_what_is_no_schema_fails_in_one_way_alone(grammars: Grammars) -> None:
    """Parts of schemas replaced by what does not belong there: used or refused, for content and for calls."""
    chance = random.Random(1)
    junk = [None, True, 0, -1.5, 1e308, "", "#", "#/a", [], {}, [[]], {"$ref": "#"}, {"a": 1}, "x" * 200, [1, "type"]]
    refused = 0
    for name in itertools.islice(itertools.cycle(FORMATS_OF_CALLS), 400):
        schema = changed(chance.choice(CASES)["schema"], chance.choice(junk), chance)
        try:
            grammars.start(Grammar.json_schema(schema))
            rules = AnswerFormat.of(FORMATS_OF_CALLS[name]).grammar(tools=[{"name": "f", "parameters": schema}])
            assert rules is not None
            grammars.start(Grammar.answer(rules, None))
        except RequestError:
            refused += 1
    assert 100 < refused < 400


def changed(schema: Any, junk: Any, chance: random.Random) -> Any:
    """With one of its parts replaced."""
    if isinstance(schema, dict | list) and schema and chance.random() < 0.8:
        copy = dict(schema) if isinstance(schema, dict) else list(schema)
        key = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
        copy[key] = changed(copy[key], junk, chance)
        return copy
    return junk
