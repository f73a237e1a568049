"""/api, asked by Ollama's own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import ollama
import pytest
from server_running import Running, Start

from dapji import __version__
from dapji.chat.formats import Content, Event, ToolCall
from dapji.errors import UnavailableError
from dapji.model import AsyncReply
from dapji.server.keys import Keys
from tiny import ANSWER

HELLO: Any = [{"role": "user", "content": "안녕"}]
GREEDY: Any = {"temperature": 0.0, "num_predict": 60}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "날씨",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def client(server: Running) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as connected:
        yield connected


@pytest.fixture
def agent(agents: Running) -> Iterator[ollama.Client]:
    with ollama.Client(host=agents.url) as connected:
        yield connected


def n_prompt(server: Running, messages: Any) -> int:
    """As OpenAI's endpoint counts the same conversation."""
    asked = {"model": "answer", "messages": messages, "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked).json()
    count: int = answer["usage"]["prompt_tokens"]
    return count


def test_an_answer(client: ollama.Client, server: Running) -> None:
    answer = client.chat("answer", HELLO, options=GREEDY)
    assert (answer.message.role, answer.message.content, answer.message.tool_calls) == ("assistant", ANSWER, None)
    assert (answer.model, answer.done, answer.done_reason, answer.eval_count) == ("answer", True, "stop", 8)
    assert answer.prompt_eval_count == n_prompt(server, HELLO)
    parts = (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert answer.total_duration is not None
    assert all(part is not None and 0 < part < 10**10 for part in parts)
    assert answer.total_duration >= sum(part for part in parts[1:] if part is not None)
    assert client.chat("answer", HELLO, options={"num_predict": 2}).done_reason == "length"


def test_a_stream_is_the_same_in_parts(client: ollama.Client, server: Running) -> None:
    parts = list(client.chat("answer", HELLO, options=GREEDY, stream=True))
    assert len(parts) > 3
    assert "".join(part.message.content or "" for part in parts) == ANSWER
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("stop", 8)
    raw = httpx.post(f"{server.url}/api/chat", json={"messages": HELLO, "options": GREEDY})
    assert raw.headers["content-type"] == "application/x-ndjson"
    assert json.loads(raw.text.splitlines()[-1])["done"]


def test_a_prompt_is_a_message_unless_it_is_raw(client: ollama.Client, server: Running) -> None:
    answer = client.generate("answer", "안녕", system="짧게", options=GREEDY)
    assert (answer.response, answer.done_reason) == (ANSWER, "stop")
    assert answer.prompt_eval_count == n_prompt(server, [{"role": "system", "content": "짧게"}, *HELLO])
    assert (
        "".join(part.response or "" for part in client.generate("answer", "안녕", options=GREEDY, stream=True))
        == ANSWER
    )
    raw = client.generate("answer", "안녕\n", raw=True, options=GREEDY)
    assert (raw.response, raw.prompt_eval_count) == (ANSWER, len("안녕\n".encode()))


def test_an_empty_request_opens_the_model(start_server: Start) -> None:
    server = start_server()
    with ollama.Client(host=server.url) as client:
        assert client.ps().models == []
        assert client.generate("endless", keep_alive="5m").done_reason == "load"
        (opened,) = client.ps().models
        assert (opened.name, opened.context_length) == ("endless", 512)
        assert client.chat("answer").done_reason == "load"
        assert len(client.ps().models) == 2
    told = httpx.post(f"{server.url}/api/generate", json={"model": "answer", "keep_alive": 0})
    assert told.headers["Dapji-Ignored-Fields"] == "keep_alive"


def test_options_reach_the_model(client: ollama.Client) -> None:
    def answer(**options: Any) -> str | None:
        return client.chat("endless", HELLO, options={"num_predict": 20, **options}).message.content

    warm = {"temperature": 100.0, "top_k": 0, "top_p": 1.0}
    assert answer(**warm, seed=7) == answer(**warm, seed=7) != answer(**warm, seed=8)
    assert answer(**warm, seed=-5) == answer(**warm, seed=-5)
    counted = answer(temperature=0)
    assert counted is not None
    assert counted.startswith("하나 둘 셋 하나")
    assert (
        answer(**warm | {"top_k": 1}) == answer(**warm | {"top_p": 1e-6}) == answer(**warm | {"min_p": 1.0}) == counted
    )
    assert answer(temperature=0, stop=["셋"], repeat_last_n=-1, num_ctx=512, num_predict=-1) == "하나 둘 "
    assert answer(temperature=0, repeat_penalty=50.0) != counted
    assert answer(temperature=0, frequency_penalty=2.0, presence_penalty=2.0, typical_p=1.0, mirostat=0)


def test_tools_are_called(agent: ollama.Client) -> None:
    answer = agent.chat("caller", HELLO, tools=[WEATHER], options=GREEDY)
    assert answer.message.content == "잠시만요."
    (call,) = answer.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "서울"})
    parts = list(agent.chat("caller", HELLO, tools=[WEATHER], options=GREEDY, stream=True))
    assert [part.message.tool_calls for part in parts if part.message.tool_calls] == [[call]]
    history = [*HELLO, answer.message, {"role": "tool", "tool_name": "weather", "content": "맑음"}]
    after = agent.chat("caller", history, tools=[WEATHER], options=GREEDY)
    assert (after.prompt_eval_count or 0) > (answer.prompt_eval_count or 0)


