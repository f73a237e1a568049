"""`Example`: what a row of any file is to training, whatever convention it was written in.

Knows neither files nor tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dapji.chat.turn import text_of

Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages for a chat template, of which some are learned."""

    messages: Sequence[Message]
    """As `ChatTemplate.render` takes them; arguments of tool calls are mappings."""
    trained: frozenset[int]
    """Indices of the assistant's messages that are learned; not empty."""
    tools: Sequence[Mapping[str, Any]] = ()

    @property
    def texts(self) -> list[str]:
        """What was asked and answered, for comparing examples; not what a system message says, which many share."""
        found = []
        for message in self.messages:
            if message["role"] in ("system", "developer"):
                continue
            found.append(text_of(message))
            for call in message.get("tool_calls", ()):
                found.append(f"{call['function']['name']} {call['function']['arguments']}")
        return found

    @property
    def asked(self) -> str:
        """By the last message of a user."""
        return next((text_of(message) for message in reversed(self.messages) if message["role"] == "user"), "")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text without a chat template; all of it is learned, its end included, but not the prompt."""

    text: str
    """Not empty."""
    prompt: str = ""

    @property
    def texts(self) -> list[str]:
        return [self.prompt, self.text]

    @property
    def asked(self) -> str:
        """The prompt, or where there is none the text."""
        return self.prompt or self.text


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers to the same, one better than the other."""

    chosen: Conversation | Text
    rejected: Conversation | Text

    @property
    def texts(self) -> list[str]:
        return self.chosen.texts + self.rejected.texts

    @property
    def asked(self) -> str:
        return self.chosen.asked


@dataclass(frozen=True, kw_only=True)
class Rated:
    """An answer that is good or not, without another to compare it with."""

    answer: Conversation | Text
    good: bool

    @property
    def texts(self) -> list[str]:
        return self.answer.texts

    @property
    def asked(self) -> str:
        return self.answer.asked


Example: TypeAlias = Conversation | Text | Preference | Rated
