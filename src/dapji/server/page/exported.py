"""Conversations as files: Markdown for people, JSON that can be imported again."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dapji.server.answering import JsonObject, arguments_of, template_call
from dapji.server.page.conversations import (
    Call,
    Conversation,
    Number,
    Seconds,
    Settings,
    Title,
    Turn,
    check_order,
    no_turn,
    title_of,
)
from dapji.server.problem import Problem
from dapji.server.wire import Strict


class CalledFunction(Strict):
    name: str
    arguments: str


class MessageCall(Strict):
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(Strict, omit_defaults=True):
    """As in a request of OpenAI's Chat Completions."""

    role: Literal["system", "user", "assistant"]
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[MessageCall] = msgspec.field(default_factory=list)


class Exported(Strict, omit_defaults=True):
    """A conversation as a file. `messages` is the branch that is shown; `turns` are all branches. One of them is enough
    for an import; where both are there, they must agree."""

    format: Literal["dapji-conversation"] = "dapji-conversation"
    version: Literal[1] = 1
    title: Title = ""
    created: Seconds | None = None
    settings: Settings = msgspec.field(default_factory=Settings)
    messages: list[Message] = msgspec.field(default_factory=list)
    leaf: Number | None = None
    turns: list[Turn] = msgspec.field(default_factory=list)


class Query(Strict):
    format: Annotated[Literal["json", "markdown"], Meta(description="of the file")] = "json"


def user_message(turn: Turn) -> str:
    """A user's turn as the model reads it: its files, then its text."""
    files = [f"{file.name}:\n{_fenced(file.text)}" for file in turn.files]
    return "\n\n".join([*files, *([turn.content] if turn.content or not files else [])])


def template_messages(settings: Settings, branch: list[Turn]) -> list[JsonObject]:
    """What a model's template is given for a branch."""
    messages: list[JsonObject] = [{"role": "system", "content": settings.system}] if settings.system else []
    for turn in branch:
        if turn.role == "user":
            messages.append({"role": "user", "content": user_message(turn)})
            continue
        message: JsonObject = {"role": "assistant", "content": turn.content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = [template_call(call.name, arguments_of(call.arguments)) for call in turn.calls]
        messages.append(message)
    return messages


def exported(conversation: Conversation) -> Exported:
    branch = conversation.branch(conversation.leaf)
    return Exported(
        title=conversation.title,
        created=conversation.created,
        settings=conversation.settings,
        messages=_messages(conversation.settings, branch),
        leaf=conversation.leaf,
        turns=conversation.turns,
    )


def imported(given: Exported) -> dict[str, Any]:
    """What `ConversationStore.create` takes. Raises Problem where it is no conversation."""
    settings, turns, leaf = given.settings, given.turns, given.leaf
    if not turns:
        if given.messages and given.messages[0].role == "system":
            settings = msgspec.structs.replace(settings, system=given.messages[0].content)
        turns = [*map(_turn_of, range(1, len(given.messages) + 1), _talk(given.messages))]
        leaf = turns[-1].number if turns else None
    by_number: dict[int, Turn] = {}
    for i, turn in enumerate(turns):
        if turn.parent is not None and turn.parent not in by_number:
            raise Problem("invalid_request", f"turns[{i}].parent ({turn.parent}) is no turn before it", "turns")
        if turn.number <= max(by_number, default=0):
            raise Problem(
                "invalid_request", f"turns[{i}].number ({turn.number}) must be above those before it", "turns"
            )
        check_order(turn, None if turn.parent is None else by_number[turn.parent])
        by_number[turn.number] = turn
    if turns and leaf not in by_number:
        raise (
            no_turn(leaf) if leaf is not None else Problem("invalid_request", "leaf: must be one of the turns", "leaf")
        )
    made = Conversation(id="", title="", created=0, changed=0, settings=settings, leaf=leaf, turns=turns)
    if given.messages and given.turns and given.messages != _messages(settings, made.branch(leaf)):
        raise Problem("invalid_request", "messages: they are not the turns up to leaf. Hint: leave one of both out")
    title = given.title or (title_of(turns[0]) if turns else "")
    return {"settings": settings, "title": title, "leaf": leaf, "created": given.created, "turns": turns}


def markdown(conversation: Conversation) -> str:
    """The branch that is shown."""
    parts = [f"# {conversation.title}"]
    if conversation.settings.system:
        parts += ["## System", conversation.settings.system]
    for turn in conversation.branch(conversation.leaf):
        if turn.role == "user":
            parts += ["## User", user_message(turn)]
            continue
        parts.append(f"## Assistant ({turn.model})" if turn.model else "## Assistant")
        if turn.reasoning:
            parts.append("\n".join(f"> {line}".rstrip() for line in turn.reasoning.splitlines()))
        if turn.content:
            parts.append(turn.content)
        parts += [f"{call.name}:\n{_fenced(call.arguments, 'json')}" for call in turn.calls]
    return "\n\n".join(parts) + "\n"


def _messages(settings: Settings, branch: list[Turn]) -> list[Message]:
    messages = [Message(role="system", content=settings.system)] if settings.system else []
    for turn in branch:
        calls = [MessageCall(function=CalledFunction(name=call.name, arguments=call.arguments)) for call in turn.calls]
        content = user_message(turn) if turn.role == "user" else turn.content
        messages.append(Message(role=turn.role, content=content, reasoning_content=turn.reasoning, tool_calls=calls))
    return messages


def _talk(messages: list[Message]) -> list[Message]:
    return messages[messages[:1] != [] and messages[0].role == "system" :]


def _turn_of(number: int, message: Message) -> Turn:
    if message.role == "system":
        raise Problem("invalid_request", "messages: a system message stands first or not at all", "messages")
    return Turn(
        number=number,
        parent=number - 1 or None,
        role=message.role,
        created=0,
        content=message.content,
        reasoning=message.reasoning_content,
        calls=[Call(name=call.function.name, arguments=call.function.arguments) for call in message.tool_calls],
    )


def _fenced(text: str, language: str = "") -> str:
    """As a block of code that nothing in it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"
