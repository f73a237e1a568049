"""Items of /v1/responses: what conversations are made of there, and the messages that templates read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from dapji.server.answering import JsonObject, arguments_of, identifier, template_call
from dapji.server.wire import Strict

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict, tag_field="type", tag="input_text"):
    text: str


class OutputText(Strict, tag_field="type", tag="output_text"):
    text: str
    annotations: list[JsonObject] = msgspec.field(default_factory=list)
    logprobs: list[JsonObject] = msgspec.field(default_factory=list)


class Refused(Strict, tag_field="type", tag="refusal"):
    refusal: str


class SummaryText(Strict, tag_field="type", tag="summary_text"):
    text: str


class ReasoningText(Strict, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(Strict, tag_field="type", tag="message", omit_defaults=True):
    """`type` may be left out in requests."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refused]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Strict, tag_field="type", tag="function_call", omit_defaults=True):
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class CallOutputItem(Strict, tag_field="type", tag="function_call_output", omit_defaults=True):
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Strict, tag_field="type", tag="reasoning", omit_defaults=True):
    summary: list[SummaryText]
    content: list[ReasoningText] | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: None = None


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem
_PREFIX = {MessageItem: "msg", CallItem: "fc", CallOutputItem: "fco", ReasoningItem: "rs"}


def item_id(kind: str) -> str:
    """Clients tell kinds apart by what stands before the underscore."""
    return identifier(kind, "_")


def with_types(body: Any) -> None:
    """Writes `type` into the messages of a request that leave it out."""
    items = body.get("input") if isinstance(body, dict) else None
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and "role" in item:
            item.setdefault("type", "message")


def items_of(given: str | list[Item]) -> list[Item]:
    """Of a request: each with an id, and content in parts."""
    items: list[Item] = [MessageItem(role="user", content=given)] if isinstance(given, str) else given
    for item in items:
        item.id = item.id or item_id(_PREFIX[type(item)])
        if isinstance(item, MessageItem) and isinstance(item.content, str):
            text = item.content
            item.content = [OutputText(text=text) if item.role == "assistant" else InputText(text=text)]
    return items


def messages_of(items: Sequence[Item], instructions: str | None) -> list[JsonObject]:
    """As templates read them; what a model wrote in one turn (reasoning, text, calls) is one."""
    messages: list[JsonObject] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    names: dict[str, str] = {}  # of called functions
    for item in items:
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if isinstance(item, CallOutputItem):
            output = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
            message = {"role": "tool", "tool_call_id": item.call_id, "content": output}
            messages.append(message | ({"name": names[item.call_id]} if item.call_id in names else {}))
        elif isinstance(item, MessageItem):
            text = _text(item)
            if item.role == "assistant" and last is not None and not last["content"] and "tool_calls" not in last:
                last["content"] = text
            else:
                messages.append({"role": item.role, "content": text})
        elif isinstance(item, ReasoningItem):
            text = "".join(part.text for part in item.content or item.summary)
            messages.append({"role": "assistant", "content": "", "reasoning_content": text})
        else:
            names[item.call_id] = item.name
            if last is None:
                messages.append(last := {"role": "assistant", "content": ""})
            call = template_call(item.name, arguments_of(item.arguments), item.call_id)
            last.setdefault("tool_calls", []).append(call)
    return messages


def _text(item: MessageItem) -> str:
    if isinstance(item.content, str):
        return item.content
    return "".join(part.refusal if isinstance(part, Refused) else part.text for part in item.content)
