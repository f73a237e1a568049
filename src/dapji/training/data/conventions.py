"""`Convention`: how people write down examples, and which one the fields of a file are in.

OpenAI's files for fine-tuning and for preferences (platform.openai.com/docs/guides/fine-tuning), Alpaca, ShareGPT,
TRL's prompt-completion, preference and unpaired preference (huggingface.co/docs/trl/dataset_formats), plain text. Knows
neither files nor tokens: a row is a mapping.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapji.errors import FormatError
from dapji.training.data.examples import Conversation, Example, Message, Preference, Rated, Text
from dapji.training.data.fields import Fields
from dapji.training.data.messages import messages_of, sharegpt_messages, tools_of


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One way to write down examples."""

    name: str
    required: Sequence[frozenset[str]]
    """Fields that a row must have: all of one of these sets."""
    optional: frozenset[str]
    """Fields that are read where they are there, or whose meaning needs nothing done."""
    read: Callable[[Fields], Example]
    """Raises FormatError."""

    def fits(self, names: Iterable[str]) -> frozenset[str] | None:
        """The largest set of required fields that a row with these fields has."""
        found = [required for required in self.required if required <= set(names)]
        return max(found, key=len, default=None)

    def example(self, fields: Mapping[str, Any]) -> Example:
        """The example that a row holds. Raises FormatError, which names the field, its value and a remedy."""
        given = {name: value for name, value in fields.items() if value is not None}
        if self.fits(given) is None:
            raise FormatError(
                f"the fields {', '.join(fields)} are not those of {self.name!r}: {self.needs}",
                hint="all rows of a file are in one convention",
            )
        return self.read(Fields(given))

    def unread(self, names: Iterable[str]) -> list[str]:
        """Those of the fields that it does not read."""
        return [name for name in names if name not in self.optional.union(*self.required)]

    @property
    def needs(self) -> str:
        return " or ".join(" + ".join(sorted(required)) for required in self.required)


def detect(fields: Mapping[str, Any]) -> Convention:
    """The convention that a row is in, by its fields. Raises FormatError where that is none or more than one."""
    names = [name for name, value in fields.items() if value is not None]
    fitting = {c.name: required for c in CONVENTIONS.values() if (required := c.fits(names)) is not None}
    best = [name for name, required in fitting.items() if not any(required < other for other in fitting.values())]
    if len(best) == 1:
        return CONVENTIONS[best[0]]
    what = f"may be {' or '.join(map(repr, best))}" if best else "are of no known convention"
    known = "; ".join(f"{c.name}: {c.needs}" for c in CONVENTIONS.values())
    raise FormatError(f"the fields {', '.join(names)} {what}", hint=f"name it (--format), or rename fields. {known}")


