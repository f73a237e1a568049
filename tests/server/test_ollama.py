"""/api, asked by Ollama's own client."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from server_running import Running, Start

from dapji import __version__
from dapji.chat.formats import Content, Event, ToolCall
from dapji.errors import UnavailableError
from dapji.model import AsyncReply, load
from dapji.server import wire
from dapji.server.keys import Keys
from dapji.server.ollama.models import _digest
from dapji.server.registry import Registry
from dapji.server.settings import Settings
from dapji.weights import store
from tiny import ANSWER, SCRIPT, write_tiny

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
        assert (opened.name, opened.context_length) == ("endless:latest", 512)
        assert client.chat("answer").done_reason == "load"
        assert len(client.ps().models) == 2


def test_a_model_stays_open_as_long_as_it_is_told(start_server: Start) -> None:
    server = start_server()
    with ollama.Client(host=server.url) as client:

        def left() -> dict[str, float]:
            now = datetime.now(UTC)
            return {
                model.model or "": (model.expires_at - now).total_seconds()
                for model in client.ps().models
                if model.expires_at is not None
            }

        client.chat("answer", HELLO, options=GREEDY)
        assert left()["answer:latest"] > 100 * 365 * 86400, "until another needs its memory"
        for keep_alive, seconds in ((300, 300), ("1h30m", 5400), ("90m", 5400), ("1.5h", 5400), (10.5, 10.5)):
            client.chat("answer", HELLO, options=GREEDY, keep_alive=keep_alive)
            assert seconds - 5 < left()["answer:latest"] <= seconds
        client.generate("answer", keep_alive=-1)
        assert left()["answer:latest"] > 100 * 365 * 86400
        client.generate("answer", keep_alive="-1m")
        answer = client.generate("answer", keep_alive=0)
        assert (answer.done, answer.done_reason) == (True, "unload")
        assert left() == {}
        assert server.service.registry.models["answer"].model is None
        assert client.generate("endless", keep_alive=0).done_reason == "unload", "it was not open, and is not"
        assert client.chat("answer", HELLO, options=GREEDY, keep_alive=0).message.content == ANSWER
        assert left() == {}, "closed after its answer"
        parts = client.chat("answer", HELLO, options=GREEDY, stream=True, keep_alive="200ms")
        assert "".join(part.message.content or "" for part in parts) == ANSWER
        assert list(left()) == ["answer:latest"]
        end = time.monotonic() + 10
        while left():
            assert time.monotonic() < end
            time.sleep(0.05)
        with pytest.raises(ollama.ResponseError, match="keep_alive '5x' is no duration"):
            client.generate("answer", keep_alive="5x")


def test_what_cannot_be_opened_again_is_not_closed(models: list[Path], tmp_path: Path) -> None:
    registry = Registry(models[:1], load=lambda path: load(path, context=512), memory=None, stays=True)
    server = Running(registry, Settings(folder=tmp_path), None)
    try:
        for prompt in ("", "안녕", ""):
            asked = {"model": "answer", "prompt": prompt, "keep_alive": 0, "stream": False, "options": GREEDY}
            told = httpx.post(f"{server.url}/api/generate", json=asked)
            assert told.json()["done_reason"] == ("stop" if prompt else "load")
            assert told.headers["Dapji-Ignored-Fields"] == "keep_alive"
            assert registry.models["answer"].model is not None
    finally:
        server.stop()


def test_names_may_have_the_tag_latest(client: ollama.Client) -> None:
    assert client.chat("answer:latest", HELLO, options=GREEDY).message.content == ANSWER
    assert client.show("answer:latest") == client.show("answer")
    with pytest.raises(ollama.ResponseError, match="no model"):
        client.chat("answer:7b", HELLO)


def test_a_digest_is_the_files(client: ollama.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digests = [model.digest or "" for model in client.list().models]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert digests == [model.digest for model in client.list().models]
    assert len(set(digests)) == 2
    monkeypatch.setenv("DAPJI_HOME", str(tmp_path))
    file = write_tiny(tmp_path / "mine.gguf", SCRIPT)
    path = store.pull(f"file:{file}", name="mine")
    assert _digest(path) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_log_probabilities_are_those_of_openais_endpoint(client: ollama.Client, server: Running) -> None:
    asked: dict[str, Any] = {"model": "answer", "messages": HELLO, "temperature": 0, "logprobs": True}
    told = httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"top_logprobs": 3}).json()
    expected = told["choices"][0]["logprobs"]["content"]
    options: Any = {"temperature": 0.0}
    whole = client.chat("answer", HELLO, options=options, logprobs=True, top_logprobs=3)
    parts = list(client.chat("answer", HELLO, options=options, logprobs=True, top_logprobs=3, stream=True))
    text = client.generate("answer", "안녕", options=options, logprobs=True)
    for found in (whole.logprobs or (), [each for part in parts for each in part.logprobs or ()]):
        assert [(each.token, each.logprob) for each in found] == [(each["token"], each["logprob"]) for each in expected]
        for each, other in zip(found, expected, strict=True):
            assert each.top_logprobs is not None
            assert [(top.token, top.logprob) for top in each.top_logprobs] == [
                (top["token"], top["logprob"]) for top in other["top_logprobs"]
            ]
    assert [each.logprob for each in text.logprobs or ()] == [each["logprob"] for each in expected]
    with pytest.raises(ollama.ResponseError, match="top_logprobs needs logprobs"):
        client.chat("answer", HELLO, top_logprobs=3)


def test_what_says_how_ollama_computes_is_named_and_changes_nothing(server: Running) -> None:
    how = {"num_gpu": 99, "num_thread": 4, "use_mmap": True, "num_batch": 512, "num_keep": 4, "mirostat_tau": 5.0}
    told = httpx.post(f"{server.url}/api/chat", json={"messages": HELLO, "stream": False, "options": GREEDY | how})
    assert told.json()["message"]["content"] == ANSWER
    assert told.headers["Dapji-Ignored-Fields"] == ", ".join(
        f"options.{name}" for name in ("num_keep", "num_batch", "num_gpu", "num_thread", "use_mmap")
    )


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


def test_a_format_is_of_what_follows_the_reasoning(agent: ollama.Client) -> None:
    schema: Any = {"enum": ["예", "아니오"]}
    for think, thought in ((True, "음, 생각"), (False, None)):
        answer = agent.chat("thinker", HELLO, format=schema, think=think, options=GREEDY)
        assert answer.message.thinking == thought
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
        ({"options": {"penalize_newline": True}}, "unknown field 'options.penalize_newline'"),
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
        ({"format": {"type": "nonsense"}}, "format: /type must be one or several of array"),
        ({"logprobs": True, "top_logprobs": 101}, "101 likeliest tokens are more than the 100"),
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


def test_a_slow_stream_says_that_it_lives(
    client: ollama.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = AsyncReply.events

    async def slow(reply: AsyncReply) -> AsyncIterator[Event]:
        await asyncio.sleep(0.2)
        async for event in events(reply):
            yield event

    monkeypatch.setattr(AsyncReply, "events", slow)
    monkeypatch.setattr(wire, "KEEP_ALIVE", 0.05)
    parts = list(client.chat("answer", HELLO, stream=True, options={"temperature": 0}))
    assert (parts[0].message.content, parts[0].done) == ("", False)
    assert "".join(part.message.content or "" for part in parts) == ANSWER
    assert [part.done for part in parts].index(True) == len(parts) - 1


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
    assert [model.model for model in agent.list().models] == ["caller:latest", "thinker:latest"]
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
