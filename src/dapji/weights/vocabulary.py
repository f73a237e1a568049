"""A tokenizer's files from one layout to the other: tokenizer.json and its companions <-> GGUF metadata.

Both are read by `tokenizer`, whose descriptions this module writes in the other's terms; so what is written is what
Dapji itself understood of the source. What the target cannot say is a TokenizerError, never left out. Knows no models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dapji.errors import TokenizerError
from dapji.tokenizer import folder, gguf
from dapji.tokenizer.description import Description, end_ids
from dapji.tokenizer.gguf import BYTE, CONTROL, NORMAL, SPECIAL_IDS, UNKNOWN, UNUSED, USER_DEFINED
from dapji.tokenizer.pretokenizers import PRE_TOKENIZERS

MODEL_KEY = "tokenizer.ggml.model"

_PROBE = (
    "Hello, World!  It's 1234567.89 — we'LL don't DON'T\tcamelCaseHTTPServer snake_case x=y+1;//a/b\n\n  \n\r\n"
    "Ünïcode café ΑΩ Привет 한국어 문장과 日本語カタカナひらがな漢字 ไทยก็ हिन्दी العربية 🙂👩‍💻 ﬁ ½ ²³ ٣٤ "
    "\u1112\u1161\u11ab e\u0301 I'M they'd  trailing   \n $100%^&*() '' \"quotes\" <|tag|> [x] {y} ~`|\\ a1b2"
    f" ..//\n..  {' ' * 40}x{' ' * 31}{chr(10) * 40}\t\t\t\t"
)
"""A text that the known pre-tokenizers cut differently, with long runs of white space, which Gemma adds tokens for."""

_ENDS_WITH_KEYS = frozenset({"<|eot|>", "<|eom|>"})
"""End tokens whose spelling is known to us and not to other readers of GGUF: Llama 4's."""


