"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dapji.chat.formats import Content, Event, Reasoning, ToolCall
from dapji.chat.grammar import Grammar
from dapji.errors import DapjiError
from dapji.model import AsyncReply
from dapji.server.answering import (
    JsonObject,
    answered_in_parts,
    answered_whole,
    arguments_of,
    identifier,
    ignored_fields,
    key_of,
    logprobs_of,
    template_call,
    template_tool,
    tool_options,
)
from dapji.server.openai.common import (
    Drawn,
    Effort,
    StreamOptions,
    problem_body,
    sampling_of,
    thinking_of,
    usage_of,
)
from dapji.server.problem import Problem
from dapji.server.service import Answers, Service
from dapji.server.wire import Reads, Strict, event, event_stream, merged, read


class TextPart(Strict, tag_field="type", tag="text"):
    text: str


class ImagePart(Strict, tag_field="type", tag="image_url"):
    image_url: JsonObject


class RefusalPart(Strict, tag_field="type", tag="refusal"):
    refusal: str


class CalledFunction(Strict):
    name: str
    arguments: str


class Call(Strict):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart | ImagePart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[JsonObject] | None = None
    audio: None = None
    function_call: None = None


class Function(Strict):
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Strict):
    function: Function
    type: Literal["function"] = "function"


class NamedFunction(Strict):
    name: str


class FunctionChoice(Strict, tag_field="type", tag="function"):
    function: NamedFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


