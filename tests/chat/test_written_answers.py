"""Grammars of whole answers: every format's calls, drawn at random, are read again and valid under their schemas.

What published templates write is accepted (test_answers.py has the other direction).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from random_answers import FORMATS_OF_CALLS, Vocabulary

from dapji.chat.formats import AnswerFormat, Content, Event, ToolCall, ToolChoice
from dapji.chat.formats.parser import WholeAnswers
from dapji.chat.grammar import Grammar

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                    "unit": {"enum": ["°C", "°F"]},
                    "where": {"$ref": "#/$defs/place"},
                    "note": {"type": ["string", "null"], "maxLength": 8},
                    "code": {"type": "string", "pattern": "^[a-z]{2,4}$"},
                    "since": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 3}]},
                    "kind": {"enum": ["a", True, None]},
                    "day": {"type": "string", "format": "date"},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
                },
                "required": ["days", "unit"],
                "additionalProperties": False,
                "$defs": {
                    "place": {
                        "type": "object",
                        "properties": {"x": {"type": "number"}, "exact": {"type": "boolean"}},
                        "required": ["x"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {
    "weather": TOOLS[0]["function"]["parameters"],
    "now": {"type": "object", "maxProperties": 0},
}


def markers_of(format: AnswerFormat) -> list[str]:
    parts = [part for part in (format.reasoning, format.calls) if part is not None]
    return sorted({marker.strip() for part in parts for marker in part.markers if marker.strip()})


MARKERS = sorted({m for source in FORMATS_OF_CALLS.values() for m in markers_of(AnswerFormat.of(source))})


def read(format: AnswerFormat, vocabulary: Vocabulary, tokens: Sequence[int], prompt: str) -> list[Event]:
    parser = format.parser(prompt, tools=TOOLS, control=vocabulary.control, written=True)
    spellings = {token: spelling for spelling, token in vocabulary.control.items()}
    events = []
    for is_control, group in itertools.groupby(tokens, key=lambda token: token in spellings):
        run = list(group)
        if is_control:
            events += [event for token in run for event in parser.feed(spellings[token], control=True)]
        else:
            events += parser.feed(bytes(run).decode())
    return events + parser.finish()


@pytest.mark.parametrize("control", [False, True], ids=["letters", "control tokens"])
@pytest.mark.parametrize("name", FORMATS_OF_CALLS)
def test_calls_are_read_again_and_valid(name: str, control: bool) -> None:
    format = AnswerFormat.of(FORMATS_OF_CALLS[name])
    if isinstance(format.reasoning, WholeAnswers) and not control:
        return  # every model with such a format has its markers as control tokens
    vocabulary = Vocabulary(markers_of(format) if control else [])
    n_calls = 0
    for required, parallel in itertools.product((True, False), (True, False)):
        choice = ToolChoice(required=required, parallel=parallel)
        rules = format.grammar(tools=TOOLS, choice=choice, control=vocabulary.control)
        assert rules is not None
        matcher = vocabulary.matcher(Grammar.answer(rules, None))
        for seed in range(6):
            tokens = vocabulary.draw(matcher, seed, markers=MARKERS)
            if tokens is None:
                continue
            events = read(format, vocabulary, tokens, "")
            told = "".join(event.text for event in events), events
            calls = [event for event in events if isinstance(event, ToolCall)]
            n_calls += len(calls)
            for call in calls:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            assert not any(isinstance(event, Content) and event.malformed for event in events), told
            assert len(calls) <= 1 or parallel, told
            if required:
                assert calls, told
                assert not any(isinstance(event, Content) and event.text.strip() for event in events), told
    assert n_calls >= 4


@pytest.mark.parametrize(
    ("argument", "value", "valid"),
    [
        ("since", "ab", True),
        ("since", "7", True),
        ("since", "1", False),  # read as a number, which is too small
        ("since", "abcd", False),
        ("kind", "a", True),
        ("kind", "true", True),
        ("kind", "null", True),
        ("kind", "false", False),
        ("note", "None", True),
        ("note", "table", True),
        ("note", "123456789", False),
        ("day", "2024-02-29", True),
        ("day", "2023-02-29", False),
        ("code", "ab", True),
        ("code", "AB", False),
        ("days", "14", True),
        ("days", "15", False),
        ("city", "a\n<b>", True),
    ],
)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen 3 coder", "<tool_call>\n<function=f>\n<parameter={}>\n{}\n</parameter>\n</function>\n</tool_call>"),
        ("glm", "<tool_call>f\n<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"),
        (
            "minimax",
            '<minimax:tool_call><invoke name="f"><parameter name="{}">{}</parameter></invoke></minimax:tool_call>',
        ),
    ],
)
def test_values_as_plain_text(name: str, text: str, argument: str, value: str, valid: bool) -> None:
    schema = {**SCHEMAS["weather"], "required": []}
    rules = AnswerFormat.of(FORMATS_OF_CALLS[name]).grammar(tools=[{"name": "f", "parameters": schema}])
    assert rules is not None
    matcher = Vocabulary().matcher(Grammar.answer(rules, None))
    written = text.format(argument, value).encode()
    assert (matcher.validate_tokens(list(written)) == len(written)) == valid
