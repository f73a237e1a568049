"""A SentencePiece model file (`tokenizer.model`) in the terms of GGUF metadata, which `gguf` describes.

The file is a protobuf message, ModelProto of SentencePiece's sentencepiece_model.proto; of its wire format, which
protobuf's documentation describes, no more is read than it needs. Knows no other files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dapji.errors import TokenizerError
from dapji.tokenizer.gguf import NORMAL, USER_DEFINED

_BPE = 2
_MODEL_TYPES = {1: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
_SPECIAL_IDS = {  # field of TrainerSpec -> (key of GGUF, default)
    40: ("unknown_token_id", 0),
    41: ("bos_token_id", 1),
    42: ("eos_token_id", 2),
    43: ("padding_token_id", -1),
}

_Value = int | bytes


def metadata(path: Path, content: bytes) -> dict[str, Any]:
    """GGUF metadata of the model in `content`, read from `path`.

    Raises TokenizerError where it is no such model, or one whose rules GGUF's `llama` does not have.
    """
    try:
        fields = [*_fields(content)]
        pieces = [dict(_fields(value)) for number, value in fields if number == 1 and isinstance(value, bytes)]
        trainer, normalizer = (
            dict(_fields(b"".join(value for number, value in fields if number == wanted and isinstance(value, bytes))))
            for wanted in (2, 3)
        )
        tokens = [_bytes(piece, 1).decode() for piece in pieces]
        scores = [struct.unpack("<f", _bytes(piece, 2, b"\0\0\0\0"))[0] for piece in pieces]
        types = [_int(piece, 3, NORMAL) for piece in pieces]
    except (ValueError, struct.error) as error:
        raise TokenizerError(f"{path} is no SentencePiece model: {error}") from error
    kind = _int(trainer, 3, 1)
    if kind != _BPE:
        raise TokenizerError(f"{path}: the model is {_MODEL_TYPES.get(kind, kind)!r}, only 'bpe' is supported")
    unsupported = {
        "a table of normalisation": len(_bytes(normalizer, 2, b"")) > 0,
        "remove_extra_whitespaces": _int(normalizer, 4, 1) != 0,
        "spaces that are not escaped": _int(normalizer, 5, 1) == 0,
        "treat_whitespace_as_suffix": _int(trainer, 24, 0) != 0,
        "no byte_fallback": _int(trainer, 35, 0) == 0,
    }
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise TokenizerError(f"{path} has {' and '.join(found)}, which is not supported")
    # As text is searched for these before its spaces are escaped, they are spelt as they stand there.
    tokens = [
        token.replace("▁", " ") if type == USER_DEFINED else token for token, type in zip(tokens, types, strict=True)
    ]
    keys: dict[str, Any] = {"model": "llama", "tokens": tokens, "scores": np.array(scores, dtype=np.float32)}
    keys |= {"token_type": np.array(types, dtype=np.int32), "add_space_prefix": _int(normalizer, 3, 1) != 0}
    for field, (key, default) in _SPECIAL_IDS.items():
        if (value := _int(trainer, field, default)) >= 0:
            keys[key] = value
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _fields(message: bytes) -> Iterator[tuple[int, _Value]]:
    """Numbers and values of a message's fields. Raises ValueError where it does not add up."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value: _Value
            value, at = _varint(message, at)
        else:
            if kind == 2:
                size, at = _varint(message, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind} at byte {at}")
            if size > len(message) - at:
                raise ValueError(f"a field needs {size} bytes at {at}, there are {len(message) - at} more")
            value = message[at : at + size]
            at += size
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of up to 64 bits in groups of 7, and where it ends."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise ValueError(f"a number at byte {at} has no end")


def _int(fields: dict[int, _Value], number: int, default: int) -> int:
    """A signed number."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    value &= (1 << 32) - 1  # written as 64 bits where it is negative
    return value - (1 << 32) if value >> 31 else value


def _bytes(fields: dict[int, _Value], number: int, default: bytes | None = None) -> bytes:
    value = fields.get(number, default)
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} holds no bytes")
    return value