def conversation(messages: Sequence[tuple[Message, bool]], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """messages: each with whether it is learned. Raises FormatError where none is."""
    trained = frozenset(i for i, (_, learned) in enumerate(messages) if learned)
    if not trained:
        raise FormatError(
            "no message of an assistant is learned", hint="an example ends with what the model shall answer"
        )
    return Conversation(messages=tuple(message for message, _ in messages), trained=trained, tools=tuple(tools))


def _answered(
    prompt: Sequence[tuple[Message, bool]], answer: Sequence[tuple[Message, bool]], tools: Any
) -> Conversation:
    return conversation([*((message, False) for message, _ in prompt), *answer], tools)


def _chat(fields: Fields) -> Example:
    return conversation(messages_of(fields, "messages"), tools_of(fields))


def _openai_preference(fields: Fields) -> Example:
    given = fields.inside("input")
    prompt, tools = messages_of(given, "messages"), tools_of(given)
    return Preference(
        chosen=_answered(prompt, messages_of(fields, "preferred_output"), tools),
        rejected=_answered(prompt, messages_of(fields, "non_preferred_output"), tools),
    )


def _sharegpt(fields: Fields) -> Example:
    return conversation(_system(fields) + sharegpt_messages(fields, "conversations"), tools_of(fields))


def _system(fields: Fields) -> list[tuple[Message, bool]]:
    text = fields.text("system", default="")
    return [({"role": "system", "content": text}, False)] if text else []


def _alpaca(fields: Fields) -> Example:
    messages = _system(fields)
    for i, turn in enumerate(fields.array("history", default=[])):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            fields.fail(f"history[{i}]", turn, "a question and its answer")
        messages += [({"role": "user", "content": turn[0]}, False), ({"role": "assistant", "content": turn[1]}, True)]
    asked = "\n\n".join(filter(None, (fields.text("instruction"), fields.text("input", default=""))))
    answer = {"role": "assistant", "content": fields.text("output")}
    return conversation([*messages, ({"role": "user", "content": asked}, False), (answer, True)])


def _completion(fields: Fields) -> Conversation | Text:
    if fields.is_text("prompt") and fields.is_text("completion"):
        return _text_after(fields, "prompt", "completion")
    return _answered(messages_of(fields, "prompt"), messages_of(fields, "completion"), tools_of(fields))


def _text_after(fields: Fields, prompt: str, name: str) -> Text:
    if not (text := fields.text(name)):
        fields.fail(name, text, "a text that is not empty")
    return Text(prompt=fields.text(prompt), text=text)


def _rated(fields: Fields) -> Example:
    good = fields.truth("label")
    if "completion" in fields:
        return Rated(answer=_completion(fields), good=good)
    *prompt, last = _dialogue(fields)
    return Rated(answer=_answered(prompt, [last], tools_of(fields)), good=good)


def _dialogue(fields: Fields) -> list[tuple[Message, bool]]:
    if "conversations" in fields:
        return _system(fields) + sharegpt_messages(fields, "conversations")
    return messages_of(fields, "messages")


def _preference(fields: Fields) -> Example:
    chosen, rejected = (_preferred(fields, name) for name in ("chosen", "rejected"))
    return Preference(chosen=chosen, rejected=rejected)


def _preferred(fields: Fields, name: str) -> Conversation | Text:
    """One of the two answers: a text after a text, messages after messages, or a whole conversation."""
    tools = tools_of(fields)
    if "messages" in fields or "conversations" in fields:
        answer = sharegpt_messages(fields, name) if "conversations" in fields else messages_of(fields, name)
        return _answered(_dialogue(fields), answer, tools)
    if fields.is_text(name):
        if "prompt" in fields:
            return _text_after(fields, "prompt", name)
        turns = _human_and_assistant(fields.text(name))
        if turns is None:
            fields.fail(name, fields.text(name), "a field prompt beside it")
        return _answered(turns[:-1], turns[-1:], tools)
    messages = messages_of(fields, name)
    if "prompt" in fields and not fields.is_text("prompt"):
        return _answered(messages_of(fields, "prompt"), messages, tools)
    if "prompt" in fields:
        asked = fields.text("prompt")
        if messages[0][0]["role"] == "assistant":  # the answer alone
            return _answered([({"role": "user", "content": asked}, False)], messages, tools)
        if not any(message.get("content") == asked for message, _ in messages):
            fields.fail("prompt", asked, f"the text of a message in {name}, which has a whole conversation")
    other = messages_of(fields, "rejected" if name == "chosen" else "chosen")
    same = next((i for i, (a, b) in enumerate(zip(messages, other, strict=False)) if a != b), len(messages))
    if same == len(messages):
        fields.fail(name, "…", "a conversation that differs from the other")
    return _answered(messages[:same], messages[same:], tools)


_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _human_and_assistant(text: str) -> list[tuple[Message, bool]] | None:
    """The dialogues of Anthropic's hh-rlhf (github.com/anthropics/hh-rlhf): "\\n\\nHuman: …\\n\\nAssistant: …"."""
    if not text.startswith("\n\nHuman:"):
        return None
    parts = _SPEAKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [({"role": roles[who], "content": said.strip()}, who == "Assistant") for who, said in turns]


def _text(fields: Fields) -> Example:
    if not (text := fields.text("text")):
        fields.fail("text", text, "a text that is not empty")
    return Text(text=text)


def _sets(*alternatives: str) -> Sequence[frozenset[str]]:
    return [frozenset(names.split()) for names in alternatives]


_TOOLS = frozenset({"tools", "functions", "parallel_tool_calls"})
"""The last of them is a setting of OpenAI's server; what a model learns is in the messages."""

CONVENTIONS: Mapping[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(name="chat", required=_sets("messages"), optional=_TOOLS, read=_chat),
        Convention(
            name="openai-preference",
            required=_sets("input preferred_output non_preferred_output"),
            optional=frozenset(),
            read=_openai_preference,
        ),
        Convention(name="sharegpt", required=_sets("conversations"), optional=_TOOLS | {"system"}, read=_sharegpt),
        Convention(
            name="alpaca",
            required=_sets("instruction output"),
            optional=frozenset({"input", "system", "history"}),
            read=_alpaca,
        ),
        Convention(name="completion", required=_sets("prompt completion"), optional=_TOOLS, read=_completion),
        Convention(
            name="preference",
            required=_sets("chosen rejected", "chosen rejected messages", "chosen rejected conversations"),
            optional=_TOOLS | {"prompt", "system"},
            read=_preference,
        ),
        Convention(
            name="rated",
            required=_sets("prompt completion label", "messages label", "conversations label"),
            optional=_TOOLS | {"system"},
            read=_rated,
        ),
        Convention(name="text", required=_sets("text"), optional=frozenset(), read=_text),
    )
}
"""By name."""
