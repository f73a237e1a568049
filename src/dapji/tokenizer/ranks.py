"""Vocabularies whose merges follow from ranks, in the terms of GGUF metadata, which `gguf` describes.

Two formats: tiktoken's, a line `base64 rank` for each token, as Meta publishes Llama 3 and 4 and Moonshot AI Kimi; and
Mistral's tekken.json. A tiktoken file says neither how text is cut into words nor which tokens steer the model: that
stands in the program that its publisher reads it with. So only the published files are read, known by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dapji.errors import TokenizerError
from dapji.tokenizer.description import byte_alphabet
from dapji.tokenizer.gguf import CONTROL, MAX_PIECE, NORMAL
from dapji.tokenizer.pretokenizers import pre_tokenizer


def _numbered(name: str, numbers: range) -> list[str]:
    return [f"<|{name}_{i}|>" for i in numbers]


_LLAMA3 = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>", "<|image|>", *_numbered("reserved_special_token", range(2, 246))),
]
_TEXT, _VISION = "text_post_train_reserved_special_token", "vision_reserved_special_token"
_LLAMA4 = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *_numbered(_TEXT, range(6))),
    *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *_numbered(_TEXT, range(8, 69))),
    *("<|image_start|>", "<|image_end|>", *_numbered(_VISION, range(2)), "<|tile_x_separator|>"),
    *("<|tile_y_separator|>", *_numbered(_VISION, range(2, 6)), "<|image|>", *_numbered(_VISION, range(6, 7))),
    *("<|patch|>", *_numbered(_VISION, range(7, 1048)), *_numbered("reasoning_reserved_special_token", range(8))),
    *("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),
    *_numbered("reserved_special_token", range(904)),
]
_KIMI = ["[BOS]", "[EOS]", *_numbered("reserved_token", range(163586, 163840))]
"""Placeholders but for two: those in use have their names in tokenizer_config.json."""


@dataclass(frozen=True, kw_only=True)
class _Published:
    """What a published tiktoken file does not say itself."""

    pre: str
    control: list[str]
    """The control tokens, whose ids follow those of the file; the first two are BOS and EOS."""
    add_bos: bool


_PUBLISHED = {
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": _Published(
        pre="llama-bpe", control=_LLAMA3, add_bos=True
    ),
    "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed": _Published(
        pre="llama4", control=_LLAMA4, add_bos=True
    ),
    "b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103": _Published(
        pre="kimi-k2", control=_KIMI, add_bos=False
    ),
}
"""By the file's SHA-256: Llama 3 to 3.3, Llama 4, Kimi K2 and K3."""
_TEKKEN_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""The first control tokens of a tekken.json that lists none, as those up to version 7 do."""
_MAX_TOKENS = 1 << 20


class _TekkenConfig(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int


class _TekkenToken(msgspec.Struct):
    rank: int
    token_bytes: bytes  # base64, which msgspec decodes


class _TekkenSpecial(msgspec.Struct):
    rank: int
    token_str: str


class _Tekken(msgspec.Struct):
    config: _TekkenConfig
    vocab: list[_TekkenToken]
    special_tokens: list[_TekkenSpecial] | None = None


def tiktoken_metadata(path: Path, content: bytes) -> dict[str, Any]:
    """GGUF metadata of a tiktoken file. Raises TokenizerError where it is not one of those known."""
    digest = hashlib.sha256(content).hexdigest()
    if digest not in _PUBLISHED:
        raise TokenizerError(
            f"{path} is no SentencePiece model, and as a tiktoken file, with SHA-256 {digest}, it is not known: "
            "such a file does not say how text is cut into words, so only those of Llama 3, Llama 4 and Kimi are read",
            hint="save_pretrained of transformers writes a tokenizer.json, which says it",
        )
    published = _PUBLISHED[digest]
    tokens = [base64.b64decode(line.split()[0]) for line in content.splitlines()]
    return _metadata(path, published.pre, [], tokens, published.control) | {
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.add_bos_token": published.add_bos,
    }


def tekken_metadata(path: Path, content: bytes) -> dict[str, Any]:
    """GGUF metadata of a tekken.json. Raises TokenizerError where it is damaged or cuts text in an unknown way."""
    try:
        parsed = msgspec.json.decode(content, type=_Tekken)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from error
    config = parsed.config
    if (config.pattern,) != pre_tokenizer("tekken").patterns:
        raise TokenizerError(f"{path}: config.pattern is {config.pattern!r}, which is not Tekken's expression")
    n_control, n_tokens = config.default_num_special_tokens, config.default_vocab_size
    listed = (
        dict(enumerate(_TEKKEN_CONTROL))
        if parsed.special_tokens is None
        else {token.rank: token.token_str for token in parsed.special_tokens}
    )
    ranked = {token.rank: token.token_bytes for token in parsed.vocab}
    if not 0 < n_control < n_tokens <= min(n_control + len(ranked), _MAX_TOKENS):
        raise TokenizerError(
            f"{path}: {n_tokens} tokens of which {n_control} are control tokens, but vocab has {len(ranked)} ranks"
        )
    try:
        tokens = [ranked[rank] for rank in range(n_tokens - n_control)]
    except KeyError as error:
        raise TokenizerError(f"{path}: vocab has no token of rank {error}") from error
    control = [listed.get(i, f"<SPECIAL_{i}>") for i in range(n_control)]
    if missing := {"<s>", "</s>"} - set(control):
        raise TokenizerError(f"{path}: special_tokens has no {' and no '.join(sorted(missing))}")
    return _metadata(path, "tekken", control, tokens, []) | {
        "tokenizer.ggml.bos_token_id": control.index("<s>"),
        "tokenizer.ggml.eos_token_id": control.index("</s>"),
        "tokenizer.ggml.add_bos_token": True,
    }


def _metadata(path: Path, pre: str, before: list[str], ranked: list[bytes], after: list[str]) -> dict[str, Any]:
    """ranked: tokens, best rank first; control tokens stand before and after them."""
    alphabet = byte_alphabet()
    pieces = ["".join(map(alphabet.__getitem__, token)) for token in ranked]
    types = [CONTROL] * len(before) + [NORMAL] * len(pieces) + [CONTROL] * len(after)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*before, *pieces, *after],
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.merges": _merges(path, pieces),
    }


def _merges(path: Path, pieces: list[str]) -> list[str]:
    """Ranks join any two neighbours whose union is a token, the best rank first.

    That is BPE with a merge for every way to write a token as two tokens, in the order of their ranks.
    """
    known = set(pieces)
    merges = []
    for rank, piece in enumerate(pieces):
        if len(piece) > MAX_PIECE:
            raise TokenizerError(f"{path}: token {rank} has {len(piece)} bytes, the limit is {MAX_PIECE}")
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in known and piece[cut:] in known:
                merges.append(f"{piece[:cut]} {piece[cut:]}")
    return merges
