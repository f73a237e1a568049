"""Names, pages and keys that are refused."""

from __future__ import annotations

import httpx
import pytest
from server_running import Running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8410"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:8410"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_host_and_origin(server: Running, headers: dict[str, str], status: int) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_others_may_link_to_the_page(server: Running) -> None:
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    for path in ("/", "/status", "/docs", "/static/base.css"):
        assert httpx.get(server.url + path, headers=linked).status_code == 200


def test_its_own_pages_may_ask(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers={"Origin": server.url}).status_code == 200


def test_a_body_over_the_limit_is_refused(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b" " * (8 << 20) + b"{}")
    assert answer.status_code == 413
    assert "larger than this server's limit of 8388608 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"1e999"])
def test_what_is_no_request_is_refused(server: Running, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body)
    assert answer.status_code == 400, answer.text
