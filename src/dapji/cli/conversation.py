"""A conversation in the terminal: messages, system prompt, options; kept in a JSON file on request."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from dapji.chat.formats import Content, Reasoning
from dapji.cli.console import write, write_aside
from dapji.cli.options import SAMPLING
from dapji.errors import FormatError, UsageError
from dapji.weights.files import replacing

if TYPE_CHECKING:
    from dapji.model import Reply


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str


class _Saved(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a file holds."""

    system: str | None
    options: dict[str, bool | int | float | str | list[str]]
    messages: list[Message]


@dataclass
class Conversation:
    messages: list[Message] = field(default_factory=list)
    """User and assistant in turn; the system prompt is kept apart, so that it can be changed."""
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Those that differ from the model's own; `Model.options` checks them."""

    def for_template(self) -> list[dict[str, str]]:
        """As `Model.chat` takes it."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + [{"role": message.role, "content": message.content} for message in self.messages]

    def with_option(self, name: str, value: str) -> dict[str, Any]:
        """`options` with this one set, from text; the value `default` forgets it. Raises UsageError."""
        if name not in SAMPLING:
            raise UsageError(f"no option {name!r}", hint="options: " + ", ".join(SAMPLING))
        if value == "default":
            return {key: kept for key, kept in self.options.items() if key != name}
        kind = SAMPLING[name][0]
        try:
            converted = kind(value)
        except ValueError:
            raise UsageError(f"{name} must be a number ({kind.__name__}), got {value!r}") from None
        return self.options | {name: [converted] if name == "stop" else converted}

    def take_back(self) -> str:
        """Remove the last question and its answer; returns the question. Raises UsageError."""
        if not self.messages:
            raise UsageError("nothing has been asked yet")
        while (message := self.messages.pop()).role != "user":
            pass
        return message.content

    def save(self, path: str) -> None:
        """Write as JSON; a crash leaves the old file or the new one, never half of one.

        Overwrites a saved conversation and nothing else. Raises UsageError or, for another file, FormatError.
        """
        target = Path(path).expanduser()
        if target.exists():
            Conversation.load(path)
        saved = _Saved(system=self.system, options=self.options, messages=self.messages)
        try:
            with replacing(target) as file:
                file.write(msgspec.json.format(msgspec.json.encode(saved)) + b"\n")
        except OSError as error:
            raise UsageError(f"cannot write {target}: {error.strerror}") from error

    @staticmethod
    def load(path: str) -> Conversation:
        """Read what `save` wrote. Raises UsageError or FormatError."""
        source = Path(path).expanduser()
        try:
            saved = msgspec.json.decode(source.read_bytes(), type=_Saved)
        except OSError as error:
            raise UsageError(f"cannot read {source}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"{source} is not a saved conversation: {error}") from error
        roles = [message.role for message in saved.messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise FormatError(
                f"{source} is not a saved conversation: its messages are not questions and answers in turn"
            )
        return Conversation(messages=saved.messages, system=saved.system, options=saved.options)


def show(reply: Reply) -> None:
    """The answer on stdout as it is generated, reasoning beside it."""
    for event in reply.events():
        if isinstance(event, Reasoning):
            write_aside(event.text)
        elif isinstance(event, Content):
            if reply.reasoning and reply.text == event.text:
                write_aside("\n\n")
            write(event.text)


def speed_line(reply: Reply) -> str:
    """How many tokens, how fast, of a reply."""
    finish = reply.finish
    if finish is None:
        return f"stopped after {len(reply.tokens)} tokens"
    usage, timings = finish.usage, finish.timings
    rate = "" if finish.tokens_per_second is None else f", {finish.tokens_per_second:.1f} tokens/s"
    proposals = f", {usage.accepted} of {usage.proposed} proposed tokens accepted" if usage.proposed else ""
    return (
        f"{usage.prompt} prompt tokens ({usage.cached} cached), first token after {timings.first_token:.2f} s, "
        f"{usage.generated} generated{proposals}{rate}"
    )
