"""What may stand in a request, and what it is to a model."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from dapji.chat.grammar import Grammar
from dapji.model import Model
from dapji.server.answering import JsonObject, template_call, template_tool
from dapji.server.problem import Problem
from dapji.server.registry import Registry
from dapji.server.wire import Strict

_NEGATIVE_SEEDS = 1 << 64
"""Ollama's seeds are signed; -1 asks for any, -2 is the last but one of ours."""


_SECONDS = {"": 1.0, "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNIT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h|)")
_DURATION = re.compile(rf"(?P<sign>[+-]?)(?P<size>(?:{_UNIT.pattern})+)", re.ASCII)
_FOR_EVER = 10 * 365 * 86400.0
"""Seconds that no server runs."""
_HOW = (
    "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "low_vram", "numa"
)  # fmt: skip


class Running(Strict):
    """How the model is run."""

    num_ctx: int | None = None
    """Tokens that the context must have; it may have more."""
    # How Ollama computes: changes no answer, and nothing here.
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    low_vram: bool | None = None
    numa: bool | None = None


class Options(Running):
    """And how an answer is drawn."""

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
    mirostat_eta: float | None = None
    """Of mirostat, which is off; so mirostat_tau."""
    mirostat_tau: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_predict: int | None = None
    """-1, -2: until the context is full."""


class CalledFunction(Strict):
    name: str
    arguments: JsonObject
    index: int | None = None


class Call(Strict):
    function: CalledFunction
    id: str | None = None
    index: int | None = None
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
    """Seconds, or a duration as Go writes it; negative: for ever."""
    logprobs: bool | None = None
    top_logprobs: int | None = None


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


def ignored_of(options: Running | None) -> list[str]:
    """Those that change nothing here."""
    return [f"options.{name}" for name in _HOW if getattr(options, name, None) is not None]


def keep_open(registry: Registry, model: str | None, keep_alive: float | str | None) -> list[str]:
    """For as long as `keep_alive` says; the names of what is ignored of it. Raises Problem."""
    if keep_alive is None:
        return []
    if registry.stays:
        return ["keep_alive"]
    registry.find(model).keep = _seconds(keep_alive)
    return []


def _seconds(keep_alive: float | str) -> float | None:
    """None: for ever. Raises Problem."""
    if isinstance(keep_alive, str):
        parts = _DURATION.fullmatch(keep_alive)
        if parts is None:
            told = (
                f"keep_alive {keep_alive!r} is no duration: 300, '5m', 0 to close the model at once, -1 to keep it open"
            )
            raise Problem("invalid_request", told, "keep_alive")
        units = _UNIT.findall(parts["size"])
        size = sum(float(n) * _SECONDS[unit] for n, unit in units)
        keep_alive = -size if parts["sign"] == "-" else size
    return keep_alive if 0 <= keep_alive < _FOR_EVER else None


def options_of(asked: Asked) -> JsonObject:
    """Options of `Model.complete`."""
    if asked.top_logprobs and not asked.logprobs:
        raise Problem("invalid_request", "top_logprobs needs logprobs", "top_logprobs")
    given = asked.options or Options()
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "stop")
    options: JsonObject = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.repeat_penalty is not None:
        options["repetition_penalty"] = given.repeat_penalty
    if given.seed is not None and given.seed != -1:
        options["seed"] = given.seed if given.seed >= 0 else given.seed + _NEGATIVE_SEEDS
    if given.num_predict not in (-1, -2):
        options["max_tokens"] = given.num_predict
    if asked.logprobs:
        options["logprobs"] = asked.top_logprobs or 0
    if asked.format:
        schema = asked.format
        options["grammar"] = Grammar.json_object() if schema == "json" else Grammar.json_schema(schema, "format")
    return options


def check_context(n: int, model: Model) -> None:
    """Raises Problem where the model was opened with a context of fewer than n tokens."""
    context = model.engine.context
    if n > context:
        told = f"options.num_ctx ({n}) is more than the context with which this model is served ({context} tokens)"
        raise Problem("invalid_request", told, "options.num_ctx")


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
