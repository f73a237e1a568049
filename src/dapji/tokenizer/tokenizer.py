"""`Tokenizer`: text to token ids and back; `Detokenizer`: the same back direction, one id at a time.

Encoding runs in the `tokenizers` library; decoding is ours, over bytes, so that a character which spans several
tokens is never split. Must not know models, weights or chats.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dapji.errors import TokenizerError
from dapji.tokenizer import folder, gguf
from dapji.tokenizer.description import Description, byte_alphabet

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """One model's vocabulary, ready to encode and decode. Safe to share between threads."""

    def __init__(self, description: Description) -> None:
        self._description = description
        self._bytes: dict[int, bytes] = {}
        self._alphabet = {char: byte for byte, char in byte_alphabet().items()}
        pieces = set(description.pieces)
        self._known_bytes = bytes(
            byte for char, byte in self._alphabet.items() if not description.byte_level or char in pieces
        )
        self._control_ids = frozenset(description.control.values())
        spellings = sorted(description.control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata (key -> Python value). Raises TokenizerError."""
        return cls(gguf.describe(metadata))

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """From a folder in the Hugging Face layout: tokenizer.json or another vocabulary. Raises TokenizerError."""
        return cls(folder.describe(Path(path)))

    @property
    def vocab_size(self) -> int:
        """Ids are below this. The model's own vocabulary may be padded beyond it."""
        return len(self._description.pieces)

    @property
    def bos_id(self) -> int | None:
        return self._description.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._description.eos_id

    @property
    def add_bos(self) -> bool:
        """Whether the model wants its sequences to begin with `bos_id`."""
        return self._description.add_bos and self._description.bos_id is not None

    @property
    def text_end(self) -> tuple[int, ...]:
        """Ids that the model wants after a text which stands alone, as those do that are made for embeddings."""
        return self._description.text_end

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        return self._description.stop_ids

    @property
    def control(self) -> Mapping[str, int]:
        """Control tokens: spelling -> id."""
        return self._description.control

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """`bos_token`, `eos_token` … -> spelling, as chat templates want them."""
        return self._description.special_tokens

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Chat templates that came with the model; the usual one is called `default`."""
        return self._description.chat_templates

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS is added, and the spelling of a control token is text like any other."""
        return self.encode_parts([text])

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of a sequence of plain texts and of ids that stay as they are; no BOS is added.

        Raises TokenizerError for text that is not Unicode (lone surrogates), and for bytes that the vocabulary lacks:
        some have no token for control characters, and would drop them.
        """
        ids: list[int] = []
        encoder = self._description.encoder
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                self._check_text(part)
                ids += encoder.encode(part, add_special_tokens=False).ids
            else:
                continue
            encoder = self._description.continuing_encoder
        return ids

    def encode_after(self, before: Sequence[str | int], parts: Sequence[str | int]) -> list[int]:
        """Ids of parts that follow others: what a model writes after a prompt. Without the ids of `before`.

        Where text follows text nothing is put between, not the space with which some vocabularies begin a text, and the
        ids are those that the whole text has there, unless one of its tokens spans that place. Raises as encode_parts.
        """
        before, parts = [part for part in before if part != ""], [part for part in parts if part != ""]
        if not before:
            return self.encode_parts(parts)
        start: list[int] = []
        if parts and isinstance(before[-1], str) and isinstance(parts[0], str):
            self._check_text(parts[0])
            start = self._continued(before[-1], parts[0], begins=len(before) == 1)
            parts = parts[1:]
        return start + self.encode_parts([0, *parts])[1:]  # an id before them: they do not begin the text

    def _continued(self, before: str, text: str, *, begins: bool) -> list[int]:
        first = self._description.encoder if begins else self._description.continuing_encoder
        alone = self._description.continuing_encoder.encode(text, add_special_tokens=False).ids
        for encoder, head in ((first, before), (self._description.continuing_encoder, "\n")):
            known = encoder.encode(head, add_special_tokens=False).ids
            whole = encoder.encode(head + text, add_special_tokens=False).ids
            if whole[: len(known)] == known:
                return list(whole[len(known) :])
            if b"".join(map(self.token_bytes, alone)) == text.encode():
                break
        return list(alone)

    def _check_text(self, text: str) -> None:
        try:
            unknown = text.encode().translate(None, self._known_bytes)
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}") from error
        if unknown:
            raise TokenizerError(
                f"the text has the byte 0x{unknown[0]:02X}, for which this model's vocabulary has no token",
                hint="remove control characters and other unusual characters",
            )

    def split_control(self, text: str, where: Callable[[int, int], bool] | None = None) -> list[str | int]:
        """Cut `text` at the spellings of control tokens: plain texts and control ids, as `encode_parts` takes them.

        where: says of start and end of a spelling whether it counts there; by default each does. At every place the
        longest spelling wins. White space that a control token swallows is gone.
        """
        parts: list[str | int] = []
        start = at = 0
        strip_next = False
        while self._control_pattern is not None and (match := self._control_pattern.search(text, at)):
            if where is not None and not where(*match.span()):
                at = match.start() + 1
                continue
            token = self._description.control[match[0]]
            strip_before, strip_after = self._description.strips.get(token, (False, False))
            parts += (_strip(text[start : match.start()], strip_next, strip_before), token)
            start, at, strip_next = match.end(), match.end(), strip_after
        parts.append(_strip(text[start:], strip_next, False))
        return [part for part in parts if part != ""]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, maybe a part of a character; a control token's are its spelling."""
        cached = self._bytes.get(token)
        if cached is None:
            cached = self._bytes[token] = self._token_bytes(token)
        return cached

    def _token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token id {token} is out of range: the vocabulary has {self.vocab_size} tokens")
        piece = self._description.pieces[token]
        if piece is None:
            return b""
        if token in self._description.literal:
            return piece.encode()
        if self._description.byte_level:
            try:
                return bytes(self._alphabet[char] for char in piece)
            except KeyError:
                return piece.encode()
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def is_control(self, token: int) -> bool:
        return token in self._control_ids

    def decode(self, ids: Sequence[int], *, skip_control: bool = True, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        `continuation`: the text follows an earlier one, so a leading space that encoding would have put there stays.
        """
        detokenizer = Detokenizer(self, skip_control=skip_control, continuation=continuation)
        return "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()


class Detokenizer:
    """Incremental decoding. The pieces, joined, are what `decode` gives for the whole; none ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_control: bool = True, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._strip_space = tokenizer._description.space_prefix and not continuation
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        data = self._tokenizer.token_bytes(token)
        if self._tokenizer.is_control(token):
            if self._skip_control:
                return ""
        elif self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never came to its end, else nothing."""
        return self._decoder.decode(b"", final=True)


def _strip(text: str, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text
