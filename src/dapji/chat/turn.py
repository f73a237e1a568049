"""`Turns`: an assistant's message as the model would have to write it, token for token; the inverse of a `Parser`.

A model is taught by what it should have answered to a prompt. The prompt is the one that it will get when it answers,
so that nothing is taught in a place where it never stands; the answer is what the template writes for the message after
that prompt, through the token that ends it. Knows no training: gives two lists of ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from dapji.chat.formats import Content, Event, Parser, Reasoning
from dapji.chat.formats.thinking import Thinking
from dapji.chat.template import REASONING, ChatTemplate
from dapji.chat.written import Written
from dapji.errors import TemplateError

Message = Mapping[str, Any]


def text_of(message: Message) -> str:
    """Its content, of parts their texts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer of a conversation."""

    prompt: list[int]
    """What the model is given: ids of the conversation before, with the beginning of an answer."""
    answer: list[int]
    """What it has to write. Never empty; its last id ends it (`Tokenizer.stop_ids`), and no other does."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template, beside those asked for: a switch of reasoning without which no prompt has this answer."""
    end_added: bool = False
    """The template writes no end; the tokenizer's `eos_id` was added."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A message and what is around it; reasoning in fields of its own."""

    before: Sequence[Message]
    message: Message
    after: Message | None
    tools: Sequence[Mapping[str, Any]] | None


