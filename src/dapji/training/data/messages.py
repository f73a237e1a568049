"""Messages and tools as they stand in files of examples, to those that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dapji.training.data.examples import Message
from dapji.training.data.fields import Fields

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool": "tool",
}
"""ShareGPT's names -> roles."""

_TEXTS = ("reasoning_content", "thinking", "reasoning", "name", "tool_call_id")
"""Further fields of a message. Templates may read others too; what they are is between a file and its template."""

Marked = tuple[Message, bool]
"""A message, and whether it is learned: an assistant's is, unless its weight is 0."""


def messages_of(fields: Fields, name: str) -> list[Marked]:
    """OpenAI's messages; where a conversation is expected, ShareGPT's too. Raises FormatError."""
    items = fields.objects(name)
    if not items:
        fields.fail(name, [], "at least one message")
    return [_message(item) for item in items]


def sharegpt_messages(fields: Fields, name: str) -> list[Marked]:
    """ShareGPT's: {"from", "value"}. Raises FormatError."""
    items = fields.objects(name)
    if not items:
        fields.fail(name, [], "at least one message")
    return [_spoken(item) for item in items]


def tools_of(fields: Fields) -> Sequence[Mapping[str, Any]]:
    """The tools of a conversation: OpenAI's, its older `functions`, or bare descriptions; maybe as JSON in a text."""
    if "tools" in fields and "functions" in fields:
        fields.fail("functions", fields.array("functions"), "either tools or functions, not both")
    name = "functions" if "functions" in fields else "tools"
    if name not in fields or fields.values[name] in ("", []):
        return ()
    found = []
    for i, tool in enumerate(fields.array(name)):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            fields.fail(f"{name}[{i}]", tool, "a function with a name")
        found.append({**tool, "type": "function"} if function is not tool else {"type": "function", "function": tool})
    return found


def _message(fields: Fields) -> Marked:
    if "role" not in fields and "from" in fields:
        return _spoken(fields)
    role = fields.text("role")
    role = "tool" if role == "function" else role
    if role not in ROLES:
        fields.fail("role", role, f"one of {', '.join(ROLES)}")
    known = ("role", "content", "weight", "tool_calls", "function_call")
    for name in _TEXTS:
        fields.text(name, default="")
    message: dict[str, Any] = {"role": role, "content": _content(fields)}
    message |= {key: value for key, value in fields.values.items() if key not in known}
    if role != "assistant":
        for name in ("weight", "tool_calls", "function_call"):
            if name in fields:
                fields.fail(name, fields.values[name], f"none in a message of the role {role}")
        return message, False
    calls = (
        [_call(call.inside("function"), call) for call in fields.objects("tool_calls")]
        if "tool_calls" in fields
        else []
    )
    if "function_call" in fields:
        calls.append(_call(fields.inside("function_call"), fields))
    if calls:
        message["tool_calls"] = calls
    return message, _weight(fields)


def _weight(fields: Fields) -> bool:
    weight = fields.values.get("weight", 1)
    if weight not in (0, 1):
        fields.fail("weight", weight, "0 (not learned) or 1")
    return bool(weight)


def _content(fields: Fields) -> str | list[Any]:
    content = fields.values.get("content", "")
    if isinstance(content, str):
        return content
    for i, part in enumerate(content if isinstance(content, list) else [content]):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            where = f"content[{i}]" if isinstance(content, list) else "content"
            fields.fail(where, part, 'a text, or parts of the type "text"', hint="images and sound are not learned")
    return list(content)


def _call(function: Fields, call: Fields) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": function.text("name"), "arguments": _arguments(function)}}
    return {"id": call.text("id")} | made if "id" in call else made


def _arguments(function: Fields) -> Mapping[str, Any]:
    if function.values.get("arguments") in (None, ""):
        return {}
    return function.object("arguments")


def _spoken(fields: Fields) -> Marked:
    if "from" not in fields and "role" in fields:
        return _message(fields)
    speaker = fields.text("from")
    if speaker not in SPEAKERS:
        fields.fail("from", speaker, f"one of {', '.join(SPEAKERS)}")
    role, value = SPEAKERS[speaker], fields.text("value")
    if speaker != "function_call":
        return {"role": role, "content": value}, role == "assistant" and _weight(fields)
    try:
        made = json.loads(value)
    except (ValueError, RecursionError):
        fields.fail("value", value, "the JSON of a call: a name and arguments")
    calls = Fields({"value": made}).objects("value") if isinstance(made, dict | list) else []
    if not calls:
        fields.fail("value", value, "the JSON of a call: a name and arguments")
    message = {"role": "assistant", "content": "", "tool_calls": [_call(call, call) for call in calls]}
    return message, _weight(fields)
