"""Which tools an answer calls, and that arguments are valid whatever the model would like to write: three clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from server_running import Running

HELLO: list[Any] = [{"role": "user", "content": "안녕"}]
CITY: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING: Any = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": CITY, "now": NOTHING}
CHAT_TOOLS: Any = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
ITEM_TOOLS: Any = [{"type": "function", "name": n, "parameters": s, "strict": False} for n, s in SCHEMAS.items()]
CLAUDE_TOOLS: Any = [{"name": n, "input_schema": s} for n, s in SCHEMAS.items()]


@pytest.fixture
def client(agents: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{agents.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(agents: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=agents.url, api_key="none", max_retries=0) as client:
        yield client


def check(calls: list[tuple[str, Any]]) -> list[str]:
    """The names of calls with valid arguments."""
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
    return [name for name, _ in calls]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
            },
            {"now"},
        ),
    ],
)
def test_chat(client: openai.OpenAI, choice: Any, expected: set[str], stream: bool) -> None:
    asked: dict[str, Any] = {"model": "caller", "messages": HELLO, "tools": CHAT_TOOLS, "tool_choice": choice}
    asked |= {"parallel_tool_calls": False, "temperature": 2.0, "seed": 4, "extra_body": {"top_k": 50}}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            completion: Any = events.get_final_completion()
    else:
        completion = client.chat.completions.create(**asked)
    (answer,) = completion.choices
    assert answer.finish_reason == "tool_calls"
    assert not answer.message.content
    (called,) = check([(c.function.name, json.loads(c.function.arguments)) for c in answer.message.tool_calls])
    assert called in expected


def test_auto_is_held_to_the_schema_too(client: openai.OpenAI) -> None:
    """The tiny model wants to write a city alone; `days` is required."""
    completion = client.chat.completions.create(
        model="caller", messages=HELLO, tools=CHAT_TOOLS, temperature=0.0, max_tokens=300
    )
    message = completion.choices[0].message
    assert message.content == "잠시만요."
    assert message.tool_calls
    assert check([(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls])[0] == "weather"


def test_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": "caller", "input": "안녕", "tools": ITEM_TOOLS, "temperature": 2.0}
    asked |= {"parallel_tool_calls": False, "extra_body": {"seed": 1, "top_k": 50}}
    forced: Any = {"type": "function", "name": "weather"}
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    for choice, expected in (("required", None), (forced, "weather"), (allowed, "now")):
        response = client.responses.create(**asked, tool_choice=choice)
        calls = [item for item in response.output if item.type == "function_call"]
        assert len(calls) == len(response.output) == 1
        (called,) = check([(call.name, json.loads(call.arguments)) for call in calls])
        assert called == (expected or called)
        assert response.parallel_tool_calls is False
        assert (response.tool_choice if choice == "required" else response.tool_choice.to_dict()) == choice  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "expected"), [({"type": "any"}, None), ({"type": "tool", "name": "now"}, "now")])
def test_messages(claude: anthropic.Anthropic, choice: Any, expected: str | None, stream: bool) -> None:
    asked: Any = {"model": "caller", "messages": HELLO, "tools": CLAUDE_TOOLS, "max_tokens": 900}
    asked |= {"tool_choice": choice | {"disable_parallel_tool_use": True}}
    asked["extra_body"] = {"temperature": 2.0, "top_k": 50}
    if stream:
        with claude.messages.stream(**asked) as events:
            message: Any = events.get_final_message()
    else:
        message = claude.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    (called,) = check([(block.name, block.input) for block in message.content])
    assert called == (expected or called)


def test_reasoning_may_come_before_what_is_required(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["예", "아니오"]}}}
    for effort, thought in (("medium", "음, 생각"), ("none", None)):
        completion: Any = client.chat.completions.create(
            model="thinker", messages=HELLO, response_format=schema, reasoning_effort=effort, temperature=0.0
        )
        message = completion.choices[0].message
        assert json.loads(message.content) in ("예", "아니오")
        assert getattr(message, "reasoning_content", None) == thought


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice names 'x', which is not among"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]},
            "tool 'f': answers cannot be held to the keyword 'not' at /not",
        ),
        ({"tools": [*CHAT_TOOLS, CHAT_TOOLS[0]]}, "two tools are called 'weather'"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tool 'f': answers cannot be held to /allOf: Unsatisfiable schema",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}]},
            "tool 'f': /properties must be an object of schemas",
        ),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, change: Any, message: str) -> None:
    asked: Any = {"model": "caller", "messages": HELLO, "tools": CHAT_TOOLS, "tool_choice": "required"}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**asked | change)
