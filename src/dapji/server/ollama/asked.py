"""What may stand in a request, and what it is to a model."""

from __future__ import annotations

from typing import Literal

import msgspec

from dapji.chat.grammar import Grammar
from dapji.server.answering import JsonObject, template_call, template_tool
from dapji.server.problem import Problem
from dapji.server.wire import Strict

_NEGATIVE_SEEDS = 1 << 64
"""Ollama's seeds are signed; -1 asks for any, -2 is the last but one of ours."""


class Options(Strict):
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Literal[-1] | None = None
    """Which tokens the penalty looks at: always all."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: Literal[0] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_predict: int | None = None
    """-1, -2: until the context is full."""
    num_ctx: int | None = None
    """Tokens that the context must have; it may have more."""


class CalledFunction(Strict):
    name: str
    arguments: JsonObject
    index: int | None = None


class Call(Strict):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Function(Strict):
    name: str
    description: str | None = None
    parameters: JsonObject | None = None


class Tool(Strict):
    function: Function
    type: Literal["function"] = "function"


class Asked(Strict):
    """What both ways to ask share. Types that allow one value only are of fields that would change the answer and that
    we do not have."""

    model: str | None = None
    stream: bool = True
    format: Literal["", "json"] | JsonObject | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None


class AskedChat(Asked, kw_only=True):
    messages: list[Message] = msgspec.field(default_factory=list)
    """None: the model is only opened."""
    tools: list[Tool] | None = None


class AskedText(Asked, kw_only=True):
    prompt: str = ""
    """Empty: the model is only opened."""
    system: str | None = None
    raw: bool = False
    """The prompt is continued as it is, without the chat template."""
    images: list[str] | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: None = None


def options_of(asked: Asked) -> JsonObject:
    """Options of `Model.complete`."""
    given = asked.options or Options()
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "stop")
    options: JsonObject = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.repeat_penalty is not None:
        options["repetition_penalty"] = given.repeat_penalty
    if given.seed is not None and given.seed != -1:
        options["seed"] = given.seed if given.seed >= 0 else given.seed + _NEGATIVE_SEEDS
    if given.num_predict not in (-1, -2):
        options["max_tokens"] = given.num_predict
    if asked.format:
        options["grammar"] = Grammar.json_object() if asked.format == "json" else Grammar.json_schema(asked.format)
    return options


def chat_options(asked: AskedChat) -> JsonObject:
    """Options of `Model.chat`."""
    options = options_of(asked) | {"thinking": asked.think}
    if asked.tools:
        functions = [tool.function for tool in asked.tools]
        options["tools"] = [template_tool(each.name, each.description, each.parameters) for each in functions]
    return options


def messages_of(asked: AskedChat) -> list[JsonObject]:
    """As templates read them. Raises Problem for what no text model can take."""
    last = f"messages[{len(asked.messages) - 1}]"
    if asked.messages[-1].role == "assistant":
        told = f"{last} is the assistant's: an answer that is begun cannot be continued here"
        raise Problem("invalid_request", told, last)
    return [_message(message, f"messages[{i}]") for i, message in enumerate(asked.messages)]


def _message(message: Message, where: str) -> JsonObject:
    refuse_images(message.images, f"{where}.images")
    written: JsonObject = {"role": message.role, "content": message.content or ""}
    renamed = {
        "reasoning_content": message.thinking,
        "name": message.tool_name,
        "tool_call_id": message.tool_call_id,
    }
    written |= {name: value for name, value in renamed.items() if value is not None}
    if message.tool_calls:
        written["tool_calls"] = [
            template_call(call.function.name, call.function.arguments, call.id) for call in message.tool_calls
        ]
    return written


def refuse_images(images: list[str] | None, where: str) -> None:
    if images:
        raise Problem("invalid_request", f"{where}: this model takes text only", where)
