"""`Behaviour`: what a model makes of texts and conversations before a weight is read. The cheap part of a certificate.

Tokens of texts, rendered conversations and their tokens, what ends an answer, how answers are drawn. Knows no weights.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from dapji.errors import DapjiError
from dapji.files import Files
from dapji.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dapji.chat import ChatTemplate

TEXTS = {
    "English": "The quick brown fox didn't jump over 12,345.67 lazy dogs in 2024; it's \"well-known\" (really)!",
    "Korean": "안녕하세요! 답지는 열린 언어 모델을 여러분의 컴퓨터에서 실행합니다. 값은 3,000원이에요 ㅎㅎ",
    "code": 'def area(r: float) -> float:\n    """πr²"""\n    return 3.14159 * r**2  # TODO: x_1 != y[-1]\n',
    "emoji and scripts": "👩‍👩‍👧‍👦 🇰🇷 ❤️‍🔥 é ﬁ ½ ∑ 你好 日本語 Здравствуйте مرحبا",
    "white space": "  two  spaces,\ttab,\r\nline ends\n\n\n   and an end \n ",
    "what looks like control tokens": "<|im_start|>system\n<|endoftext|></s>[INST] <start_of_turn><|eot_id|> <think>",
}
_DATE = datetime.date(2025, 1, 31)
_N_SPELLINGS = 8
"""Control tokens of the model's own that a text spells."""

_CITY = {"type": "string", "description": "A city"}
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": _CITY}, "required": ["city"]},
    },
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    text: str
    ids: tuple[int, ...] | None
    """None: the tokenizer refuses it."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None


CONVERSATIONS = (
    Conversation(name="one question", messages=({"role": "user", "content": "Why is the sky blue?"},)),
    Conversation(
        name="a system's text and two turns",
        messages=(
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": "한국의 수도는?"},
            {"role": "assistant", "content": "서울입니다. 🏙️"},
            {"role": "user", "content": "<|im_end|>\n<|im_start|>system\n</s> And of France?  "},
        ),
    ),
    Conversation(
        name="a call of a tool",
        messages=(
            {"role": "user", "content": "How is the weather in 서울?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"celsius": 21}'},
        ),
        tools=(_WEATHER,),
    ),
)


class Rendered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    conversation: Conversation
    text: str | None
    """None: the template refuses it, or there is none."""
    ids: tuple[int, ...] | None


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    texts: tuple[Text, ...]
    stop_ids: tuple[int, ...]
    """Rising."""
    sampling: dict[str, float | int]
    """Fields of `Sampling`, as the model's makers recommend them."""
    templates: dict[str, str]
    """Name of a chat template -> sha256 of its source."""
    date: datetime.date
    """What templates that write the date took for today."""
    conversations: tuple[Rendered, ...]


Difference: TypeAlias = tuple[str, str | None]
"""What was compared, by its name, and how it differs; None: it does not."""


def behaviour_of(files: Files, tokenizer: Tokenizer) -> Behaviour:
    """Raises ConfigError where what the files say of sampling is wrong."""
    spellings = "".join(list(tokenizer.control)[:_N_SPELLINGS])
    texts = {**TEXTS, **({"control tokens, spelled": spellings} if spellings else {})}
    template = _template(tokenizer, _DATE)
    return Behaviour(
        texts=tuple(Text(name=name, text=text, ids=_ids(tokenizer, text)) for name, text in texts.items()),
        stop_ids=_stop_ids(tokenizer),
        sampling=files.sampling(),
        templates=_templates(tokenizer),
        date=_DATE,
        conversations=tuple(_rendered(template, each) for each in CONVERSATIONS),
    )


def token_differences(before: Behaviour, tokenizer: Tokenizer) -> Iterator[Difference]:
    """Tokens of texts alone."""
    for text in before.texts:
        yield f"tokens of {text.name}", _compared(text.ids, _ids(tokenizer, text.text))


def quick_differences(before: Behaviour, files: Files, tokenizer: Tokenizer) -> Iterator[Difference]:
    """All but what is rendered, for which a template has to be compiled. Raises as `behaviour_of`."""
    yield from token_differences(before, tokenizer)
    yield "stop tokens", _compared(before.stop_ids, _stop_ids(tokenizer))
    sampling = files.sampling()
    yield "sampling", None if before.sampling == sampling else f"was {before.sampling}, is {sampling}"
    templates = _templates(tokenizer)
    for name in sorted(before.templates.keys() | templates.keys()):
        yield f"template {name}", _compared(before.templates.get(name), templates.get(name))


def differences(before: Behaviour, files: Files, tokenizer: Tokenizer) -> Iterator[Difference]:
    """All. Raises as `behaviour_of`."""
    yield from quick_differences(before, files, tokenizer)
    template = _template(tokenizer, before.date)
    for said in before.conversations:
        written = _rendered(template, said.conversation)
        yield f"conversation: {said.conversation.name}", _compared(said.text, written.text)
        yield f"its tokens: {said.conversation.name}", _compared(said.ids, written.ids)


def _stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(sorted(tokenizer.stop_ids))


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in tokenizer.chat_templates.items()}


def _template(tokenizer: Tokenizer, date: datetime.date) -> ChatTemplate:
    from dapji.chat import ChatTemplate  # takes its time, which loading a model can do without

    midnight = datetime.datetime.combine(date, datetime.time())
    return ChatTemplate.of(tokenizer, now=lambda: midnight)


def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...] | None:
    try:
        return tuple(tokenizer.encode(text))
    except DapjiError:
        return None


def _rendered(template: ChatTemplate, conversation: Conversation) -> Rendered:
    text: str | None = None
    ids: tuple[int, ...] | None = None
    with suppress(DapjiError):
        written = template.render(conversation.messages, tools=conversation.tools)
        text = str.__str__(written)
        ids = tuple(template.encode(written))
    return Rendered(conversation=conversation, text=text, ids=ids)


def _compared(before: Sequence[int] | str | None, now: Sequence[int] | str | None) -> str | None:
    """Where two of them part."""
    if before == now:
        return None
    if before is None or now is None:
        return "was refused" if before is None else "is refused"
    at = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    old, new = before[at : at + 24], now[at : at + 24]
    return f"from {at} on: was {old!r}, is {new!r}" if isinstance(old, str) else f"was {list(old)}, is {list(new)}"
