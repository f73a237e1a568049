"""A tokenizer from GGUF metadata alone: the keys `tokenizer.ggml.*` and `tokenizer.chat_template*`.

Three models: `gpt2`, byte-level BPE with a named pre-tokenizer; `llama`, SentencePiece-BPE with byte fallback, whose
merges follow from the pieces' scores; `gemma4`, the same with its merges written out. The keys are described in ggml's
docs/gguf.md. Control tokens are left out of the encoder's vocabulary, so that no text can become one. Sees a mapping,
not a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, normalizers, pre_tokenizers

from dapji.errors import TokenizerError
from dapji.tokenizer.description import Description, end_ids, looks_like_control
from dapji.tokenizer.pretokenizers import PreTokenizer, pre_tokenizer

_MODELS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece-BPE",
    "gemma4": "SentencePiece-BPE with written merges",
}
_Types = NDArray[Any]
"""[number of tokens]: the type of each, one of _TYPES."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, SentencePiece's numbers."""
_TYPES = range(7)
"""0 is `undefined`; such tokens, and those of type `unused`, are never the outcome of encoding."""
SPECIAL_IDS = {  # key in the file (one misspelt there since ever) -> name that templates use
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
    "seperator_token_id": "sep_token",
    "mask_token_id": "mask_token",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
MAX_PIECE = 1024
"""Characters. Every way to cut a piece in two is tried, so a longer one would be a way to keep us busy."""
_LLAMA_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


class _Metadata:
    """Typed access to the keys under `tokenizer.ggml.`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TokenizerError(f"tokenizer.ggml.{key} is a {type(value).__name__}, expected {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None:
            raise TokenizerError(f"tokenizer.ggml.{key} is missing")
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise TokenizerError(f"tokenizer.ggml.{key} is not an array of strings")
        return value

    def numbers(self, key: str, length: int) -> NDArray[Any] | None:
        """[length], one number for each token; None where the key is missing."""
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.ndim != 1:
            raise TokenizerError(f"tokenizer.ggml.{key} is not an array of numbers")
        if len(value) != length:
            raise TokenizerError(
                f"tokenizer.ggml.{key} has {len(value)} entries, but tokenizer.ggml.tokens has {length}"
            )
        if not np.isfinite(value).all():
            raise TokenizerError(f"tokenizer.ggml.{key} holds a number that is not finite")
        return value


def describe(values: Mapping[str, Any]) -> Description:
    """The description that GGUF metadata holds; keys that have nothing to do with tokenizers may be among them.

    Raises TokenizerError where a key is missing, has the wrong type or length, or names something unsupported.
    """
    metadata = _Metadata(values)
    model = metadata.get("model", str)
    if model not in _MODELS:
        raise TokenizerError(
            f"tokenizer.ggml.model is {model!r}, supported are "
            + ", ".join(f"{name!r} ({what})" for name, what in _MODELS.items())
        )
    tokens = metadata.strings("tokens")
    types = metadata.numbers("token_type", len(tokens))
    if types is None:  # all of one kind, so only the spelling can tell what steers the model
        types = np.array([USER_DEFINED if looks_like_control(token) else NORMAL for token in tokens])
    types = types.copy()  # `_mark_control` writes
    special = _special_ids(metadata, len(tokens), model)
    _check(tokens, types)
    _mark_control(tokens, types, special)
    control = _of_type(tokens, types, CONTROL, UNKNOWN)

    add_bos, space_prefix = True, False
    if model == "gpt2":
        pre = pre_tokenizer(_pre_name(metadata))
        encoder = _byte_level(tokens, types, metadata.strings("merges"), pre)
        add_bos = pre.add_bos
    elif model == "llama":
        space_prefix = metadata.get("add_space_prefix", bool, True)
        if metadata.get("remove_extra_whitespaces", bool, False):
            raise TokenizerError("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported")
        encoder = _sentencepiece(tokens, types, metadata.numbers("scores", len(tokens)), space_prefix)
    else:
        encoder = _gemma4(tokens, types, metadata.strings("merges"))
    encoder.add_tokens(
        [tokenizers.AddedToken(token, normalized=False) for token in _of_type(tokens, types, USER_DEFINED)]
    )

    return Description(
        encoder=encoder,
        continuing_encoder=encoder,
        pieces=[token or None for token in tokens],
        literal=frozenset(_indices(types, CONTROL, UNKNOWN, USER_DEFINED)),
        byte_level=model == "gpt2",
        space_prefix=space_prefix,
        control=control,
        strips={},
        special_tokens={name: tokens[special[key]] for key, name in SPECIAL_IDS.items() if key in special},
        bos_id=special.get("bos_token_id"),
        eos_id=special.get("eos_token_id"),
        add_bos=metadata.get("add_bos_token", bool, add_bos),
        text_end=_text_end(metadata, special.get("eos_token_id")),
        stop_ids=end_ids(control) | {special[key] for key in _END_IDS if key in special},
        chat_templates=_chat_templates(values),
    )


def _text_end(metadata: _Metadata, eos_id: int | None) -> tuple[int, ...]:
    return (eos_id,) if metadata.get("add_eos_token", bool, False) and eos_id is not None else ()


def _pre_name(metadata: _Metadata) -> str:
    name = metadata.get("pre", str)
    if name is None:
        raise TokenizerError(
            "tokenizer.ggml.pre is missing, so nothing says how this model cuts text into words",
            hint="the file comes from an old converter; use a newer conversion of the same model",
        )
    return str(name)


def _special_ids(metadata: _Metadata, n_tokens: int, model: str) -> dict[str, int]:
    """Special ids by key, those that the file states and, for `llama`, SentencePiece's defaults."""
    defaults = _LLAMA_DEFAULTS if model == "llama" else {}
    ids: dict[str, int] = {}
    for key in {*SPECIAL_IDS, *_END_IDS}:
        value = metadata.get(key, int, defaults.get(key))
        if value is None:
            continue
        if not 0 <= value < n_tokens:
            raise TokenizerError(f"tokenizer.ggml.{key} is {value}, but the vocabulary has {n_tokens} tokens")
        ids[key] = value
    return ids


def _check(tokens: list[str], types: _Types) -> None:
    """No spelling twice (ids could not be told apart), only the token types that ggml defines."""
    if len(set(tokens)) != len(tokens) - max(0, tokens.count("") - 1):
        twice = next(token for token, count in Counter(tokens).items() if token and count > 1)
        raise TokenizerError(f"tokenizer.ggml.tokens holds {twice!r} twice")
    unknown = np.flatnonzero(~np.isin(types, _TYPES))
    if len(unknown):
        i = unknown[0]
        raise TokenizerError(f"tokenizer.ggml.token_type[{i}] is {types[i]}, it must be {min(_TYPES)} to {max(_TYPES)}")


def _indices(types: _Types, *kinds: int) -> list[int]:
    indices: list[int] = np.flatnonzero(np.isin(types, kinds)).tolist()
    return indices


def _of_type(tokens: list[str], types: _Types, *kinds: int) -> dict[str, int]:
    return {tokens[i]: i for i in _indices(types, *kinds) if tokens[i]}


def _mark_control(tokens: list[str], types: _Types, special: Mapping[str, int]) -> None:
    """Set the type of tokens that steer the model but are typed otherwise: some converters took them for text."""
    for i in _indices(types, USER_DEFINED):
        if looks_like_control(tokens[i]):
            types[i] = CONTROL
    for key in ("bos_token_id", *_END_IDS):
        if key in special:
            types[special[key]] = CONTROL


def _bpe(vocabulary: dict[str, int], merges: list[str], **options: bool) -> tokenizers.Tokenizer:
    pairs: list[Any] = [tuple(merge.split(" ", 1)) for merge in merges]
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not pair[0]:
            # The space that parts a pair is the first one after the first character: where a space is a token's own
            # first character, byte-level BPE writes it as another letter, but a raw one may begin a pair of gemma4.
            cut = merges[i].find(" ", 1)
            if cut == -1:
                raise TokenizerError(f"tokenizer.ggml.merges[{i}] is no pair: {merges[i]!r}")
            pairs[i] = (merges[i][:cut], merges[i][cut + 1 :])
    # The library panics, which is no Exception, where a union is missing.
    if not all(map(vocabulary.__contains__, map("".join, pairs))):
        left, right = next(pair for pair in pairs if "".join(pair) not in vocabulary)
        raise TokenizerError(f"tokenizer.ggml.merges joins {left!r} and {right!r}, but the union is no token")
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, **options))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error


