"""`ChatTemplate`: messages to token ids, by the template that came with the model; and the parser for the answer.

Control tokens stand only where the template's own text has them. Whatever the messages hold stays text, even where it
spells a control token. Knows no model and no server: a message is a mapping, the result a list of ids.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dapji.chat.formats import ANY_TOOL, AnswerFormat, Parser, ToolChoice
from dapji.chat.sandbox import TIME_LIMIT, Clock, Template
from dapji.chat.written import Written
from dapji.errors import TemplateError
from dapji.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dapji.chat.grammar import Grammar

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Roles that may become part of a control token, as in the template text <|{{ message.role }}|>."""
MAX_DEPTH = 64
"""Of lists and mappings in messages, tools, documents and variables."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send an earlier answer's reasoning; templates read the first, gpt-oss's the second."""
_SWITCHES = ("enable_thinking", "thinking")
"""Variables that turn reasoning on and off. Some templates read both."""
_EFFORT = "reasoning_effort"
"""The variable that says how much to reason: low, medium or high."""


class ChatTemplate:
    """The templates of one model. Compiled on first use. Safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: Mapping[str, str],
        *,
        seconds: float = TIME_LIMIT,
        now: Clock = datetime.datetime.now,
    ) -> None:
        """`sources`: templates by name. `seconds`: processor time that one rendering may take. `now`: what templates
        take for the time, which some write into a conversation."""
        self.tokenizer = tokenizer
        self._sources = dict(sources)
        self._seconds = seconds
        self._now = now
        self._compiled: dict[str, Template] = {}
        self._formats: dict[str, AnswerFormat] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, now: Clock = datetime.datetime.now) -> ChatTemplate:
        """The templates that came with the tokenizer. A model without any is no error before it is asked to chat."""
        return cls(tokenizer, tokenizer.chat_templates, now=now)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        **variables: Any,
    ) -> Written:
        """The conversation as text.

        messages: {"role": …, "content": …} and whatever else the template reads; a key whose value is None is left out,
        and reasoning may be called reasoning_content, thinking or reasoning.
        tools, documents: passed on as they are, in the form that the template wants (mostly JSON schemas).
        add_generation_prompt: end with the beginning of an answer.
        name: which template; by default `tool_use` where there are tools and such a template, else `default`.
        variables: further values for the template, such as enable_thinking.
        Raises TemplateError where there is no such template, a value is none of JSON's, or rendering fails.
        """
        if not messages:
            raise TemplateError("a conversation needs at least one message")
        values: dict[str, Any] = {
            **{key: Written.by_template(text) for key, text in self.tokenizer.special_tokens.items()},
            **_plain(variables, "variables"),
            "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        return self._template(self._chosen(name, bool(tools))).render(values)

    def prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of the conversation, the BOS included where the model wants one; options as in `render`.

        Raises TemplateError, or TokenizerError for text that is not Unicode.
        """
        return self.encode(self.render(messages, **options))

    def encode(self, rendered: Written) -> list[int]:
        """Token ids of what `render` gave, as `prompt` does it."""
        parts = self._parts(rendered)
        first = next((part for part in parts if isinstance(part, int)), None)
        if self.tokenizer.add_bos and self.tokenizer.bos_id is not None and first != self.tokenizer.bos_id:
            parts.insert(0, self.tokenizer.bos_id)
        return self.tokenizer.encode_parts(parts)

    def encode_after(self, prompt: Written, rendered: Written) -> list[int]:
        """Token ids of what follows a prompt, without those of the prompt."""
        return self.tokenizer.encode_after(self._parts(prompt), self._parts(rendered))

    def _parts(self, rendered: Written) -> list[str | int]:
        return self.tokenizer.split_control(str.__str__(rendered), where=rendered.all_by_template)

    def answer(
        self,
        rendered: str,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        choice: ToolChoice = ANY_TOOL,
        content: Grammar | None = None,
        name: str | None = None,
    ) -> tuple[Parser, Grammar | None]:
        """What reads the answer to what `render` gave with these tools and this name, and what the answer must be.

        choice: which tools it may call. content: what it must be where it is no call. No grammar: any answer will do.
        Raises TemplateError where there are tools and the template has no place for them, and RequestError for tools
        that cannot be chosen, or whose arguments cannot be held to their schemas.
        """
        format, callable = self.format(tools=tools, name=name), choice.of(tools or ())
        control = self.tokenizer.control
        rules = format.grammar(rendered, tools=callable, choice=choice, content=content is not None, control=control)
        parser = format.parser(rendered, tools=callable, control=control, written=rules is not None)
        return parser, None if rules is None else _grammar(rules, content)

    def format(self, *, tools: Sequence[Mapping[str, Any]] | None = None, name: str | None = None) -> AnswerFormat:
        """What answers consist of, by the template that tools and name choose.

        Raises TemplateError where there are tools and the template has no place for them.
        """
        chosen = self._chosen(name, bool(tools))
        if tools and "tools" not in self._sources[chosen]:
            raise TemplateError(
                "this model's chat template has no place for tools",
                hint="describe them in a message, and look for calls in the answer's text",
            )
        if chosen not in self._formats:
            self._formats[chosen] = AnswerFormat.of(self._sources[chosen])
        return self._formats[chosen]

    def reasoning(
        self, wanted: bool | str, *, tools: Sequence[Mapping[str, Any]] | None = None, name: str | None = None
    ) -> dict[str, Any]:
        """Variables that turn reasoning on or off, or ask for an effort, in the template that tools and name choose.

        Where there are no efforts, medium turns it on.
        Raises TemplateError where it does not do what is wanted and cannot be told to.
        """
        chosen = self._chosen(name, bool(tools))
        read = self._template(chosen).variables
        if isinstance(wanted, str):
            if _EFFORT in read:
                return {_EFFORT: wanted}
            if wanted != "medium":
                raise TemplateError(
                    f"this model's chat template has no efforts of reasoning, so {wanted!r} cannot be asked for",
                    hint="turn reasoning on or off, or leave it as it is",
                )
            wanted = True
        if switches := read.intersection(_SWITCHES):
            return dict.fromkeys(switches, wanted)
        reasons = AnswerFormat.of(self._sources[chosen]).reasoning is not None
        if reasons != wanted:
            raise TemplateError(
                "this model's chat template has no place for reasoning"
                if wanted
                else "this model's chat template has no switch for reasoning, so it cannot be turned off",
                hint="leave it as it is",
            )
        return {}

    def _chosen(self, name: str | None, with_tools: bool) -> str:
        """The name of the template to use."""
        if not self._sources:
            raise TemplateError(
                "this model has no chat template, so nothing says how it wants conversations written",
                hint="use a version that is tuned for chat (mostly called -Instruct or -Chat), or complete plain text",
            )
        wanted = name or ("tool_use" if with_tools and "tool_use" in self._sources else "default")
        if wanted not in self._sources:
            raise TemplateError(
                f"this model has no chat template {wanted!r}, it has {', '.join(map(repr, self._sources))}",
                hint="choose one of them by its name",
            )
        return wanted

    def _template(self, name: str) -> Template:
        if name not in self._compiled:
            self._compiled[name] = Template(self._sources[name], seconds=self._seconds, now=self._now)
        return self._compiled[name]


def _grammar(rules: str, content: Grammar | None) -> Grammar:
    from dapji.chat.grammar import Grammar  # takes its time, which an answer without a grammar can do without

    return Grammar.answer(rules, content)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"{where} is a {type(message).__name__}, expected a mapping with a role and a content")
    plain = {key: value for key, value in _plain(message, where).items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    role = plain.get("role")
    if not isinstance(role, str):
        raise TemplateError(f"{where} has no role")
    if role in ROLES:
        plain["role"] = Written.by_template(role)
    return plain


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in JSON's types and no subclass of them, so that a template sees nothing that has more to offer."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if depth == MAX_DEPTH:
        raise TemplateError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in _keyed(value, where)}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise TemplateError(f"{where} is a {type(value).__name__}; templates take text, numbers, lists and mappings only")


def _keyed(values: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if not isinstance(key, str):
            raise TemplateError(f"{where} has the key {key!r}; keys are text, as in JSON")
        yield str.__str__(key), value
