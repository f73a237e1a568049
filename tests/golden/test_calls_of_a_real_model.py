"""A small real model's calls: it would write some of them wrong, and cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from dapji.chat.formats import ANY_TOOL, ToolChoice
from dapji.errors import ModelNotFound
from dapji.model import Model, load

WEATHER: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1},
        "unit": {"enum": ["°C", "°F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "from": {"type": "string", "format": "date"},
    },
    "required": ["city", "unit", "days", "from"],
    "additionalProperties": False,
}
BOOK: Any = {
    "type": "object",
    "properties": {"guests": {"type": "array", "items": {"$ref": "#/$defs/guest"}, "minItems": 1, "maxItems": 3}},
    "required": ["guests"],
    "additionalProperties": False,
    "$defs": {
        "guest": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": ["integer", "null"], "minimum": 0}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = {"weather": WEATHER, "book": BOOK}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
QUESTIONS = ["서울 날씨는?", "What is the weather in Paris for the next three weeks?", "Book a table for Kim and Lee."]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    try:
        opened = load("qwen2.5-coder-0.5b", context=2048)
    except ModelNotFound as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("choice", [ToolChoice(required=True), ToolChoice(required=True, parallel=False), ANY_TOOL])
def test_arguments_are_valid(model: Model, choice: ToolChoice) -> None:
    calls = [call for question in QUESTIONS for seed in range(3) for call in called(model, question, choice, seed)]
    assert len(calls) >= (9 if choice.required else 1)
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def called(model: Model, question: str, choice: ToolChoice, seed: int) -> list[tuple[str, Any]]:
    asked: Any = {"tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "seed": seed, "max_tokens": 400}
    reply = model.chat([{"role": "user", "content": question}], **asked)
    text = "".join(reply)
    assert reply.finish is not None
    if choice.required:
        assert not text.strip()
        assert reply.finish.reason == "length" or reply.tool_calls
    if not choice.parallel:
        assert len(reply.tool_calls) <= 1
    return [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]
