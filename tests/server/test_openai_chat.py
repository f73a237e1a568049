"""/v1/chat/completions, asked by OpenAI's own client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_running import Running, Start

from dapji.server.settings import Settings
from tiny import ANSWER

HELLO: list[Any] = [{"role": "user", "content": "안녕"}]
GREEDY = {"temperature": 0.0}


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="answer", messages=HELLO, **GREEDY)
    (choice,) = completion.choices
    assert choice.message.content == ANSWER
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert completion.model == "answer"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 8


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="answer", messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 8
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None


def test_several_choices_differ_by_their_seeds_and_are_repeatable(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "endless", "messages": HELLO, "n": 3, "seed": 7, "temperature": 100.0, "max_tokens": 20,
    }  # fmt: skip
    first = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    assert len(set(first)) == 3
    assert [choice.message.content for choice in client.chat.completions.create(**asked).choices] == first
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first
    alone = client.chat.completions.create(**{**asked, "n": 1, "seed": 8}).choices[0].message.content
    assert alone == first[1]


def test_finish_reasons_are_true(client: openai.OpenAI) -> None:
    short = client.chat.completions.create(model="answer", messages=HELLO, max_completion_tokens=2, **GREEDY)
    assert short.choices[0].finish_reason == "length"
    stopped = client.chat.completions.create(model="answer", messages=HELLO, stop=["42"], **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == ANSWER[: ANSWER.index("42")]


def test_logprobs_are_of_every_token_with_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "answer", "messages": HELLO, "logprobs": True, "top_logprobs": 2, **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert b"".join(bytes(token.bytes or []) for token in whole.content).decode() == ANSWER
    assert all(
        len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob for token in whole.content
    )
    parts = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**asked, stream=True)]
    assert [token for part in parts if part is not None for token in part.content or []] == whole.content


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"foo": 1}, "foo", "unknown field 'foo'"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour", "unknown field"),
        ({"messages": []}, None, "at least one message"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "messages[0].role: Invalid enum value"),
        ({"temperature": -1}, None, "temperature must be finite and >= 0, got -1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "say the same"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"n": 17}, "n", "n (17) must be from 1 to 16"),
        ({"tool_choice": "required"}, None, "tool_choice asks for a call, and there are no tools to call"),
        ({"tool_choice": "any"}, "tool_choice", "Invalid enum value 'any'"),
        ({"reasoning_effort": "minimal"}, "reasoning_effort", "Invalid enum value 'minimal'"),
        ({"reasoning_effort": "high"}, None, "no efforts of reasoning, so 'high' cannot be asked for"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid value 'xml'"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"unevaluatedItems": 1}},
                }
            },
            None,
            "response_format.json_schema.schema: answers cannot be held to the keyword 'unevaluatedItems' at "
            "/unevaluatedItems",
        ),
        ({"logit_bias": {"a": 1}}, "logit_bias", "keys must be token ids"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages[0].content[0]",
            "is an image; this model takes text only",
        ),
    ],
)
def test_what_is_wrong_is_named(server: Running, change: dict[str, Any], field: str | None, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "answer", "messages": HELLO, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert message in error["message"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


def test_structured_output_is_valid(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    asked: dict[str, Any] = {
        "model": "answer",
        "messages": HELLO,
        "temperature": 100.0,
        "response_format": json_schema(schema | {"type": "object"}),
    }
    for seed in range(5):
        choice = client.chat.completions.create(**asked, seed=seed, max_tokens=200).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or "")["n"], int)
    asked["response_format"] = {"type": "grammar", "grammar": "yes|no", "syntax": "regex"}
    assert client.chat.completions.create(**asked).choices[0].message.content in ("yes", "no")


def test_a_prompt_over_the_context_says_both_numbers(client: openai.OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "a" * 600}]
    with pytest.raises(
        openai.BadRequestError, match=r"the prompt \(6\d\d tokens\) .* context \(512 tokens\)"
    ) as caught:
        client.chat.completions.create(model="answer", messages=long)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="together exceed the context"):
        client.chat.completions.create(model="answer", messages=HELLO, max_tokens=512, stream=True)


def test_unknown_fields_may_be_ignored_by_a_header_and_are_told(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="answer",
        messages=HELLO,
        extra_body={"foo": 1, "stream_options": {"bar": 2}},
        extra_headers={"Dapji-Unknown-Fields": "ignore"},
        **GREEDY,
    )
    assert raw.parse().choices[0].message.content == ANSWER
    assert raw.headers["Dapji-Ignored-Fields"] in ("foo, stream_options.bar", "stream_options.bar, foo")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
        ("/api/show", {"model": "answer"}),
        ("/page/conversations", {}),
        ("/v1/messages/batches", {"requests": [{"custom_id": "a", "params": {"model": "answer"}}]}),
    ],
)
def test_every_route_tells_what_it_has_ignored(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body | {"foo": 1}, headers={"Dapji-Unknown-Fields": "ignore"})
    assert answer.is_success, answer.text
    assert answer.headers["dapji-ignored-fields"] == "foo"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here"):
        client.chat.completions.create(model="gpt-5", messages=HELLO)


def test_models_are_listed_with_their_limits(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["answer", "endless"]
    client.chat.completions.create(model="answer", messages=HELLO, **GREEDY)
    limits = client.models.retrieve("answer").model_extra
    assert limits is not None
    assert limits["limits"]["context"] == 512
    assert (limits["limits"]["receive_timeout_seconds"], limits["limits"]["timeout_seconds"]) == (60, None)


def test_a_client_that_goes_away_ends_its_answer(start_server: Start) -> None:
    server = start_server(context=4096)
    asked = {
        "model": "endless",
        "messages": HELLO,
        "stream": True,
        "temperature": 10,
        "logit_bias": {"0": -100, "2": -100},
    }
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked) as answer:
        lines = answer.iter_lines()  # held, as letting go of it closes the connection
        next(lines)
        assert server.service.gate.running == 1
    wait_until(lambda: server.service.gate.running == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json={**asked, "stream": False}, timeout=0.1)
    wait_until(lambda: server.service.gate.running == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_before_its_turn_gives_up_its_place(
    start_server: Start, tmp_path: Path, stream: bool
) -> None:
    server = start_server(Settings(folder=tmp_path, max_running=1), context=4096)
    asked = {"model": "endless", "messages": HELLO, "temperature": 10, "logit_bias": {"0": -100, "2": -100}}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=asked | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=asked | {"stream": stream}, timeout=0.1)
        wait_until(lambda: server.service.gate.waiting == 0)
        assert server.service.gate.running == 1
    wait_until(lambda: server.service.gate.running == 0)


def test_streams_side_by_side_say_what_each_says_alone(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "endless", "messages": HELLO, "temperature": 100.0, "max_tokens": 60}
    alone = [client.chat.completions.create(**asked, seed=i).choices[0].message.content for i in range(8)]
    together: list[str | None] = [None] * 8

    def ask(i: int) -> None:
        together[i] = client.chat.completions.create(**asked, seed=i).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def wait_until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