class Turns:
    """The answers of conversations by one model's chat template."""

    def __init__(self, template: ChatTemplate, variables: Mapping[str, Any] | None = None) -> None:
        """variables: what else the template reads, as in `ChatTemplate.render`."""
        self._template = template
        self._tokenizer = template.tokenizer
        self._variables = dict(variables or {})

    def turn(self, messages: Sequence[Message], index: int, tools: Sequence[Mapping[str, Any]] | None = None) -> Turn:
        """The answer `messages[index]`, in its place.

        Raises TemplateError with the reason where there is none: where no message is before it, where it says nothing,
        where the template refuses the conversation or leaves out a part of the answer, where no prompt has this answer
        (as with reasoning that the prompt has closed), where its end is no token that ends answers, or where one
        stands inside it. RequestError and TokenizerError as in `ChatTemplate`.
        """
        if index == 0:
            raise TemplateError(
                "the conversation begins with an assistant's message, which answers nothing",
                hint="put a user's message before it, or leave it out",
            )
        message = messages[index]
        if not (_text(message) or message.get("tool_calls") or _reasoning(message)):
            raise TemplateError(f"messages[{index}] is an empty answer")
        place = _Place(
            before=[self._separated(m, tools) if m.get("role") == "assistant" else m for m in messages[:index]],
            message=self._separated(message, tools),
            after=messages[index + 1] if index + 1 < len(messages) else None,
            tools=tools,
        )
        refusal: TemplateError | None = None
        forms = [place.message] if place.message is message else [place.message, message]
        for form, switch in product(forms, self._switches(place)):
            variables = self._variables | switch
            prompt = self._template.render(place.before, tools=tools, **variables)
            ids = self._template.encode(prompt)
            for before in [place.before, place.before[-1:]][: len(place.before)]:
                try:
                    answer = self._answer(prompt, before, form, place, variables)
                    ended, added = self._ended(prompt, answer, [*before, form], place, variables)
                except TemplateError as error:
                    refusal = refusal or error
                else:
                    return Turn(prompt=ids, answer=ended, variables=switch, end_added=added)
        assert refusal is not None
        raise refusal

    def _switches(self, place: _Place) -> Iterator[dict[str, Any]]:
        """None first, as a user has who asks for nothing; then the one that reasoning, or its absence, needs."""
        yield {}
        try:
            switch = self._template.reasoning(bool(_reasoning(place.message)), tools=place.tools)
        except TemplateError:
            return
        if switch and not switch.keys() & self._variables.keys():
            yield switch

    def _separated(self, message: Message, tools: Sequence[Mapping[str, Any]] | None) -> Message:
        """With the reasoning that stands in the content (<think>…</think>) in a field of its own."""
        content = message.get("content")
        thinking = self._thinking(tools)
        if thinking is None or not isinstance(content, str) or _reasoning(message):
            return message
        begun, opener, rest = content.partition(thinking.opener)
        if begun.strip() or not opener or thinking.closer not in rest:
            return message
        reasoning, _, said = rest.partition(thinking.closer)
        return {**message, "reasoning_content": reasoning.strip(), "content": said.lstrip()}

    def _thinking(self, tools: Sequence[Mapping[str, Any]] | None) -> Thinking | None:
        reasoning = self._template.format(tools=tools).reasoning
        return reasoning if isinstance(reasoning, Thinking) else None

    def _answer(
        self,
        prompt: Written,
        before: Sequence[Message],
        form: Message,
        place: _Place,
        variables: Mapping[str, Any],
    ) -> Written:
        """What follows the prompt, told by what the template writes for the message after `before`.

        before: all that is before the message or, for a template that moves things when the conversation goes on, the
        last of it alone. form: the message with its reasoning apart, or as it was given. Raises TemplateError.
        """
        options = {"tools": place.tools, **variables}
        begun = prompt if before is place.before else self._template.render(before, **options)
        whole = self._template.render([*before, form], add_generation_prompt=False, **options)
        thinking = self._thinking(place.tools)
        if whole.startswith(begun):
            answer = whole[len(begun) :]
            plain = form is place.message and (thinking is None or not thinking.after(prompt).opened)
            if before is place.before and plain:
                _check_whole(place.message, answer)
                return answer
            if self._reads(prompt, answer, place):
                _check_whole(place.message, answer)
                return answer
        if thinking is not None and form is place.message:
            composed = _after_reasoning(begun, whole, _reasoning(form), thinking)
            if composed is not None and self._reads(prompt, composed, place):
                _check_whole(place.message, composed)
                return composed
        raise TemplateError(
            f"no prompt of this model's chat template has this message as its answer: it ends with "
            f"{str(prompt)[-30:]!r}, and the answer goes on otherwise",
            hint="change the example's reasoning, or the template's variables",
        )

    def _reads(self, prompt: Written, answer: Written, place: _Place) -> bool:
        """Whether the answer to this prompt is read as the message."""
        format = self._template.format(tools=place.tools)
        parser = format.parser(prompt, tools=place.tools, control=self._tokenizer.control)
        events = self._read(parser, answer)
        reasoning = "".join(event.text for event in events if isinstance(event, Reasoning)).strip()
        content = "".join(event.text for event in events if isinstance(event, Content)).strip()
        return reasoning == _reasoning(place.message) and content.startswith(_text(place.message))

    def _read(self, parser: Parser, answer: Written) -> list[Event]:
        spellings = {token: spelling for spelling, token in self._tokenizer.control.items()}
        events: list[Event] = []
        for part in self._tokenizer.split_control(str.__str__(answer), where=answer.all_by_template):
            if isinstance(part, str):
                events += parser.feed(part)
            elif parser.wants(spellings[part]):
                events += parser.feed(spellings[part], control=True)
        return events + parser.finish()

    def _ended(
        self,
        prompt: Written,
        answer: Written,
        conversation: Sequence[Message],
        place: _Place,
        variables: Mapping[str, Any],
    ) -> tuple[list[int], bool]:
        """Ids of the answer, the last message of the conversation, through its end; and whether that had to be added.

        Some templates write the end of an answer, or a role that ends it, at the beginning of the next message alone.
        """
        ids = self._template.encode_after(prompt, answer)
        end = next((i for i, token in enumerate(ids) if token in self._tokenizer.stop_ids), None)
        if end is not None:
            if any(self._is_visible(token) and token not in self._tokenizer.stop_ids for token in ids[end + 1 :]):
                raise TemplateError(
                    f"the answer goes on after {self._spelling(ids[end])!r}, a token that ends this model's answers",
                )
            return ids[: end + 1], False
        last = next((token for token in reversed(ids) if self._is_visible(token)), None)
        if last is not None and self._tokenizer.is_control(last):
            raise TemplateError(
                f"the template ends an answer with {self._spelling(last)!r}, no token that ends this model's answers",
                hint="name it as eos_token_id in the model's generation_config.json",
            )
        if following := self._end_in_next(answer, conversation, place, variables):
            return ids + following, False
        if self._tokenizer.eos_id is None:
            raise TemplateError("the template writes no end of an answer, and the tokenizer has no end token")
        return [*ids, self._tokenizer.eos_id], True

    def _end_in_next(
        self,
        answer: Written,
        conversation: Sequence[Message],
        place: _Place,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """The end token with which the next message begins, white space before it included; empty where it does not."""
        calls = place.message.get("tool_calls")
        after = place.after or {"role": "tool" if calls else "user", "content": "."}
        options = {"tools": place.tools, "add_generation_prompt": False, **variables}
        *before, last = conversation
        # Reasoning that the template takes out when the conversation goes on would hide where the next message begins.
        for said in (last, {key: value for key, value in last.items() if key not in REASONING}):
            try:
                whole, longer = (self._template.render([*before, said, *more], **options) for more in ((), (after,)))
            except TemplateError:  # as of two answers in a row
                continue
            if longer.startswith(whole):
                following = self._template.encode_after(answer, longer[len(whole) :])
                first = next((i for i, token in enumerate(following) if self._is_visible(token)), None)
                ends = first is not None and following[first] in self._tokenizer.stop_ids
                return following[: first + 1] if first is not None and ends else []
        return []

    def _is_visible(self, token: int) -> bool:
        return bool(self._tokenizer.token_bytes(token).strip())

    def _spelling(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode()


def _text(message: Message) -> str:
    return text_of(message).strip()


def _reasoning(message: Message) -> str:
    texts = (message.get(key) for key in REASONING)
    return next((text.strip() for text in texts if isinstance(text, str) and text), "")


def _after_reasoning(begun: Written, whole: Written, reasoning: str, thinking: Thinking) -> Written | None:
    """The answer after a prompt that begins reasoning, or closes it, where the template writes an answer without.

    Such templates keep earlier answers' reasoning out of a conversation. The model has to write it all the same.
    None: the prompt and the conversation part elsewhere.
    """
    same = next((i for i, (a, b) in enumerate(zip(begun, whole, strict=False)) if a != b), min(len(begun), len(whole)))
    opener, closer = thinking.opener.strip(), thinking.closer
    for marker in (opener, closer):  # back to the beginning of a marker that both are inside of
        for start in range(max(0, same - len(marker) + 1), same):
            if begun.startswith(marker, start) or whole.startswith(marker, start):
                same = start
                break
    more, rest = str.strip(begun[same:]), whole[same:].lstrip()
    written: str = Written(reasoning + "\n")
    gap = Written("\n\n")
    if rest.startswith(opener):
        end = rest.find(closer)
        if end < 0:
            return None
        written, gap, rest = rest[len(opener) : end], Written(), rest[end + len(closer) :]
    elif rest.startswith(closer):
        written, gap, rest = Written(), Written(), rest[len(closer) :]
    if more in ("", opener) and thinking.after(begun).opened:
        return Written().join((written, Written.by_template(closer), gap, rest))
    closed = more.startswith(opener) and more.endswith(closer) and not more[len(opener) : -len(closer)].strip()
    return rest if closed and not written.strip() else None


def _check_whole(message: Message, answer: Written) -> None:
    """Raises where the template has left out what the model is to learn."""
    parts = {"content": _text(message), "reasoning": _reasoning(message)}
    for i, call in enumerate(message.get("tool_calls") or ()):
        parts[f"tool_calls[{i}]"] = call.get("function", call).get("name", "")
    for name, text in parts.items():
        if text not in answer:
            raise TemplateError(
                f"the chat template leaves out or changes the {name} of an answer",
                hint="remove it, or use a model whose template has a place for it",
            )
