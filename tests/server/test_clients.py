"""What programs send that cannot be driven here: bodies as their sources make them, with nothing left out or in."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from server_running import Running

from tiny import ANSWER

HELLO = {"role": "user", "content": "안녕"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SAID: dict[str, Any] = {"role": "assistant", "content": "저는 답지입니다."}

CONTINUE: dict[str, Any] = {
    "model": "answer",
    "messages": [{"role": "system", "content": "짧게"}, HELLO, SAID, HELLO],
    "max_tokens": 200,
    "temperature": 0,
    "stream": True,
    "stop": ["<|endoftext|>", "<|end|>"],
    "stream_options": {"include_usage": True},
}
"""Of its extension: chat and edits; core/llm/openaiTypeConverters.ts, packages/openai-adapters."""

OPEN_WEBUI: dict[str, Any] = {
    "model": "answer",
    "messages": [{"role": "system", "content": "짧게"}, HELLO],
    "stream": True,
    "stream_options": {"include_usage": True},
}
"""After backend/open_webui/routers/openai.py has taken out what is its own."""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CONTINUE),
        ("/v1/chat/completions", CONTINUE | {"prediction": {"type": "content", "content": "print('안녕')"}}),
        ("/v1/chat/completions", CONTINUE | {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}),
        (
            "/v1/completions",
            {
                "model": "answer", "prompt": "안녕\n", "max_tokens": 200, "temperature": 0, "stream": True,
                "stop": ["\n\n", "```", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
            },
        ),
        ("/v1/chat/completions", OPEN_WEBUI),
        (
            "/v1/chat/completions",
            OPEN_WEBUI | {"temperature": 0.0, "top_p": 0.9, "min_p": 0.0, "max_tokens": 128, "seed": 7, "stop": ["x"]},
        ),
        ("/api/chat", {"model": "answer:latest", "messages": [HELLO], "stream": True, "options": {}}),
        (
            "/api/chat",
            {
                "model": "answer:latest", "messages": [{"role": "system", "content": "짧게"}, HELLO], "stream": True,
                "keep_alive": "5m", "options": {"temperature": 0.0, "num_predict": 128, "num_gpu": 1, "use_mmap": True},
            },
        ),
        (
            "/api/chat",
            {
                "model": "answer:latest",
                "messages": [
                    HELLO,
                    {
                        "role": "assistant", "content": "", "thinking": "음",
                        "tool_calls": [
                            {"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": {"city": "서울"}}}
                        ],
                    },
                    {"role": "tool", "tool_call_id": "call_1", "content": "맑음"},
                ],
                "stream": True,
            },
        ),
    ],
)  # fmt: skip
def test_what_clients_send_is_taken(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 200, answer.text
    assert ANSWER.split()[0] in answer.text


def test_tools_as_clients_send_them(agents: Running) -> None:
    function = {"name": "weather", "description": "날씨", "parameters": SCHEMA}
    for tool in (function, function | {"strict": False}):
        called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "서울"}'}}
        history: list[Any] = [
            HELLO,
            {"role": "assistant", "content": " ", "tool_calls": [called]},
            {"role": "tool", "content": "맑음", "tool_call_id": "call_1"},
        ]
        for messages in ([HELLO], history):
            body = CONTINUE | {"model": "caller", "messages": messages}
            body["tools"] = [{"type": "function", "function": tool}]
            answer = httpx.post(f"{agents.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert '"name":"weather"' in answer.text
