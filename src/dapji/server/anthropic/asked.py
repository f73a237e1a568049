"""What may stand in a request for a message, and what it is to a chat template."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from dapji.chat.grammar import Grammar
from dapji.server.answering import JsonObject, template_call, template_tool, tool_options
from dapji.server.problem import Problem
from dapji.server.wire import Strict


class CacheControl(Strict):
    """Changes nothing: whatever prompts have in common is cached without being asked."""

    type: Literal["ephemeral"] = "ephemeral"
    ttl: Literal["5m", "1h"] | None = None


class Block(Strict, tag_field="type"):
    cache_control: CacheControl | None = None


class Text(Block, tag="text", kw_only=True):
    text: str
    citations: None = None


class Image(Block, tag="image", kw_only=True):
    source: JsonObject


class Thinking(Block, tag="thinking", kw_only=True):
    thinking: str
    signature: str = ""
    """Says that the makers' own model wrote it; ours are empty, and none is checked."""


class ToolUse(Block, tag="tool_use", kw_only=True):
    id: str
    name: str
    input: JsonObject


class ToolResult(Block, tag="tool_result", kw_only=True):
    tool_use_id: str
    content: str | list[Text | Image] | None = None
    is_error: bool = False


Content = list[Text | Image | Thinking | ToolUse | ToolResult]


class Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | Content


class Tool(Strict):
    name: str
    input_schema: JsonObject
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    """Changes nothing: a call's input is always valid."""
    cache_control: CacheControl | None = None


class Choice(Strict, tag_field="type"):
    disable_parallel_tool_use: bool = False


class AutoChoice(Choice, tag="auto"):
    pass


class AnyChoice(Choice, tag="any"):
    """Some tool must be used."""


class ToolChoice(Choice, tag="tool", kw_only=True):
    """This one must be used."""

    name: str


class NoChoice(Strict, tag_field="type", tag="none"):
    pass


class ThinkingEnabled(Strict, tag_field="type", tag="enabled"):
    budget_tokens: int | None = None
    """A goal, which open models cannot be told; max_tokens bounds reasoning and answer together."""


class ThinkingAdaptive(Strict, tag_field="type", tag="adaptive"):
    """The model decides, as its template lets it."""


class ThinkingDisabled(Strict, tag_field="type", tag="disabled"):
    pass


class JsonSchemaFormat(Strict, tag_field="type", tag="json_schema"):
    schema: JsonObject


class OutputConfig(Strict):
    format: JsonSchemaFormat | None = None


class Counted(Strict):
    """What a prompt is made of. Types that allow one value only are of fields that would change the answer and that we
    do not have."""

    messages: list[Message]
    model: str | None = None
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoice | NoChoice | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class Asked(Counted, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # Who asks and how soon: changes no answer.
    metadata: JsonObject | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class Beta(Strict):
    """A query, as clients of beta features send it."""

    beta: Literal["true"] | None = None


class Page(Beta):
    """Which entries of a list are told."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    after_id: str | None = None
    before_id: str | None = None


def check_page(asked: Page) -> None:
    """Raises Problem."""
    if asked.after_id is not None and asked.before_id is not None:
        raise Problem("invalid_request", "after_id and before_id exclude each other", "before_id")


def prompt_options(asked: Counted) -> JsonObject:
    """Options of `Model.chat` that change the prompt."""
    options = _tool_options(asked)
    if isinstance(asked.thinking, ThinkingEnabled | ThinkingDisabled):
        options["thinking"] = isinstance(asked.thinking, ThinkingEnabled)
    return options


def options_of(asked: Asked) -> JsonObject:
    """All options of `Model.chat`."""
    drawn = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k")}
    options = {name: value for name, value in drawn.items() if value is not None}
    if asked.output_config is not None and asked.output_config.format is not None:
        schema = asked.output_config.format.schema
        options["grammar"] = Grammar.json_schema(schema, "output_config.format.schema")
    return prompt_options(asked) | options | {"max_tokens": asked.max_tokens, "stop": asked.stop_sequences or ()}


def _tool_options(asked: Counted) -> JsonObject:
    tools = [template_tool(tool.name, tool.description, tool.input_schema) for tool in asked.tools or ()]
    choice = asked.tool_choice or AutoChoice()
    if isinstance(choice, NoChoice):
        return {}
    names = [choice.name] if isinstance(choice, ToolChoice) else None
    wanted: Literal["auto", "required"] = "auto" if isinstance(choice, AutoChoice) else "required"
    return tool_options(tools, wanted, names=names, parallel=not choice.disable_parallel_tool_use)


def messages_of(asked: Counted) -> list[JsonObject]:
    """As templates read them: each result of a tool is a message. Raises Problem for what no text model can take."""
    if not asked.messages:
        raise Problem("invalid_request", "messages must have at least one message", "messages")
    written: list[JsonObject] = []
    if asked.system:
        system = asked.system if isinstance(asked.system, str) else "".join(block.text for block in asked.system)
        written.append({"role": "system", "content": system})
    called: dict[str, str] = {}  # names of tools, by the ids of their calls
    for i, message in enumerate(asked.messages):
        content: Content = [Text(text=message.content)] if isinstance(message.content, str) else message.content
        if message.role == "assistant":
            written.append(_assistant(content, called, f"messages[{i}]"))
        else:
            written += _others(message.role, content, called, f"messages[{i}]")
    if asked.messages[-1].role == "assistant":
        raise Problem(
            "invalid_request",
            f"messages[{len(asked.messages) - 1}] is the assistant's: an answer that is begun cannot be continued here",
            f"messages[{len(asked.messages) - 1}]",
        )
    return written


def _assistant(content: Content, called: dict[str, str], where: str) -> JsonObject:
    text, reasoning, calls = "", "", []
    for i, block in enumerate(content):
        if isinstance(block, Text):
            text += block.text
        elif isinstance(block, Thinking):
            reasoning += block.thinking
        elif isinstance(block, ToolUse):
            called[block.id] = block.name
            calls.append(template_call(block.name, block.input, block.id))
        else:
            raise _misplaced(block, f"{where}.content[{i}]", "assistant")
    message: JsonObject = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _others(role: str, content: Content, called: dict[str, str], where: str) -> list[JsonObject]:
    messages: list[JsonObject] = []
    for i, block in enumerate(content):
        at = f"{where}.content[{i}]"
        if isinstance(block, Text):
            if not messages or messages[-1]["role"] != role:
                messages.append({"role": role, "content": ""})
            messages[-1]["content"] += block.text
        elif isinstance(block, ToolResult) and role == "user":
            if block.tool_use_id not in called:
                raise Problem("invalid_request", f"{at}: no tool_use before it has the id {block.tool_use_id!r}", at)
            name = called[block.tool_use_id]
            told = {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": _result(block, at)}
            messages.append(told)
        else:
            raise _misplaced(block, at, role)
    return messages or [{"role": role, "content": ""}]


def _result(block: ToolResult, where: str) -> str:
    """Templates know no failed calls: a failure is told in words."""
    content = block.content or ""
    if isinstance(content, list):
        for i, part in enumerate(content):
            if isinstance(part, Image):
                raise _misplaced(part, f"{where}.content[{i}]", "tool")
        content = "".join(part.text for part in content if isinstance(part, Text))
    return f"Error: {content}" if block.is_error else content


def _misplaced(block: Block, where: str, role: str) -> Problem:
    if isinstance(block, Image):
        return Problem("invalid_request", f"{where} is an image; this model takes text only", where)
    kind = block.__struct_config__.tag
    return Problem("invalid_request", f"{where}: a message of the role {role!r} has no {kind} block", where)
