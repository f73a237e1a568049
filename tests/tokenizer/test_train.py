"""A vocabulary that was trained here: any text comes back byte for byte, and transformers reads it alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dapji.errors import UsageError
from dapji.tokenizer import Tokenizer
from dapji.tokenizer.train import SMALLEST, train
from dapji.weights.vocabulary import huggingface_files
from tokenizer_texts import PLAIN

TEXTS = [text for text in PLAIN if text]
TOKENS = 400
METADATA = train(TEXTS, TOKENS)
OURS = Tokenizer.from_gguf(METADATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    for name, content in huggingface_files(METADATA).items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = OURS.encode(text)
    assert b"".join(map(OURS.token_bytes, ids)) == text.encode()
    assert OURS.decode(ids) == text


def test_every_token_can_be_written() -> None:
    """All bytes are tokens, and every merge is one too."""
    assert OURS.vocab_size == TOKENS
    assert {OURS.token_bytes(i) for i in range(TOKENS)} >= {bytes([byte]) for byte in range(256)}
    merges = METADATA["tokenizer.ggml.merges"]
    assert len(merges) == TOKENS - SMALLEST
    assert {merge.replace(" ", "") for merge in merges} < set(METADATA["tokenizer.ggml.tokens"])


def test_transformers_reads_it_alike(folder: Path, theirs: PreTrainedTokenizerBase) -> None:
    ours = Tokenizer.from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text) == OURS.encode(text)
        if not any(spelling in text for spelling in ours.control):  # which transformers takes for the tokens
            assert [ours.bos_id, *ours.encode(text)] == theirs(text).input_ids
    assert (ours.add_bos, ours.bos_id, ours.eos_id) == (True, theirs.bos_token_id, theirs.eos_token_id)
    assert {theirs.convert_ids_to_tokens(i) for i in ours.stop_ids} == {"<|end_of_text|>", "<|im_end|>"}


def test_merges_are_the_most_frequent_pairs() -> None:
    """As the definition has it: the pair that occurs most often is joined, over and over."""
    metadata = train(["ab ab ab abc"], SMALLEST + 2)
    assert metadata["tokenizer.ggml.merges"] == ["a b", "Ġ ab"]


def test_the_same_texts_give_the_same_tokens() -> None:
    again = train(iter(TEXTS), TOKENS)
    assert again["tokenizer.ggml.tokens"] == METADATA["tokenizer.ggml.tokens"]
    assert again["tokenizer.ggml.merges"] == METADATA["tokenizer.ggml.merges"]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="enough for a vocabulary of 262 tokens, not of 1000"):
        train(["aa aa"], 1000)
