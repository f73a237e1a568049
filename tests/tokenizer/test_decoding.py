"""Decoding piece by piece: nothing is lost, nothing comes twice, no character is split."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapji.errors import TokenizerError
from dapji.tokenizer import Detokenizer, Tokenizer
from dapji.weights.gguf import read_gguf

TEXTS = [
    "안녕하세요, 답지입니다. 꿿꿽 뷁",
    "각",  # the letters one by one, as a Mac writes file names
    "👍🏽 👨‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🇰🇷",
    "日本語 العربية हिन्दी Ünïcödé 𝔘𝔫𝔦",
    " leading,  double   and trailing space ",
    "tab\tnew\r\nline\x00zero\x7f",
]
_KINDS = {"byte-level": "gpt-2", "sentencepiece": "llama-spm"}


@pytest.fixture(scope="module")
def tokenizers_by_kind(llama_cpp_models: Path) -> dict[str, Tokenizer]:
    return {
        kind: Tokenizer.from_gguf(read_gguf(llama_cpp_models / f"ggml-vocab-{name}.gguf").metadata)
        for kind, name in _KINDS.items()
    }


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip_control: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_control=skip_control)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


def check_pieces(tokenizer: Tokenizer, ids: list[int], *, skip_control: bool) -> str:
    """Joins the pieces after checking them against the bytes of all tokens, decoded at once by Python."""
    pieces = pieces_of(tokenizer, ids, skip_control=skip_control)
    kept = [token for token in ids if not (skip_control and tokenizer.is_control(token))]
    whole = [tokenizer.token_bytes(token) for token in kept]
    # Where encoding puts a space before a text, it goes again: the first text's, even behind a control token.
    first = next((i for i, token in enumerate(kept) if whole[i] and not tokenizer.is_control(token)), len(kept))
    stripped = [*whole[:first], *(data.removeprefix(b" ") for data in whole[first : first + 1]), *whole[first + 1 :]]
    text = "".join(pieces)
    assert text in (b"".join(whole).decode("utf-8", "replace"), b"".join(stripped).decode("utf-8", "replace"))
    assert text == tokenizer.decode(ids, skip_control=skip_control)
    return text


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_comes_back_character_by_character(kind: str, text: str, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids, skip_control=True)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""
    if not text.isascii():
        assert len(ids) > len([piece for piece in pieces if piece])  # some characters took several tokens


@pytest.mark.parametrize("kind", _KINDS)
@given(data=st.data(), skip_control=st.booleans())
def test_any_ids_in_pieces_are_the_whole(
    kind: str, data: st.DataObject, skip_control: bool, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    """Any ids at all, and ids of single bytes, which are mostly not UTF-8."""
    tokenizer = tokenizers_by_kind[kind]
    byte = st.sampled_from([t for t in range(300) if len(tokenizer.token_bytes(t)) == 1])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | byte, max_size=30))
    check_pieces(tokenizer, ids, skip_control=skip_control)


@pytest.mark.parametrize("kind", _KINDS)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(kind: str, text: str, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind[kind]
    if kind == "sentencepiece":
        text = text.replace("▁", "_")  # stands for a space there
    ids = tokenizer.encode(text)
    assert check_pieces(tokenizer, ids, skip_control=True) == text
    assert not any(map(tokenizer.is_control, ids))


def test_bytes_that_are_no_utf8_become_replacement_characters(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["sentencepiece"]
    byte = {value: tokenizer.control.get("<unk>", 0) + 3 + value for value in range(256)}
    assert tokenizer.token_bytes(byte[0xED]) == b"\xed"
    broken = [byte[b] for b in b"a\xed\x95"]  # two of the three bytes of a syllable, then the end
    assert pieces_of(tokenizer, broken, skip_control=True) == ["a", "", "", "\ufffd"]
    assert pieces_of(tokenizer, [*broken, byte[0x9C]], skip_control=True) == ["a", "", "", "한", ""]
    assert pieces_of(tokenizer, [*broken, byte[ord("b")]], skip_control=True) == ["a", "", "", "\ufffdb", ""]


def test_only_the_first_space_is_the_encoders(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["sentencepiece"]
    ids = tokenizer.encode("one two")
    assert tokenizer.decode(ids) == "one two"
    assert tokenizer.decode([1, *ids]) == "one two"
    assert tokenizer.decode(ids, continuation=True) == " one two"


def test_an_id_out_of_range_is_refused(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte-level"]
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=f"{token} is out of range.*{tokenizer.vocab_size}"):
            tokenizer.decode([token])


def test_text_that_is_not_unicode_is_refused(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        tokenizers_by_kind["byte-level"].encode("a\ud800b")