def test_the_arguments_of_a_call_are_an_object(client: ollama.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    events = AsyncReply.events

    async def calling(reply: AsyncReply) -> AsyncIterator[Event]:
        yield ToolCall(text="", name="f", arguments="[1]")
        async for event in events(reply):
            yield event

    monkeypatch.setattr(AsyncReply, "events", calling)
    (part, *_) = client.chat("answer", HELLO, options=GREEDY, stream=True)
    (call,) = part.message.tool_calls or ()
    assert call.function.arguments == {"INVALID_JSON": "[1]"}


def test_reasoning_stands_apart_and_may_be_turned_off(agent: ollama.Client) -> None:
    answer = agent.chat("thinker", HELLO, think=True, options=GREEDY)
    assert (answer.message.thinking, answer.message.content) == ("음, 생각", "42입니다.")
    parts = list(agent.chat("thinker", HELLO, options=GREEDY, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == "음, 생각"
    assert "".join(part.message.content or "" for part in parts) == "42입니다."
    text = agent.generate("thinker", "안녕", think=True, options=GREEDY)
    assert (text.thinking, text.response) == ("음, 생각", "42입니다.")
    assert agent.chat("thinker", HELLO, think=False, options=GREEDY).message.thinking is None
    with pytest.raises(ollama.ResponseError, match="no place for reasoning"):
        agent.chat("caller", HELLO, think=True)
    with pytest.raises(ollama.ResponseError, match="no efforts of reasoning"):
        agent.chat("thinker", HELLO, think="high")


def test_a_format_needs_an_answer_without_reasoning(agent: ollama.Client) -> None:
    schema: Any = {"enum": ["예", "아니오"]}
    with pytest.raises(ollama.ResponseError, match=r"begins with reasoning\. Hint: turn reasoning off"):
        agent.chat("thinker", HELLO, format=schema)
    answer = agent.chat("thinker", HELLO, format=schema, think=False)
    assert json.loads(answer.message.content or "") in schema["enum"]


def test_answers_have_the_format_that_is_asked_for(client: ollama.Client) -> None:
    schema: Any = {"type": "object", "properties": {"답": {"enum": ["예", "아니오"]}}, "required": ["답"]}
    schema["additionalProperties"] = False
    for stream in (False, True):
        asked: Any = {"format": schema, "stream": stream, "options": {"num_predict": 300, "temperature": 5.0}}
        answer = client.chat("answer", HELLO, **asked)
        text = "".join(part.message.content for part in answer) if stream else answer.message.content
        assert json.loads(text)["답"] in ("예", "아니오")
    assert (
        client.generate("answer", "안녕", format="json", options={"num_predict": 20}).response[:1].strip("{ \n") == ""
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"foo": 1}, "unknown field 'foo'"),
        ({"options": {"num_gpu": 1}}, "unknown field 'options.num_gpu'"),
        ({"options": {"temperature": -1}}, "temperature must be finite and >= 0, got -1"),
        ({"options": {"repeat_last_n": 64}}, "options.repeat_last_n: Invalid enum value 64"),
        ({"options": {"num_ctx": 4096}}, "options.num_ctx (4096) is more than the context"),
        ({"options": {"num_predict": 0}}, "max_tokens must be an integer >= 1, got 0"),
        (
            {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
            "messages[0].images: this model takes text",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": "저는"}]}, "messages[1] is the assistant's"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role: Invalid enum value"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, "context (512 tokens)"),
        ({"tools": [WEATHER]}, "no place for tools"),
        ({"format": {"type": "nonsense"}}, "grammar"),
        ({"logprobs": True}, "logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(server: Running, change: dict[str, Any], message: str, stream: bool) -> None:
    asked = {"model": "answer", "messages": HELLO, "stream": stream, **change}
    answer = httpx.post(f"{server.url}/api/chat", json=asked)
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"error"}
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suffix": "x"}, "suffix: Invalid enum value 'x'"),
        ({"template": "x"}, "template: Invalid enum value 'x'"),
        ({"context": [1, 2]}, "context"),
        ({"images": ["aGk="]}, "images: this model takes text only"),
        ({"raw": True, "system": "x"}, "system is the chat template's"),
        ({"raw": True, "think": True}, "think is the chat template's"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_named(server: Running, change: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{server.url}/api/generate", json={"model": "answer", "prompt": "안녕", **change})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]


def test_what_fails_under_way_ends_the_stream_with_an_error(
    client: ollama.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def events(reply: AsyncReply) -> AsyncIterator[Event]:
        yield Content(text="안")
        raise UnavailableError("the model is gone")

    monkeypatch.setattr(AsyncReply, "events", events)
    parts = client.chat("answer", HELLO, stream=True)
    assert next(parts).message.content == "안"
    with pytest.raises(ollama.ResponseError, match="the model is gone"):
        next(parts)
    with pytest.raises(ollama.ResponseError, match="the model is gone") as whole:
        client.chat("answer", HELLO)
    assert whole.value.status_code == 503


def test_refusals_have_the_protocols_form(client: ollama.Client, start_server: Start, keys: Keys) -> None:
    with pytest.raises(ollama.ResponseError, match="no model 'llama3' here") as missing:
        client.chat("llama3", HELLO)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="no model"):
        list(client.generate("llama3", "안녕", stream=True))
    with pytest.raises(ollama.ResponseError, match="computes no embeddings"):
        client.embed("answer", "안녕")
    with pytest.raises(ollama.ResponseError, match="Not Found"):
        client.pull("answer")
    key, guarded = keys.add("me"), start_server(keys=keys)
    with (
        ollama.Client(host=guarded.url) as stranger,
        pytest.raises(ollama.ResponseError, match="wants a key") as unknown,
    ):
        stranger.list()
    assert unknown.value.status_code == 401
    with ollama.Client(host=guarded.url, headers={"Authorization": f"Bearer {key}"}) as known:
        assert known.list().models


def test_models_are_described(agent: ollama.Client, agents: Running) -> None:
    agent.chat("thinker")
    assert [model.model for model in agent.list().models] == ["caller", "thinker"]
    for name, capabilities in (("caller", ["completion", "tools"]), ("thinker", ["completion", "thinking"])):
        shown = agent.show(name)
        assert shown.capabilities == capabilities
        assert "<|im_start|>" in (shown.template or "")
        assert shown.modelinfo is not None
        assert (shown.modelinfo["general.architecture"], shown.modelinfo["llama.context_length"]) == ("llama", 4096)
        assert shown.details is not None
        assert (shown.details.format, shown.details.family, shown.details.quantization_level) == (
            "gguf",
            "llama",
            "F32",
        )
        assert "temperature 0.7" in (shown.parameters or "")
    assert agents.service.registry.find("caller").path.suffix == ".gguf"
    assert httpx.get(f"{agents.url}/api/version").json() == {"version": __version__}
