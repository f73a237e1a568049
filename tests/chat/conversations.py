"""Conversations and templates that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import oracles
from dapji.weights import store
from dapji.weights.checkpoint import open_checkpoint

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello, who are you?"}
ASSISTANT = {"role": "assistant", "content": "I am a model."}
KOREAN = {"role": "user", "content": "안녕하세요? 답지는 무엇인가요? 👍🏽 각"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "날씨 <b> & more",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER],
    "system": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ASSISTANT, KOREAN],
    "korean": [KOREAN],
    "two users": [USER, USER],
    "ends with an answer": [USER, ASSISTANT],
}


def published() -> dict[str, str]:
    """Every template that llama.cpp ships, by the name of its file, and that of the embedded SmolLM2."""
    found = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((oracles.llama_cpp_models() / "templates").glob("*.jinja"))
    }
    assert len(found) >= 60
    smollm2 = open_checkpoint(store.resolve("smollm2-135m")).metadata["tokenizer.chat_template"]
    return {"SmolLM2": smollm2} | found
