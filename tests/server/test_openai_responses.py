"""/v1/responses, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_running import Running, Start

from dapji.errors import UnavailableError
from dapji.server.keys import Keys
from dapji.server.openai.responses_items import Item, items_of, messages_of
from dapji.server.openai.stored import ResponseStore, Stored
from dapji.server.problem import Problem
from dapji.server.wire import convert
from tiny import ANSWER

ASKED: dict[str, Any] = {"model": "answer", "input": "안녕", "temperature": 0.0}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "날씨",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def agent(agents: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{agents.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, instructions="짧게", metadata={"a": "b"})
    assert response.output_text == ANSWER
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.usage is not None
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    assert response.metadata == {"a": "b"}
    assert response.temperature == 0
    chat = client.chat.completions.create(
        model="answer", messages=[{"role": "system", "content": "짧게"}, {"role": "user", "content": "안녕"}]
    )
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def test_a_stream_tells_every_step(client: openai.OpenAI) -> None:
    events = list(client.responses.create(**ASKED, stream=True))
    names = [event.type.removeprefix("response.") for event in events]
    n_deltas = names.count("output_text.delta")
    assert n_deltas > 3
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * n_deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    last: Any = events[-1]
    assert last.response.output_text == ANSWER
    assert client.responses.retrieve(last.response.id) == last.response


def test_the_clients_own_reading_of_a_stream(agent: openai.OpenAI) -> None:
    with agent.responses.stream(model="thinker", input="안녕", temperature=0.0) as stream:
        for _ in stream:
            pass
        response = stream.get_final_response()
    assert response.output_text == "42입니다."
    assert [item.type for item in response.output] == ["reasoning", "message"]


def test_reasoning_and_its_return(agent: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "thinker", "input": "안녕", "temperature": 0.0}
    response = agent.responses.create(**asked)
    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert (reasoning.content[0].text, response.output_text) == ("음, 생각", "42입니다.")
    assert response.usage is not None
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    streamed = list(agent.responses.create(**asked, stream=True))
    deltas = [event.delta for event in streamed if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "음, 생각"
    again = agent.responses.create(
        **asked
        | {"input": [{"role": "user", "content": "안녕"}, reasoning, message, {"role": "user", "content": "또"}]}
    )
    assert again.output_text == "42입니다."


def test_calls_and_their_outputs(agent: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "caller", "tools": [WEATHER], "temperature": 0.0}
    events = list(agent.responses.create(**asked, input="서울 날씨?", stream=True))
    names = [event.type for event in events]
    start = names.index("response.function_call_arguments.delta")
    assert names[start - 1 : start + 3] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    response = events[-1].response  # type: ignore[union-attr]
    message, call = response.output
    assert message.content[0].text == "잠시만요."
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "서울"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "맑음"}
    follow = agent.responses.create(**asked, previous_response_id=response.id, input=[result])
    sent = agent.responses.create(
        **asked, input=[{"role": "user", "content": "서울 날씨?"}, *response.output, result], store=False
    )
    assert follow.usage is not None
    assert sent.usage is not None
    assert follow.usage.input_tokens == sent.usage.input_tokens


def test_tools_are_told_to_the_model_as_in_a_chat(agent: openai.OpenAI) -> None:
    bare = {key: WEATHER[key] for key in ("name", "description", "parameters")}
    response = agent.responses.create(model="caller", input="x", tools=[WEATHER])
    asked: Any = {"model": "caller", "messages": [{"role": "user", "content": "x"}]}
    chat = agent.chat.completions.create(**asked, tools=[{"type": "function", "function": bare}])
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    told = f"{json.dumps([{'type': 'function', 'function': bare}], ensure_ascii=False)}\n"
    without = agent.chat.completions.create(**asked)
    assert without.usage is not None
    assert chat.usage.prompt_tokens == without.usage.prompt_tokens + len(told.encode())  # a token is a byte here


def test_items_become_the_messages_of_templates() -> None:
    items: Any = [
        {"type": "message", "role": "user", "content": "q"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": ""},
        {"type": "function_call", "call_id": "3", "name": "h", "arguments": "{oops"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "function_call_output", "call_id": "9", "output": "nine"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": "done"},
    ]
    converted, _ = convert(items, list[Item])
    assert messages_of(items_of(converted), "be brief") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}},
                {"id": "3", "type": "function", "function": {"name": "h", "arguments": {"INVALID_JSON": "{oops"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "2", "content": "two", "name": "g"},
        {"role": "tool", "tool_call_id": "9", "content": "nine"},
        {"role": "assistant", "content": "done", "reasoning_content": "so"},
    ]


def test_a_conversation_goes_on_where_it_was_kept(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED)
    second = client.responses.create(**ASKED | {"input": "그래?"}, previous_response_id=first.id)
    third = client.responses.create(**ASKED | {"input": "또?"}, previous_response_id=second.id)
    turns: Any = []
    for text in ("안녕", "그래?", "또?"):
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    sent = client.responses.create(**ASKED | {"input": turns[:-1]}, store=False)
    assert third.usage is not None
    assert sent.usage is not None
    assert third.usage.input_tokens == sent.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response") as caught:
        client.responses.create(**ASKED, previous_response_id=third.id)
    assert caught.value.code == "previous_response_not_found"


def test_what_is_kept_is_told_and_what_is_deleted_is_gone(client: openai.OpenAI, server: Running) -> None:
    inputs: Any = [{"role": "user", "content": f"비밀 {i}"} for i in range(5)]
    response = client.responses.create(**ASKED | {"input": inputs})
    assert client.responses.retrieve(response.id).output_text == ANSWER
    items = list(client.responses.input_items.list(response.id, limit=2, order="asc"))
    assert [item.content[0].text for item in items] == [f"비밀 {i}" for i in range(5)]  # type: ignore[union-attr]
    newest = client.responses.input_items.list(response.id)
    assert newest.data[0].content[0].text == "비밀 4"  # type: ignore[union-attr]
    folder = server.service.settings.folder
    assert "비밀 4".encode() in b"".join(path.read_bytes() for path in folder.glob("responses.db*"))
    client.responses.delete(response.id)
    for path in folder.glob("responses.db*"):
        assert "비밀".encode() not in path.read_bytes()
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            ask(response.id)
    unkept = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_others_do_not_find_it(start_server: Start, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    opening = [keys.add(name) for name in ("me", "you")]
    server = start_server(keys=keys)
    me, you = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in opening)
    with me, you:
        response = me.responses.create(**ASKED)
        for ask in (you.responses.retrieve, you.responses.delete, you.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                ask(response.id)
        with pytest.raises(openai.NotFoundError):
            you.responses.create(**ASKED, previous_response_id=response.id)
        assert me.responses.retrieve(response.id) == response


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**ASKED, max_output_tokens=2, stream=True))
    assert events[-1].type == "response.incomplete"


def test_a_schema_binds_the_text(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    format: Any = {"type": "json_schema", "name": "x", "schema": schema}
    response = client.responses.create(**ASKED | {"temperature": 1.0}, text={"format": format})
    assert json.loads(response.output_text).keys() == {"a"}


def test_what_cannot_be_kept_fails_before_it_is_called_complete(start_server: Start) -> None:
    server = start_server()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        client.responses.create(**ASKED)
        db = sqlite3.connect(server.service.settings.folder / "responses.db")
        db.execute("DROP TABLE responses")
        db.close()
        events = list(client.responses.create(**ASKED, stream=True))
        last: Any = events[-1]
        assert last.type == "response.failed"
        assert "no such table" in last.response.error.message
        with pytest.raises(openai.InternalServerError, match="ask with store false") as caught:
            client.responses.create(**ASKED)
        assert caught.value.status_code == 503


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"foo": 1}, "foo", "unknown field"),
        ({"background": True}, "background", "Invalid enum value True"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "Invalid value 'web_search'"),
        ({"tool_choice": "required"}, None, "tool_choice asks for a call, and there are no tools to call"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "Invalid value 'web_search'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "Invalid value 'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
            "input[0].content[0].type",
            "Invalid value 'input_image'",
        ),
        ({"reasoning": {"effort": "high"}}, None, "no efforts of reasoning, so 'high' cannot be asked for"),
        ({"reasoning": {"effort": "minimal"}}, "reasoning.effort", "Invalid enum value 'minimal'"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "unknown field"),
        ({"conversation": "x"}, "conversation", "unknown field"),
        ({"truncation": "auto"}, "truncation", "Invalid enum value 'auto'"),
        ({"input": []}, None, "at least one message"),
    ],
)
def test_what_is_wrong_is_named(server: Running, change: dict[str, Any], field: str | None, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/responses", json=ASKED | change)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert message in error["message"]
    assert error["param"] == field


def test_queries_that_we_do_not_know_are_refused(server: Running, client: openai.OpenAI) -> None:
    name = client.responses.create(**ASKED).id
    for query in ("stream=true", "include=x"):
        assert httpx.get(f"{server.url}/v1/responses/{name}?{query}").status_code == 400
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=x", "include=x"):
        assert httpx.get(f"{server.url}/v1/responses/{name}/input_items?{query}").status_code == 400


STORED = Stored(body={"id": "resp_1", "output": [], "previous_response_id": None}, input=[])


def test_what_was_kept_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio, os, signal
from pathlib import Path
from dapji.server.openai.stored import ResponseStore, Stored
store = ResponseStore(Path({str(tmp_path)!r}))
stored = Stored(body={{"id": "resp_1", "output": [], "previous_response_id": None}}, input=[])
asyncio.run(store.put("me", stored))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    store = ResponseStore(tmp_path)
    assert asyncio.run(store.get("me", "resp_1")) == STORED
    with pytest.raises(Problem, match="there is no response 'resp_1' here"):
        asyncio.run(store.get("you", "resp_1"))
    assert store.path.stat().st_mode & 0o077 == 0
    store.close()


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path)
    store.path.write_bytes(b"no database" * 100)
    with pytest.raises(UnavailableError, match=r"responses\.db: file is not a database"):
        asyncio.run(store.put("me", STORED))
    store.path.unlink()
    asyncio.run(store.put("me", STORED))
    store.close()
    db = sqlite3.connect(store.path)
    db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(UnavailableError, match="written by a newer version"):
        asyncio.run(ResponseStore(tmp_path).get("me", "resp_1"))
