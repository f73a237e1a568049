"""Conversations and templates that the tests of this folder share."""

from __future__ import annotations

import json
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
    },
]
ARGUMENTS = {"city": "서울", "days": 2, "until": None, "exact": True, "ids": [1, "a"], "where": {"x": "<b>"}}


def call(number: int, arguments: Any) -> dict[str, Any]:
    """An id of nine characters: Mistral's templates want that."""
    function = {"name": "weather", "arguments": arguments}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def calls(*made: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(made), **others}


def result(number: int, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"abcdefgh{number}", "name": "weather", "content": content}


TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
REASONED = {"role": "assistant", "content": "답.", "reasoning_content": "먼저 \n생각."}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER],
    "system": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ASSISTANT, KOREAN],
    "korean": [KOREAN],
    "two users": [USER, USER],
    "ends with an answer": [USER, ASSISTANT],
    "white space": [{"role": "user", "content": " \n b\n\n "}, {"role": "assistant", "content": " c "}, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "안녕"}, {"type": "text", "text": "!"}]}],
    "developer": [{"role": "developer", "content": "Be brief."}, USER],
    "late system": [USER, ASSISTANT, SYSTEM, USER],
    "unknown role": [USER, {"role": "critic", "content": "No."}],
    "call": [SYSTEM, USER, calls(call(1, ARGUMENTS), content=""), result(1, '{"temp": 3, "날씨": "맑음"}')],
    "call, arguments as text": [SYSTEM, USER, calls(call(1, TEXT), content=""), result(1, "맑음")],
    "call without arguments": [USER, calls(call(1, {})), result(1, "맑음")],
    "call after words": [USER, calls(call(1, ARGUMENTS), content="음, 봅시다."), result(1, "맑음")],
    "call without content": [USER, calls(call(1, ARGUMENTS), content=None), result(1, "맑음")],
    "ends with a call": [USER, calls(call(1, ARGUMENTS), content="")],
    "two calls": [
        USER, calls(call(1, ARGUMENTS), call(2, {}), content=""), result(1, "<맑음>"), result(2, "흐림"), ASSISTANT,
        USER,
    ],
    "two calls, arguments as text": [
        USER, calls(call(1, TEXT), call(2, "{}"), content=""), result(1, "맑음"), result(2, "흐림"), ASSISTANT, USER
    ],
    "result that is a mapping": [USER, calls(call(1, ARGUMENTS), content=""), result(1, {"temp": 3})],
    "result in parts": [USER, calls(call(1, ARGUMENTS), content=""), result(1, [{"type": "text", "text": "맑음"}])],
    "reasoning": [USER, REASONED, KOREAN],
    "reasoning at the end": [USER, REASONED],
    "reasoning before a call": [
        USER, calls(call(1, ARGUMENTS), content="", reasoning_content="생각."), result(1, "맑음")
    ],
    "reasoning before a call, arguments as text": [
        USER, calls(call(1, TEXT), content="", reasoning_content="생각."), result(1, "맑음")
    ],
    "reasoning by another name": [USER, {"role": "assistant", "content": "답.", "reasoning": "생각."}, KOREAN],
    "thinking": [USER, {"role": "assistant", "content": "답.", "thinking": "생각."}],
    "reasoning in the content": [USER, {"role": "assistant", "content": "<think>\n음\n</think>\n\n답."}, KOREAN],
}  # fmt: skip
MORE_TOOLS = [
    *TOOLS,
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "여러\n줄",
            "parameters": {
                "type": "object",
                "properties": {
                    "kind": {"type": "string", "enum": ["a", "b"], "description": "which"},
                    "ids": {"type": "array", "items": {"type": "integer"}},
                    "where": {"type": "object", "properties": {"x": {"type": "number"}}},
                    "until": {"type": ["string", "null"], "default": None},
                    "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                },
            },
            "return": {"type": "string", "description": "what was found"},
            "strict": True,
        },
    },
]
"""Schemas that some templates refuse."""
DOCUMENTS = [{"title": "하나", "text": "본문 <b>", "doc_id": "1"}, {"title": "둘", "text": ""}]
VARIABLES: dict[str, dict[str, Any]] = {
    "thinking": {"enable_thinking": True, "thinking": True},
    "no thinking": {"enable_thinking": False, "thinking": False, "tools": TOOLS},
    "documents": {"documents": DOCUMENTS},
    "documents and tools": {"documents": DOCUMENTS, "tools": TOOLS},
    "tools of every kind": {"tools": MORE_TOOLS},
    "everything else": {
        "enable_thinking": True,
        "add_vision_id": True,
        "builtin_tools": ["python", "browser"],
        "citation_mode": "fast",
        "clear_thinking": False,
        "controls": {"length": "long"},
        "custom_tools": MORE_TOOLS,
        "date_string": "1 Jan 2026",
        "grounding": "enabled",
        "keep_past_thinking": True,
        "model_identity": "나",
        "preserve_thinking": True,
        "reasoning_effort": "high",
        "response_format": {"type": "json_object"},
        "safety_mode": "NONE",
        "think_render_option": "interleaved",
        "thinking_budget": 512,
        "tool_choice": "required",
        "tools_in_user_message": False,
        "truncate_history_thinking": False,
        "xml_tools": MORE_TOOLS,
    },
}
"""What published templates read besides messages."""


def published() -> dict[str, str]:
    """Every template that llama.cpp ships, by the name of its file, and that of the embedded SmolLM2."""
    found = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((oracles.llama_cpp_models() / "templates").glob("*.jinja"))
    }
    assert len(found) >= 60
    smollm2 = open_checkpoint(store.resolve("smollm2-135m")).metadata["tokenizer.chat_template"]
    return {"SmolLM2": smollm2} | found
