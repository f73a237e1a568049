"""A server in service: slow clients, limits of time, foreign pages, metrics and logs."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_running import Running, Start

from dapji.server import anthropic, log, ollama
from dapji.server.openai import common
from dapji.server.problem import STATUS, Kind, Problem
from dapji.server.settings import Settings

HELLO: list[Any] = [{"role": "user", "content": "안녕"}]
PAGE = "https://chat.example.org"
ENDLESS: dict[str, Any] = {
    "model": "endless", "messages": HELLO, "temperature": 10, "logit_bias": {"0": -100, "2": -100}, "n": 4,
}  # fmt: skip
"""No end, and nothing that could be guessed ahead: some seconds of work."""


@pytest.fixture(scope="module")
def hasty(start_server: Start) -> Running:
    """One that waits for nobody."""
    return start_server(Settings(receive_timeout=1.0, timeout=0.5), context=4096)


@pytest.fixture(scope="module")
def brief(start_server: Start) -> Running:
    """Too brief for 4,000 tokens, guessed ahead or not."""
    return start_server(Settings(timeout=0.2), context=4096)


def drip(server: Running, head: bytes, drop: bytes, seconds: float) -> tuple[bytes, float]:
    """Sends `head`, then `drop` again and again; what came back, and how long the connection lasted."""
    start, answer = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(0.1)
        raw.sendall(head)
        while time.monotonic() - start < seconds:
            try:
                if drop:
                    raw.send(drop)
                part = raw.recv(65536)
                if not part:
                    break
                answer += part
            except TimeoutError:
                continue
            except OSError:
                break
    return answer, time.monotonic() - start


@pytest.mark.parametrize(
    ("head", "drop"),
    [(b"GET /v1/models HT", b""), (b"GET /v1/models HTTP/1.1\r\nX: ", b"x"), (b"", b"")],
    ids=["head that stops", "head that drips", "nothing"],
)
def test_a_head_must_arrive_in_time(hasty: Running, head: bytes, drop: bytes) -> None:
    answer, lasted = drip(hasty, head, drop, 10)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.9 < lasted < 4


def test_a_body_must_arrive_in_time(hasty: Running) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{"
    answer, lasted = drip(hasty, head, b" ", 10)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert "the body has not arrived within this server's limit of 1 seconds" in answer.decode()
    assert json.loads(answer[answer.index(b"{") :])["error"]["type"] == "invalid_request_error"
    assert 0.9 < lasted < 4


def test_who_is_refused_may_not_hold_the_connection_with_its_body(hasty: Running) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 100000\r\n\r\n{"
    answer, lasted = drip(hasty, head, b" ", 10)
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert lasted < 4


def test_fast_requests_share_a_connection_for_longer_than_one_may_take_to_arrive(hasty: Running) -> None:
    with httpx.Client() as client:
        for _ in range(5):
            assert client.get(f"{hasty.url}/health").status_code == 200
            time.sleep(0.3)


def test_a_request_may_take_only_its_time(hasty: Running) -> None:
    body = json.dumps(ENDLESS | {"stream": False}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    start = time.monotonic()
    answer, _ = drip(hasty, head + body, b"", 3)
    assert answer.startswith(b"HTTP/1.1 504 "), answer
    assert b"within this server's time for a request" in answer
    assert 0.4 < time.monotonic() - start < 4
    hasty.wait_until_idle()
    assert hasty.service.gate.running == 0


def test_a_stream_ends_with_its_time_and_says_so(hasty: Running) -> None:
    start = time.monotonic()
    answer = httpx.post(f"{hasty.url}/v1/chat/completions", json=ENDLESS | {"stream": True}, timeout=10)
    assert answer.status_code == 200
    told = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert json.loads(told[-2][6:])["error"]["message"].startswith("the answer was not whole")
    assert told[-1] == "data: [DONE]"
    assert 0.4 < time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4000}),
        ("/v1/completions", {"prompt": "\n", "max_tokens": 4000}),
        ("/v1/responses", {"input": "안녕", "store": False}),
        ("/api/chat", {"messages": HELLO}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_protocol_says_that_the_time_is_over(
    brief: Running, path: str, asked: dict[str, Any], stream: bool
) -> None:
    answer = httpx.post(brief.url + path, json={"model": "endless", "stream": stream, **asked}, timeout=10)
    assert answer.status_code == 504 or (stream and answer.status_code == 200)
    assert "the answer was not whole within this server's time for a request" in answer.text


@pytest.mark.parametrize("kind", STATUS)
def test_every_protocol_has_a_form_for_every_problem(kind: Kind) -> None:
    for protocol in (common, anthropic, ollama):
        assert "what is wrong" in json.dumps(protocol.problem_body(Problem(kind, "what is wrong")))


def test_only_pages_that_are_allowed_may_ask(start_server: Start) -> None:
    server = start_server(Settings(origins=(PAGE,), hosts=("localhost", "127.0.0.1", "llm.example.org")))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    url = f"{server.url}/v1/chat/completions"
    before = httpx.options(url, headers={"Origin": PAGE, **asked})
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == PAGE
    assert "POST" in before.headers["access-control-allow-methods"]
    assert before.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": PAGE, "Host": "llm.example.org"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    for other in ("https://evil.example", f"{PAGE}.evil.example", "http://chat.example.org", "null"):
        refused = httpx.options(url, headers={"Origin": other, **asked})
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        assert httpx.get(f"{server.url}/v1/models", headers={"Origin": other}).status_code == 403


def samples(server: Running) -> dict[str, float]:
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_what_clients_were_told(start_server: Start) -> None:
    server = start_server()
    told = [
        httpx.post(
            f"{server.url}/v1/chat/completions", json={"model": "answer", "messages": HELLO, "temperature": 0}
        ).json()["usage"]
        for _ in range(3)
    ]
    for path in ("/nothing", "/nothing/else", "/v1/models/nothing"):
        assert httpx.get(server.url + path).status_code == 404
    httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    seen = samples(server)
    assert seen["dapji_requests_total /v1/chat/completions 200"] == 3
    assert seen["dapji_requests_total other 404"] == 2
    assert seen["dapji_requests_total /v1/models/{name:path} 404"] == 1
    assert seen["dapji_requests_total /v1/models 403"] == 1
    assert seen["dapji_prompt_tokens_total answer"] == sum(usage["prompt_tokens"] for usage in told)
    assert seen["dapji_generated_tokens_total answer"] == sum(usage["completion_tokens"] for usage in told) == 24
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in told)
    assert seen["dapji_cached_tokens_total answer"] == cached > 0
    assert seen["dapji_first_token_seconds_count"] == 3
    assert seen["dapji_inter_token_seconds_count"] == 24 - 3
    assert seen["dapji_requests_running"] == seen["dapji_requests_waiting"] == 0
    served = server.service.registry.models["answer"]
    assert seen["dapji_model_memory_bytes answer"] == served.memory == served.model.memory > 0
    assert seen["dapji_model_memory_bytes endless"] == 0


def test_a_line_per_request_without_its_text(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dapji.requests")
    secret = {"model": "answer", "messages": [{"role": "user", "content": "geheim"}], "temperature": 0}
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=secret).json()["usage"]
    httpx.post(f"{server.url}/v1/chat/completions", json=secret | {"geheim": 1})
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=ENDLESS | {"stream": True}) as answer:
        next(answer.iter_lines())
    server.wait_until_idle()
    lines = [record for record in caplog.records if record.name == "dapji.requests"]
    assert re.fullmatch(
        rf"POST /v1/chat/completions 200 answer {usage['prompt_tokens']} \(\d+ cached\) \+ 8 tokens, "
        r"\d+\.\d\d s, first after \d+\.\d\d s",
        lines[0].getMessage(),
    )
    told = [json.loads(log.Json().format(line)) for line in lines]
    assert [each["status"] for each in told] == [200, 400, 499]
    assert told[0]["prompt_tokens"] == usage["prompt_tokens"]
    assert told[0]["generated_tokens"] == 8
    assert 0 < told[0]["first_token_seconds"] <= told[0]["seconds"]
    assert told[1]["model"] is None
    assert "geheim" not in caplog.text + json.dumps(told)
