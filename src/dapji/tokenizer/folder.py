"""A tokenizer from a folder in the Hugging Face layout.

tokenizer.json holds the vocabulary and the rules; without it a SentencePiece model (`tokenizer.model`), a tiktoken
file (`tokenizer.model`, `tiktoken.model`) or tekken.json is read. tokenizer_config.json and special_tokens_map.json
hold the special tokens and chat templates (or chat_template.jinja, additional_chat_templates/*.jinja),
generation_config.json the end tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from dapji.errors import TokenizerError
from dapji.tokenizer import gguf, ranks, sentencepiece
from dapji.tokenizer.description import Description, end_ids, looks_like_control

_PROBE = (1 << 32) - 1
"""An id that no vocabulary has."""
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _AddedToken(msgspec.Struct):
    content: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _Bpe(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]


class _Decoder(msgspec.Struct):
    """A decoder."""

    type: str
    prepend_scheme: str = "always"
    decoders: list[_Decoder] = []


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerJson(msgspec.Struct):
    model: _Bpe
    added_tokens: list[_AddedToken] = []
    decoder: _Decoder | None = None


def describe(folder: Path) -> Description:
    """Read `folder`. Raises TokenizerError where a file is missing, is no JSON, or holds something unsupported."""
    config = _read(folder / "tokenizer_config.json") or {}
    names = _special_tokens(_read(folder / "special_tokens_map.json") or {}) | _special_tokens(config)
    path = folder / "tokenizer.json"
    raw = _read(path)
    description = _described_vocabulary(folder, config, names) if raw is None else _described(path, raw, config, names)
    return dataclasses.replace(
        description,
        stop_ids=description.stop_ids | _end_ids(_read(folder / "generation_config.json") or {}, folder),
        chat_templates=_chat_templates(folder, config),
    )


def _described(path: Path, raw: dict[str, Any], config: dict[str, Any], names: dict[str, str]) -> Description:
    """What tokenizer.json says."""
    kind = raw["model"].get("type", "BPE") if isinstance(raw.get("model"), dict) else None
    if kind != "BPE":
        raise TokenizerError(f"{path}: the model is {kind!r}, only 'BPE' is supported")
    try:
        parsed = msgspec.convert(raw, _TokenizerJson)
    except msgspec.ValidationError as error:
        raise TokenizerError(f"{path}: {error}") from error

    control: list[_AddedToken] = []
    text_tokens: list[_AddedToken] = []
    for token in parsed.added_tokens:
        (control if _steers(token, names) else text_tokens).append(token)
    _check_control(path, control)
    control_ids = {token.content: token.id for token in control}
    pieces = _pieces(path, parsed)
    ids = {piece: i for i, piece in enumerate(pieces) if piece is not None}
    bos_id, eos_id = (ids.get(names.get(name, "")) for name in ("bos_token", "eos_token"))
    encoder = _encoder(path, raw, parsed.model, control_ids.keys(), text_tokens)
    parts = _parts(parsed.decoder)
    byte_level = any(part.type == "ByteLevel" for part in parts)
    if not byte_level:
        for token in text_tokens:  # Gemma's ▁▁, which stands for two spaces
            pieces[token.id] = token.content.replace("▁", " ")

    return Description(
        encoder=encoder,
        continuing_encoder=_continuing(encoder),
        pieces=pieces,
        literal=frozenset(token.id for token in parsed.added_tokens),
        byte_level=byte_level,
        space_prefix=any(
            part.type == "Strip" or (part.type == "Metaspace" and part.prepend_scheme != "never") for part in parts
        ),
        control=control_ids,
        strips=_strips(control),
        special_tokens=names,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=_adds_bos(path, config, raw.get("post_processor"), bos_id),
        text_end=_text_end(path, config, raw.get("post_processor"), eos_id),
        stop_ids=end_ids(control_ids) | ({eos_id} if eos_id is not None else set()),
        chat_templates={},
    )


def _described_vocabulary(folder: Path, config: dict[str, Any], names: dict[str, str]) -> Description:
    """What a vocabulary without tokenizer.json says, with the tokens that tokenizer_config.json adds to it."""
    metadata = _vocabulary(folder)
    added = _added_tokens(folder, config, names)
    _add(folder, metadata, added, names)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    for name, key in gguf.SPECIAL_IDS.items():
        if (spelling := names.get(key)) in tokens:
            metadata[f"tokenizer.ggml.{name}"] = tokens.index(spelling)
    description = gguf.describe(metadata)
    control = [token for token in added if token.content in description.control]
    _check_control(folder, control)
    return dataclasses.replace(
        description,
        strips=_strips(control),
        special_tokens=dict(description.special_tokens) | names,
        add_bos=bool(config.get("add_bos_token", description.add_bos)),
        text_end=(description.eos_id,) if config.get("add_eos_token") and description.eos_id is not None else (),
    )


def _vocabulary(folder: Path) -> dict[str, Any]:
    """GGUF metadata of the vocabulary beside which no tokenizer.json lies."""
    for name in ("tekken.json", "tiktoken.model", "tokenizer.model"):
        path = folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TokenizerError(f"{path}: {error}") from error
        if name == "tekken.json":
            return ranks.tekken_metadata(path, content)
        # A SentencePiece model begins with its first piece, field 1; a tiktoken file with a letter of base64.
        if content[:1] == b"\n":
            return sentencepiece.metadata(path, content)
        return ranks.tiktoken_metadata(path, content)
    raise TokenizerError(
        f"{folder} has no tokenizer.json, tokenizer.model, tiktoken.model or tekken.json",
        hint="save_pretrained of transformers writes a tokenizer.json from other files",
    )


def _added_tokens(folder: Path, config: dict[str, Any], names: dict[str, str]) -> list[_AddedToken]:
    """Tokens that tokenizer_config.json, or added_tokens.json in old folders, adds or renames, by id."""
    old = _read(folder / "added_tokens.json") or {}
    listed = config.get("added_tokens_decoder") or {i: {"content": content} for content, i in old.items()}
    try:
        return sorted(
            (
                msgspec.convert(token | {"id": int(i)}, _AddedToken, strict=False)
                for i, token in msgspec.convert(listed, dict[int, dict[str, Any]], strict=False).items()
            ),
            key=lambda token: token.id,
        )
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: {error}") from error


def _add(folder: Path, metadata: dict[str, Any], added: list[_AddedToken], names: dict[str, str]) -> None:
    """Give tokens that are added their places in the vocabulary."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"].tolist()
    scores = metadata.get("tokenizer.ggml.scores")
    if added and not 0 <= added[-1].id <= 2 * len(tokens) + 4096:
        raise TokenizerError(f"{folder}: an added token has id {added[-1].id}, the vocabulary {len(tokens)} tokens")
    for token in added:
        while len(tokens) <= token.id:
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(gguf.UNUSED)
        tokens[token.id] = token.content
        if types[token.id] not in (gguf.UNKNOWN, gguf.BYTE):
            types[token.id] = gguf.CONTROL if _steers(token, names) else gguf.USER_DEFINED
    metadata["tokenizer.ggml.token_type"] = np.array(types, dtype=np.int32)
    if scores is not None:
        metadata["tokenizer.ggml.scores"] = np.append(scores, np.zeros(len(tokens) - len(scores), dtype=np.float32))


