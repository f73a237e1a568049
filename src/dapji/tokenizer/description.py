"""`Description`: everything that a `Tokenizer` needs to know about one vocabulary, whichever file it came from.

`gguf` and `folder` produce it. Also what they share: GPT-2's alphabet, which spellings are control tokens, and which
control tokens end an answer. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tokenizers

END_TOKENS = frozenset(
    {
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<｜end▁of▁sentence｜>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<|EOT|>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<turn|>",
        "<|tool_response>",
        "<end_of_utterance>",
        "[|endofturn|]",
        "[e~[",
    }
)
"""Spellings under which published models end a turn or an answer. They end one where they are control tokens."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """One vocabulary and how text maps to it."""

    encoder: tokenizers.Tokenizer
    """Encodes plain text at the start of a sequence; never yields a control token."""
    continuing_encoder: tokenizers.Tokenizer
    """Encodes plain text that follows other tokens (the same object where that makes no difference)."""
    pieces: Sequence[str | None]
    """Spelling of every id; None where the vocabulary has a hole."""
    literal: frozenset[int]
    """Ids whose piece is plain text as it stands (control and added tokens)."""
    byte_level: bool
    """Other pieces are written in GPT-2's byte alphabet; else in SentencePiece's (▁ for a space, <0xE2> for a byte)."""
    space_prefix: bool
    """Encoding puts a space before the text, so decoding takes one away from the start."""
    control: Mapping[str, int]
    """Control tokens by spelling."""
    strips: Mapping[int, tuple[bool, bool]]
    """Control tokens that swallow the white space (before, after) them."""
    special_tokens: Mapping[str, str]
    """bos_token, eos_token, … by the names that chat templates use."""
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    text_end: tuple[int, ...]
    """Ids that come after a text which stands alone, and is not to be continued."""
    stop_ids: frozenset[int]
    chat_templates: Mapping[str, str]
    """By name; the usual one is `default`. Empty where the model has none."""


def byte_alphabet() -> dict[int, str]:
    """GPT-2's alphabet: byte -> the character that stands for it.

    Printable bytes stand for themselves, the others for the code points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def looks_like_control(spelling: str) -> bool:
    """Added tokens that steer the model even where a tokenizer.json says `special: false`: <|…|>, <｜…｜>, END_TOKENS.

    DeepSeek's <｜User｜> is such a one. llama.cpp's converter draws the same line when it writes GGUF.
    <|> is an operator, and </s> a tag of HTML, which Gemma has a token for.
    """
    return (spelling in END_TOKENS and spelling != "</s>") or (
        len(spelling) > 4
        and (
            (spelling.startswith("<|") and spelling.endswith("|>"))
            or (spelling.startswith("<｜") and spelling.endswith("｜>"))
        )
    )


def end_ids(control: Mapping[str, int]) -> frozenset[int]:
    """The control tokens that end an answer by their spelling.

    In the harmony format <|end|> only separates channels; <|return|> and <|call|> end the answer there.
    """
    names = END_TOKENS & control.keys()
    if "<|return|>" in names:
        names -= {"<|end|>"}
    return frozenset(control[name] for name in names)
