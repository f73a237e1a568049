"""/v1/messages, asked by Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import httpx
import pytest
from server_running import Running, Start

from dapji.chat.formats import Content, Event, ToolCall
from dapji.errors import UnavailableError
from dapji.model import AsyncReply
from dapji.server import wire
from dapji.server.anthropic.asked import Counted, messages_of
from dapji.server.keys import Keys
from dapji.server.openai.chat import Message, message_of
from tiny import ANSWER

HELLO: Any = [{"role": "user", "content": "안녕"}]
WEATHER: Any = {
    "name": "weather",
    "description": "날씨",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
GREEDY: Any = {"max_tokens": 60, "extra_body": {"temperature": 0.0}}
"""The client has no argument for a temperature any more; the API has."""


def connect(server: Running, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)


@pytest.fixture
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    with connect(server) as connected:
        yield connected


@pytest.fixture
def agent(agents: Running) -> Iterator[anthropic.Anthropic]:
    with connect(agents) as connected:
        yield connected


def told(message: anthropic.types.Message) -> list[dict[str, Any]]:
    return [block.model_dump(exclude={"id", "citations", "caller"}, exclude_none=True) for block in message.content]


def test_a_message(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "answer", "messages": HELLO, "system": "짧게", "max_tokens": 60}
    asked["extra_body"] = {"temperature": 0, "top_p": 0.9, "top_k": 5}
    message = client.messages.create(**asked, metadata={"user_id": "me"})
    assert told(message) == [{"type": "text", "text": ANSWER}]
    assert (message.model, message.stop_reason, message.stop_sequence) == ("answer", "end_turn", None)
    assert message.usage.output_tokens == 8
    counted = client.messages.count_tokens(model="answer", messages=HELLO, system="짧게")
    read = message.usage.cache_read_input_tokens
    assert read is not None
    assert message.usage.input_tokens + read == counted.input_tokens
    again = client.messages.create(**asked).usage
    assert again.cache_read_input_tokens
    assert again.input_tokens + again.cache_read_input_tokens == counted.input_tokens


def test_a_stream_is_the_same_in_parts(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="answer", messages=HELLO, **GREEDY) as stream:
        kinds = [event.type for event in stream if event.type not in ("text", "content_block_delta")]
        message = stream.get_final_message()
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    whole = client.messages.create(model="answer", messages=HELLO, **GREEDY)
    assert message.model_dump(exclude={"id", "usage", "content"}) == whole.model_dump(
        exclude={"id", "usage", "content"}
    )
    assert told(message) == told(whole)
    counted = client.messages.count_tokens(model="answer", messages=HELLO).input_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == counted
    assert message.usage.output_tokens == 8


def test_why_it_ended_is_told(client: anthropic.Anthropic) -> None:
    short = client.messages.create(model="answer", messages=HELLO, max_tokens=2)
    assert short.stop_reason == "max_tokens"
    stopped = client.messages.create(model="answer", messages=HELLO, stop_sequences=["없다", "42"], **GREEDY)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "42")
    assert told(stopped) == [{"type": "text", "text": ANSWER[: ANSWER.index("42")]}]


def test_tools_are_called(agent: anthropic.Anthropic) -> None:
    asked: Any = {"model": "caller", "messages": HELLO, "tools": [WEATHER], "tool_choice": {"type": "auto"}, **GREEDY}
    whole = agent.messages.create(**asked)
    assert told(whole) == [
        {"type": "text", "text": "잠시만요."},
        {"type": "tool_use", "name": "weather", "input": {"city": "서울"}},
    ]
    assert whole.stop_reason == "tool_use"
    with agent.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert told(streamed) == told(whole)
    assert streamed.stop_reason == "tool_use"
    call = streamed.content[1]
    assert isinstance(call, anthropic.types.ToolUseBlock)
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "맑음"}
    history = [*HELLO, {"role": "assistant", "content": streamed.content}, {"role": "user", "content": [result]}]
    counted = agent.messages.count_tokens(model="caller", messages=history, tools=[WEATHER]).input_tokens
    usage = agent.messages.create(**asked | {"messages": history}).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    without = agent.messages.create(**asked | {"tool_choice": {"type": "none"}})
    assert [block["type"] for block in told(without)] == ["text"]


def test_reasoning_stands_apart_and_may_be_turned_off(agent: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    raw = agent.messages.with_raw_response.create(model="thinker", messages=HELLO, thinking=thinking, **GREEDY)
    assert raw.headers["Dapji-Ignored-Fields"] == "thinking.budget_tokens"
    expected = [{"type": "thinking", "thinking": "음, 생각", "signature": ""}, {"type": "text", "text": "42입니다."}]
    assert told(raw.parse()) == expected
    with agent.messages.stream(model="thinker", messages=HELLO, **GREEDY) as stream:
        message = stream.get_final_message()
    assert told(message) == expected
    adaptive: Any = {"type": "adaptive"}
    assert told(agent.messages.create(model="thinker", messages=HELLO, thinking=adaptive, **GREEDY)) == expected
    disabled: Any = {"type": "disabled"}
    off = agent.messages.create(model="thinker", messages=HELLO, thinking=disabled, **GREEDY)
    assert [block["type"] for block in told(off)] == ["text"]
    assert agent.messages.create(model="caller", messages=HELLO, thinking=disabled, **GREEDY).content
    with pytest.raises(anthropic.BadRequestError, match="no place for reasoning"):
        agent.messages.create(model="caller", messages=HELLO, thinking=thinking, **GREEDY)


def test_answers_have_the_format_that_is_asked_for(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"답": {"enum": ["예", "아니오"]}}, "required": ["답"]}
    wanted: Any = {"format": {"type": "json_schema", "schema": schema | {"additionalProperties": False}}}
    message = client.messages.create(model="answer", messages=HELLO, output_config=wanted, max_tokens=300)
    (block,) = told(message)
    assert json.loads(block["text"])["답"] in ("예", "아니오")


def test_a_conversation_is_the_same_as_in_openai_s_form() -> None:
    ours: Any = {
        "system": [
            {"type": "text", "text": "너는 ", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "답지"},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "서울과 "}, {"type": "text", "text": "부산?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "둘", "signature": "x"},
                    {"type": "text", "text": "잠시만요."},
                    {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "서울"}},
                    {"type": "tool_use", "id": "b", "name": "weather", "input": {"city": "부산"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "맑음"}]},
                    {"type": "tool_result", "tool_use_id": "b", "content": "모름", "is_error": True},
                    {"type": "text", "text": "그래서?"},
                ],
            },
        ],
    }  # fmt: skip
    theirs: Any = [
        {"role": "system", "content": "너는 답지"},
        {"role": "user", "content": "서울과 부산?"},
        {
            "role": "assistant",
            "content": "잠시만요.",
            "reasoning_content": "둘",
            "tool_calls": [
                {"id": "a", "function": {"name": "weather", "arguments": '{"city": "서울"}'}},
                {"id": "b", "function": {"name": "weather", "arguments": '{"city": "부산"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "name": "weather", "content": "맑음"},
        {"role": "tool", "tool_call_id": "b", "name": "weather", "content": "Error: 모름"},
        {"role": "user", "content": "그래서?"},
    ]
    expected = [message_of(i, message) for i, message in enumerate(wire.convert(theirs, list[Message])[0])]
    assert messages_of(wire.convert(ours, Counted)[0]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens: Expected `int`, got `null`"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1, got 0"),
        ({"messages": [], "system": "x"}, "at least one message"),
        ({"foo": 1}, "unknown field 'foo'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a call, and there are no tools to call"),
        ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type: Invalid value 'some'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"tools": [WEATHER]}, "no place for tools"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "저는"}]}, "cannot be continued"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            "messages[0].content[0] is an image; this model takes text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "z"}]}]},
            "no tool_use before it has the id 'z'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "z"}]}]},
            "a message of the role 'user' has no thinking block",
        ),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, "context (512 tokens)"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(server: Running, change: dict[str, Any], message: str, stream: bool) -> None:
    asked = {"model": "answer", "messages": HELLO, "max_tokens": 8, "stream": stream, **change}
    answer = httpx.post(f"{server.url}/v1/messages", json=asked)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error"), body
    assert message in body["error"]["message"]


def test_refusals_have_the_protocols_form(
    client: anthropic.Anthropic, server: Running, start_server: Start, keys: Keys
) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no model 'claude' here") as missing:
        client.messages.create(model="claude", messages=HELLO, **GREEDY)
    assert missing.value.type == "not_found_error"
    key, guarded = keys.add("me"), start_server(keys=keys)
    with (
        connect(guarded) as stranger,
        pytest.raises(anthropic.AuthenticationError, match="not known") as unknown,
    ):
        stranger.messages.create(model="answer", messages=HELLO, **GREEDY)
    assert unknown.value.type == "authentication_error"
    with connect(guarded, key) as known:
        answer = known.messages.create(model="answer", messages=HELLO, **GREEDY)
        assert told(answer) == [{"type": "text", "text": ANSWER}]
    assert httpx.get(f"{guarded.url}/v1/messages").json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{server.url}/v1/messages").status_code == 405


def test_models_are_listed_in_the_form_that_is_asked_for(client: anthropic.Anthropic, server: Running) -> None:
    listed = client.models.list()
    assert [model.id for model in listed] == ["answer", "endless"]
    assert listed.data[0].created_at.year >= 2024
    assert client.models.retrieve("endless").type == "model"
    assert [model.id for model in client.models.list(limit=1)] == ["answer", "endless"]  # page after page
    before = client.models.list(limit=1, before_id="endless")
    assert ([model.id for model in before.data], before.has_more) == (["answer"], False)
    for query, name in ({"after_id": "nothing"}, "after_id"), ({"foo": 1}, "foo"):
        with pytest.raises(anthropic.BadRequestError, match=name):
            client.models.list(extra_query=query)
    assert httpx.get(f"{server.url}/v1/models", params={"limit": 1}).status_code == 400
    assert httpx.get(f"{server.url}/v1/models").json()["object"] == "list"


def test_a_slow_stream_pings(client: anthropic.Anthropic, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    events = AsyncReply.events

    async def slow(reply: AsyncReply) -> AsyncIterator[Event]:
        await asyncio.sleep(0.2)
        async for event in events(reply):
            yield event

    monkeypatch.setattr(AsyncReply, "events", slow)
    monkeypatch.setattr(wire, "KEEP_ALIVE", 0.05)
    asked = {"messages": HELLO, "model": "answer", "max_tokens": 60, "temperature": 0}
    raw = httpx.post(f"{server.url}/v1/messages", json={**asked, "stream": True})
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in raw.text
    assert raw.text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')
    with client.messages.stream(model="answer", messages=HELLO, **GREEDY) as stream:
        assert stream.get_final_text() == ANSWER


def test_what_fails_under_way_ends_the_stream_with_an_error(
    client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def events(reply: AsyncReply) -> AsyncIterator[Event]:
        yield Content(text="안")
        raise UnavailableError("the model is gone")

    monkeypatch.setattr(AsyncReply, "events", events)
    with client.messages.stream(model="answer", messages=HELLO, **GREEDY) as stream:
        assert next(stream.text_stream) == "안"
        with pytest.raises(anthropic.APIStatusError, match="the model is gone") as failed:
            next(stream.text_stream)
    assert failed.value.type == "api_error"
    with pytest.raises(anthropic.APIStatusError, match="the model is gone") as whole:
        client.messages.create(model="answer", messages=HELLO, **GREEDY)
    assert whole.value.status_code == 503


@pytest.mark.parametrize(
    ("written", "told_input"),
    [
        ('{"a": 12345678901234567890123, "b": 1.0}', {"a": 12345678901234567890123, "b": 1.0}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('{"a": NaN}', {"INVALID_JSON": '{"a": NaN}'}),
        ('{"a": "\\ud800"}', {"INVALID_JSON": '{"a": "\\ud800"}'}),
    ],
)
def test_the_input_of_a_call_is_an_object(
    client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch, written: str, told_input: dict[str, Any]
) -> None:
    events = AsyncReply.events

    async def calling(reply: AsyncReply) -> AsyncIterator[Event]:
        yield ToolCall(text="", name="f", arguments=written)
        async for event in events(reply):
            yield event

    monkeypatch.setattr(AsyncReply, "events", calling)
    whole = client.messages.create(model="answer", messages=HELLO, **GREEDY)
    assert told(whole)[0] == {"type": "tool_use", "name": "f", "input": told_input}
    with client.messages.stream(model="answer", messages=HELLO, **GREEDY) as stream:
        assert told(stream.get_final_message()) == told(whole)