class AllowedChoice(Strict, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


class PlainText(Strict, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Strict, tag_field="type", tag="json_object"):
    pass


class NamedSchema(Strict):
    name: str
    schema: JsonObject = msgspec.field(default_factory=dict)
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Strict, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class GrammarFormat(Strict, tag_field="type", tag="grammar"):
    """Not OpenAI's."""

    grammar: str
    syntax: Literal["lark", "regex", "gbnf"] = "lark"


ResponseFormat = PlainText | JsonObjectFormat | JsonSchemaFormat | GrammarFormat


class Prediction(Strict):
    """What much of the answer will be."""

    content: str | list[TextPart]
    type: Literal["content"] = "content"


class Asked(Drawn, kw_only=True):
    """What may stand in a request. Types that allow one value only are of fields that would change the answer and that
    we do not have."""

    messages: list[Message]
    model: str | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    n: int = 1
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: JsonObject | None = None
    # Who asks and what for, and how it may be quicker: changes no answer.
    prediction: Prediction | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Answers a conversation."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    messages, options = [message_of(i, message) for i, message in enumerate(asked.messages)], _options(asked)
    answers = service.chat(key_of(request), asked.model, messages, n=asked.n, **options)
    headers = ignored_fields(left_out)
    if asked.stream:
        return await answered_in_parts(request, answers, partial(_streamed, asked), event_stream, headers)
    return await answered_whole(request, answers, partial(_whole, asked), headers)


def message_of(index: int, message: Message) -> JsonObject:
    """As templates read it. Raises Problem for what no text model can take."""
    content = message.content
    if isinstance(content, list):
        content = "".join(_text(part, f"messages[{index}].content[{i}]") for i, part in enumerate(content))
    written: JsonObject = {"role": message.role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            written[name] = value
    if message.tool_calls is not None:
        written["tool_calls"] = [
            template_call(call.function.name, arguments_of(call.function.arguments), call.id)
            for call in message.tool_calls
        ]
    return written


def _text(part: TextPart | ImagePart | RefusalPart, where: str) -> str:
    if isinstance(part, ImagePart):
        raise Problem("invalid_request", f"{where} is an image; this model takes text only", where)
    return part.refusal if isinstance(part, RefusalPart) else part.text


def _options(asked: Asked) -> JsonObject:
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise Problem("invalid_request", "max_tokens and max_completion_tokens say the same: give one", "max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Problem("invalid_request", "top_logprobs needs logprobs", "top_logprobs")
    options = sampling_of(asked)
    options["max_tokens"] = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if asked.logprobs:
        options["logprobs"] = asked.top_logprobs or 0
    options |= _tool_options(asked) | thinking_of(asked.reasoning_effort)
    options["variables"] = asked.chat_template_kwargs
    options["grammar"] = _grammar(asked.response_format)
    return options


def _tool_options(asked: Asked) -> JsonObject:
    tools = [
        template_tool(tool.function.name, tool.function.description, tool.function.parameters)
        for tool in asked.tools or ()
    ]
    choice, parallel = asked.tool_choice, asked.parallel_tool_calls
    if isinstance(choice, FunctionChoice):
        return tool_options(tools, "required", names=[choice.function.name], parallel=parallel)
    if isinstance(choice, AllowedChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return tool_options(tools, choice.allowed_tools.mode, names=names, parallel=parallel)
    return tool_options(tools, choice or "auto", parallel=parallel)


def _grammar(wanted: ResponseFormat | None) -> Grammar | None:
    if isinstance(wanted, JsonObjectFormat):
        return Grammar.json_object()
    if isinstance(wanted, JsonSchemaFormat):
        return Grammar.json_schema(wanted.json_schema.schema, "response_format.json_schema.schema")
    if isinstance(wanted, GrammarFormat):
        return {"lark": Grammar.lark, "regex": Grammar.regex, "gbnf": Grammar.gbnf}[wanted.syntax](wanted.grammar)
    return None


async def _whole(asked: Asked, opened: Answers) -> JsonObject:
    await opened.end()
    choices = []
    for i, reply in enumerate(opened.replies):
        message: JsonObject = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["content"] = reply.text or None
            message["tool_calls"] = [_call(call) for call in reply.tool_calls]
        choice = {"index": i, "message": message, "finish_reason": _reason(reply), "logprobs": None}
        choices.append(choice | _logprobs(asked, opened, reply, 0))
    return {
        "id": identifier("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": opened.name,
        "choices": choices,
        "usage": usage_of(opened.replies),
    }


async def _streamed(asked: Asked, opened: Answers) -> AsyncIterator[bytes]:
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    head = {
        "id": identifier("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": opened.name,
    } | ({"usage": None} if usage else {})

    def chunk(index: int, delta: JsonObject, reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None} | more
        return event(head | {"choices": [choice]})

    told = [0] * len(opened.replies)  # tokens whose log-probabilities have been
    calls = [0] * len(opened.replies)
    try:
        for i in range(len(opened.replies)):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for i, part in merged([reply.events() for reply in opened.replies]):
            delta = _delta(part, calls[i])
            if delta is None:
                continue
            calls[i] += isinstance(part, ToolCall)
            more = _logprobs(asked, opened, opened.replies[i], told[i])
            told[i] = len(opened.replies[i].tokens)
            yield chunk(i, delta, **more)
        for i, reply in enumerate(opened.replies):
            yield chunk(i, {}, _reason(reply), **_logprobs(asked, opened, reply, told[i]))
        if usage:
            yield event(head | {"choices": [], "usage": usage_of(opened.replies)})
    except DapjiError as error:
        yield event(problem_body(Problem.of(error)))
    yield b"data: [DONE]\n\n"


def _delta(part: Event, n_calls: int) -> JsonObject | None:
    if isinstance(part, Content) and part.text:
        return {"content": part.text}
    if isinstance(part, Reasoning) and part.text:
        return {"reasoning_content": part.text}
    if isinstance(part, ToolCall):
        return {"tool_calls": [{"index": n_calls} | _call(part)]}
    return None


def _call(call: ToolCall) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or identifier("call"), "type": "function", "function": function}


def _reason(reply: AsyncReply) -> str:
    assert reply.finish is not None
    return "tool_calls" if reply.tool_calls and reply.finish.reason == "stop" else reply.finish.reason


def _logprobs(asked: Asked, opened: Answers, reply: AsyncReply, start: int) -> JsonObject:
    """Of the tokens from `start` on that have text."""
    if not asked.logprobs:
        return {}
    return {"logprobs": {"content": logprobs_of(opened.model.tokenizer, reply, start), "refusal": None}}