def gguf_metadata(path: Path, *, n_tokens: int) -> dict[str, Any]:
    """`tokenizer.*` metadata of the tokenizer in a Hugging Face folder.

    n_tokens: rows of the embedding, up to which the vocabulary is filled with unused tokens. Raises TokenizerError
    where the folder's tokenizer cannot be used or has no form in GGUF.
    """
    description = folder.describe(path)
    written = json.loads(description.encoder.to_str())
    model: dict[str, Any] = written["model"]
    pieces = list(description.pieces)
    if len(pieces) > n_tokens:
        raise TokenizerError(f"{path}: the tokenizer has {len(pieces)} tokens, the model only {n_tokens}")
    if description.strips:
        raise TokenizerError(
            f"{path}: {pieces[min(description.strips)]!r} swallows white space around it, for which GGUF has no form"
        )
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise TokenizerError(f"{path}: GGUF has no form for prefixes and suffixes of subwords")
    pieces += [None] * (n_tokens - len(pieces))
    types = [_type(i, piece, description) for i, piece in enumerate(pieces)]

    keys: dict[str, Any] = {}
    if description.byte_level:
        keys |= {"model": "gpt2", "pre": _pre_name(description.encoder, path)}
        keys["merges"] = [" ".join(pair) for pair in model["merges"]]
    else:
        keys |= {"model": "llama", "pre": "default", "add_space_prefix": description.space_prefix}
        keys["scores"] = _scores(pieces, types, model["merges"], path)
    keys["tokens"] = [f"[PAD{i}]" if piece is None else piece for i, piece in enumerate(pieces)]
    keys["token_type"] = np.array(types, dtype=np.int32)
    ids = {piece: i for i, piece in enumerate(pieces) if piece is not None}
    for key, name in SPECIAL_IDS.items():
        spelling = description.special_tokens.get(name, "")
        if spelling in ids:
            keys[key] = ids[spelling]
    keys["add_bos_token"] = description.add_bos
    stop_ids, eos_id = description.stop_ids, description.eos_id
    if description.text_end:  # in GGUF that is the EOS, which need not be what ends an answer
        if len(description.text_end) > 1:
            raise TokenizerError(f"{path}: GGUF has no form for {len(description.text_end)} tokens at a text's end")
        (eos_id,) = description.text_end
        keys |= {"add_eos_token": True, "eos_token_id": eos_id}
    known = end_ids({name: i for name, i in description.control.items() if name not in _ENDS_WITH_KEYS})
    own = sorted(stop_ids - known - {eos_id}, key=lambda i: (i == ids.get("<|eom|>"), i))
    if len(own) > 2:
        raise TokenizerError(f"{path}: GGUF has room for 2 end tokens of unusual names, not for {own}")
    keys |= zip(("eot_token_id", "eom_token_id"), own, strict=False)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if gguf.describe(metadata).encoder.encode(_PROBE).ids != description.encoder.encode(_PROBE).ids:
        raise TokenizerError(f"{path}: the vocabulary has rules for which GGUF has no form")
    for name, template in description.chat_templates.items():
        metadata["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = template
    return metadata


def _type(i: int, piece: str | None, description: Description) -> int:
    if piece is None:
        return UNUSED
    if piece == description.special_tokens.get("unk_token") and not description.byte_level:
        return UNKNOWN
    if description.control.get(piece) == i:
        return CONTROL
    if i in description.literal:
        return USER_DEFINED
    return BYTE if not description.byte_level and len(piece) == 6 and piece.startswith("<0x") else NORMAL


def _pre_name(encoder: tokenizers.Tokenizer, path: Path) -> str:
    """The name in GGUF of the way in which `encoder` cuts text: the one whose cuts of a probing text are the same."""
    wanted = _cuts(encoder)
    for name in PRE_TOKENIZERS:
        keys = {"model": "gpt2", "pre": name, "tokens": [], "merges": []}
        candidate = gguf.describe({f"tokenizer.ggml.{key}": value for key, value in keys.items()}).encoder
        if _cuts(candidate) == wanted:
            return name
    raise TokenizerError(
        f"{path / 'tokenizer.json'}: cuts text into words in a way that has no name in GGUF",
        hint="known ways: " + ", ".join(sorted(PRE_TOKENIZERS)),
    )


def _cuts(encoder: tokenizers.Tokenizer) -> tuple[list[str], bool]:
    """The words of the probing text, and whether a word that is a token is taken whole."""
    text = _PROBE if encoder.normalizer is None else encoder.normalizer.normalize_str(_PROBE)
    words = [(0, text)] if encoder.pre_tokenizer is None else encoder.pre_tokenizer.pre_tokenize_str(text)
    return [str(word[0]) for word in words], bool(encoder.model.ignore_merges)


def _scores(
    pieces: list[str | None], types: list[int], merges: list[list[str]], path: Path
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """SentencePiece's scores, of which only the order matters: the rank of the first merge that makes the piece.

    SentencePiece joins any two neighbours whose union is a piece, the best score first; a list of merges says the same
    only if it has every way to write a piece as two, all ways of one piece in a row. Merges of added tokens do not
    count: these are found before anything is joined.
    """
    normal = {piece for piece, kind in zip(pieces, types, strict=True) if piece is not None and kind == NORMAL}
    ranks: dict[str, int] = {}
    previous = ""
    n_ways = 0
    for left, right in merges:
        piece = left + right
        if not normal >= {left, right, piece}:
            continue
        if piece != previous and piece in ranks:
            raise TokenizerError(f"{path}: the merges of {piece!r} are not in a row, for which GGUF has no form")
        n_ways += 1
        ranks.setdefault(piece, len(ranks))
        previous = piece
    all_ways = sum(piece[:cut] in normal and piece[cut:] in normal for piece in normal for cut in range(1, len(piece)))
    if n_ways != all_ways:
        raise TokenizerError(f"{path}: {n_ways} merges, SentencePiece would have {all_ways}; GGUF has no form for it")
    scores = np.zeros(len(pieces), dtype=np.float32)
    for i, spelling in enumerate(pieces):
        if spelling is not None and types[i] == NORMAL:
            scores[i] = -ranks.get(spelling, len(ranks))
    return scores


def huggingface_files(metadata: Mapping[str, Any]) -> dict[str, object]:
    """tokenizer.json, tokenizer_config.json and generation_config.json of the tokenizer in GGUF metadata, as objects.

    Raises TokenizerError.
    """
    description = gguf.describe(metadata)
    written = json.loads(description.encoder.to_str())
    types = metadata.get("tokenizer.ggml.token_type")
    pieces = {
        i: piece
        for i, piece in enumerate(description.pieces)
        if piece is not None and (types is None or types[i] != UNUSED)
    }
    model: dict[str, Any] = written["model"]
    model["vocab"] = {piece: i for i, piece in pieces.items()}
    control = set(description.control.values())
    written["added_tokens"] = [
        {"id": i, "content": pieces[i], "special": i in control}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in sorted(description.literal)
    ]
    if description.byte_level:
        written["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    else:
        model |= {"unk_token": description.special_tokens.get("unk_token"), "fuse_unk": True}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        written["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([strip] if description.space_prefix else []),
            ],
        }
    before = [description.bos_id] if description.add_bos and description.bos_id is not None else []
    if around := [*before, *description.text_end]:
        begin, end = (
            [{"SpecialToken": {"id": pieces[i], "type_id": 0}} for i in ids] for ids in (before, description.text_end)
        )
        first: list[object] = [*begin, {"Sequence": {"id": "A", "type_id": 0}}]
        written["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*first, *end],
            "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}, *end],
            "special_tokens": {pieces[i]: {"id": pieces[i], "ids": [i], "tokens": [pieces[i]]} for i in around},
        }
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **description.special_tokens}
    config |= {"add_bos_token": description.add_bos, "clean_up_tokenization_spaces": False}
    if templates := description.chat_templates:
        only_default = set(templates) == {"default"}
        config["chat_template"] = (
            templates["default"]
            if only_default
            else [{"name": name, "template": template} for name, template in templates.items()]
        )
    generation: dict[str, object] = {}
    if description.bos_id is not None:
        generation["bos_token_id"] = description.bos_id
    if description.stop_ids:
        generation["eos_token_id"] = sorted(description.stop_ids)
    return {"tokenizer.json": written, "tokenizer_config.json": config, "generation_config.json": generation}