def _byte_level(tokens: list[str], types: _Types, merges: list[str], pre: PreTokenizer) -> tokenizers.Tokenizer:
    vocabulary = _of_type(tokens, types, NORMAL, USER_DEFINED)
    encoder = _bpe(vocabulary, merges, ignore_merges=pre.ignore_merges)
    if pre.nfc:
        encoder.normalizer = normalizers.NFC()
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return encoder


def _sentencepiece(
    tokens: list[str], types: _Types, scores: NDArray[Any] | None, space_prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece-BPE always joins the neighbours whose union is the piece of the best score, leftmost first.

    That is BPE with a merge for every way to write a piece as two pieces, ranked by the score of the whole.
    """
    if scores is None:
        raise TokenizerError("tokenizer.ggml.scores is missing")
    pieces = _of_type(tokens, types, NORMAL)
    score_of = scores.tolist()
    ranked: list[tuple[float, int, str, int]] = []
    for piece, i in pieces.items():
        if len(piece) > MAX_PIECE:
            raise TokenizerError(f"tokenizer.ggml.tokens[{i}] has {len(piece)} characters, the limit is {MAX_PIECE}")
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                # Of equal scores, as runs of spaces have, the longest grows: the leftmost did so far.
                ranked.append((-score_of[i], -len(piece), piece, -cut))
    ranked.sort()
    vocabulary = _of_type(tokens, types, NORMAL, USER_DEFINED) | _bytes(tokens, types)
    merges = [(piece[:-cut], piece[-cut:]) for _, _, piece, cut in ranked]
    encoder = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space_prefix else replace
    return encoder


def _gemma4(tokens: list[str], types: _Types, merges: list[str]) -> tokenizers.Tokenizer:
    vocabulary = _of_type(tokens, types, NORMAL, USER_DEFINED) | _bytes(tokens, types)
    encoder = _bpe(vocabulary, merges, byte_fallback=True)
    encoder.normalizer = normalizers.Replace(" ", "▁")
    encoder.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\n+"), "isolated")
    return encoder


def _bytes(tokens: list[str], types: _Types) -> dict[str, int]:
    """The 256 tokens that stand for one byte each."""
    found = _of_type(tokens, types, BYTE)
    wanted = [f"<0x{byte:02X}>" for byte in range(256)]
    if missing := [spelling for spelling in wanted if spelling not in found]:
        raise TokenizerError(f"tokenizer.ggml.tokens has no token of type byte for {', '.join(missing[:8])}")
    return {spelling: found[spelling] for spelling in wanted}


def _chat_templates(values: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    for key, value in values.items():
        if key == "tokenizer.chat_template":
            templates["default"] = value
        elif key.startswith("tokenizer.chat_template."):
            templates[key.removeprefix("tokenizer.chat_template.")] = value
        else:
            continue
        if not isinstance(value, str):
            raise TokenizerError(f"{key} is a {type(value).__name__}, expected a string")
    return templates