def _steers(token: _AddedToken, names: dict[str, str]) -> bool:
    ends = {names.get("bos_token"), names.get("eos_token")}
    return token.special or token.content in ends or looks_like_control(token.content)


def _check_control(path: Path, control: Iterable[_AddedToken]) -> None:
    for token in control:
        if token.single_word or not token.content:
            raise TokenizerError(f"{path}: control token {token.content!r} is empty or has single_word, not supported")


def _strips(control: Iterable[_AddedToken]) -> dict[int, tuple[bool, bool]]:
    return {token.id: (token.lstrip, token.rstrip) for token in control if token.lstrip or token.rstrip}


def _encoder(
    path: Path, raw: dict[str, Any], model: _Bpe, control: Set[str], text_tokens: Iterable[_AddedToken]
) -> tokenizers.Tokenizer:
    """The file's tokenizer without its control tokens, so that no text can become one."""
    merges = (merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.merges)
    kept = [merge for merge in merges if not control & {"".join(merge), *merge}]
    # Characters that the vocabulary lacks become the unknown token. A whole word that is a token can only be
    # looked up where merges are ignored, and those are byte-level tokenizers, which lack no character.
    unknown = None if raw["model"].get("ignore_merges") else raw["model"].get("unk_token")
    # Text tokens get their ids here: left to the library, they would move up into the ids of the control tokens.
    vocabulary = model.vocab | {token.content: token.id for token in text_tokens}
    content = raw | {
        "model": raw["model"]
        | {
            "vocab": {piece: i for piece, i in vocabulary.items() if piece not in control or piece == unknown},
            "merges": kept,
            "unk_token": unknown,
        },
        "added_tokens": [token for token in raw.get("added_tokens", []) if token["content"] not in control],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    return _from_json(path, content)


def _adds_bos(path: Path, config: dict[str, Any], post_processor: Any, bos_id: int | None) -> bool:
    """As tokenizer_config.json says, else whether the post-processor puts the BOS before a text."""
    if bos_id is None or "add_bos_token" in config:
        return bool(config.get("add_bos_token", False))
    return _processed(path, post_processor)[:1] == [bos_id]


def _text_end(path: Path, config: dict[str, Any], post_processor: Any, eos_id: int | None) -> tuple[int, ...]:
    """What the post-processor puts after a text, else the EOS if tokenizer_config.json says so."""
    ids = _processed(path, post_processor)
    end = tuple(ids[ids.index(_PROBE) + 1 :])
    return (eos_id,) if not end and config.get("add_eos_token") and eos_id is not None else end


def _processed(path: Path, post_processor: Any) -> list[int]:
    """What the post-processor makes of a text of the one token _PROBE."""
    probe = {"type": "BPE", "vocab": {"a": _PROBE}, "merges": []}
    encoder = _from_json(path, {"version": "1.0", "added_tokens": [], "model": probe, "post_processor": post_processor})
    ids: list[int] = encoder.encode("a").ids
    return ids


def _from_json(path: Path, content: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(msgspec.json.encode(content).decode())
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    """A JSON object, or None where there is no such file."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _special_tokens(values: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is written as a string or as an object with its spelling in `content`."""
    names = {}
    for name in _SPECIAL_NAMES:
        value = values.get(name)
        spelling = value.get("content") if isinstance(value, dict) else value
        if isinstance(spelling, str):
            names[name] = spelling
    return names


def _pieces(path: Path, parsed: _TokenizerJson) -> list[str | None]:
    """Spellings by id. A few holes are normal (padding of the vocabulary), ids far beyond the number of tokens not."""
    ids = {i: piece for piece, i in parsed.model.vocab.items()}
    ids |= {token.id: token.content for token in parsed.added_tokens}
    if not ids:
        raise TokenizerError(f"{path}: the vocabulary is empty")
    if min(ids) < 0 or max(ids) > 2 * len(ids) + 4096:
        raise TokenizerError(f"{path}: ids reach from {min(ids)} to {max(ids)} for {len(ids)} tokens")
    return [ids.get(i) for i in range(max(ids) + 1)]


def _end_ids(generation: dict[str, Any], folder: Path) -> frozenset[int]:
    """The end tokens of generation_config.json, an id or a list of them."""
    value = generation.get("eos_token_id")
    ids = set(value if isinstance(value, list) else [] if value is None else [value])
    for i in ids:
        if not isinstance(i, int) or i < 0:
            raise TokenizerError(f"{folder / 'generation_config.json'}: eos_token_id holds {i!r}, which is no token id")
    return frozenset(ids)


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Files take precedence over the entry in tokenizer_config.json, as in transformers."""
    value = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        try:
            templates |= {entry.name: entry.template for entry in msgspec.convert(value, list[_NamedTemplate])}
        except msgspec.ValidationError as error:
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: chat_template: {error}") from error
    elif value is not None:
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: chat_template is a {type(value).__name__}")
    try:
        for path in (folder / "additional_chat_templates").glob("*.jinja"):
            templates[path.stem] = path.read_text(encoding="utf-8")
        if (folder / "chat_template.jinja").is_file():
            templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{folder}: a chat template cannot be read: {error}") from error
    return templates


def _parts(part: _Decoder | None) -> list[_Decoder]:
    """A decoder's parts: those of a Sequence, or itself alone."""
    if part is None or part.type != "Sequence":
        return [] if part is None else [part]
    return [inner for outer in part.decoders for inner in _parts(outer)]


def _continuing(encoder: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The encoder for text after the start, where Metaspace's scheme `first` must not put a space."""
    metaspace = encoder.pre_tokenizer
    if not isinstance(metaspace, pre_tokenizers.Metaspace) or metaspace.prepend_scheme != "first":
        return encoder
    copy = tokenizers.Tokenizer.from_str(encoder.to_str())
    copy.pre_tokenizer = pre_tokenizers.Metaspace(metaspace.replacement, "never", metaspace.split)
    return copy
