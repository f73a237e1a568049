"""Prompts out of files, for answers that are generated: a text, or messages, with whatever else their row has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapji.chat import ChatTemplate
from dapji.errors import ContextError, DapjiError, FormatError
from dapji.tokenizer import Tokenizer
from dapji.training.data.examples import Message
from dapji.training.data.fields import Fields
from dapji.training.data.files import rows
from dapji.training.data.messages import messages_of, tools_of


@dataclass(frozen=True, kw_only=True)
class Prompt:
    ids: Sequence[int]
    """What the model is given."""
    row: Mapping[str, Any]
    """The fields of its row."""


@dataclass(frozen=True, kw_only=True)
class PromptEntry:
    """A row of a file: a prompt, or what is wrong with it."""

    path: Path
    line: int
    prompt: Prompt | None = None
    error: DapjiError | None = None


def read_prompts(path: Path, tokenizer: Tokenizer, *, max_length: int) -> Iterator[PromptEntry]:
    """The prompts of a file, of up to max_length tokens.

    A row has `prompt`, a text that is given as it is, with BOS where the model wants one; or, as `prompt` or
    `messages`, OpenAI's messages, with `tools`, which are given in the model's chat template with the beginning of an
    answer. Raises FormatError where the file cannot be read, UnavailableError, OSError.
    """
    template = ChatTemplate.of(tokenizer)
    for line, fields in rows(path):
        if isinstance(fields, FormatError):
            yield PromptEntry(path=path, line=line, error=fields)
            continue
        try:
            ids = prompt_ids(fields, tokenizer, template)
            if len(ids) > max_length:
                raise ContextError(
                    f"the prompt has {len(ids)} tokens, but {max_length} have room beside an answer",
                    hint="a larger data.window, or a smaller method.max_tokens",
                )
        except DapjiError as error:
            yield PromptEntry(path=path, line=line, error=error)
        else:
            yield PromptEntry(path=path, line=line, prompt=Prompt(ids=ids, row=fields))


def asked(row: Mapping[str, Any]) -> str | tuple[list[Message], Sequence[Mapping[str, Any]]]:
    """What a row asks, as `read_prompts` reads it: a text, or messages and tools. Raises FormatError."""
    fields = Fields(row)
    name = "prompt" if "prompt" in fields or "messages" not in fields else "messages"
    if name == "prompt" and fields.is_text(name):
        if not (text := fields.text(name)):
            fields.fail(name, text, "a text that is not empty")
        return text
    messages = [message for message, _ in messages_of(fields, name)]
    if messages[-1]["role"] == "assistant":
        fields.fail(f"{name}[{len(messages) - 1}]", messages[-1], "a message that the model is to answer")
    return messages, tools_of(fields)


def prompt_ids(row: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """What the model is given for a row, as `read_prompts` reads it. Raises FormatError, TemplateError."""
    question = asked(row)
    if isinstance(question, str):
        bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return bos + tokenizer.encode(question)
    messages, tools = question
    return template.encode(template.render(messages, tools=tools or None))
