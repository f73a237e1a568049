"""Vocabularies without tokenizer.json: what is refused, and what the files beside them say.

The SentencePiece models are trained here with SentencePiece itself; test_published_vocabularies.py reads the real ones.
"""

import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from dapji.errors import TokenizerError
from dapji.tokenizer import Tokenizer

CORPUS = [
    "the lower the newer, the slower the older",
    "답지는 열린 언어 모델을 직접 돌리는 도구입니다",
    "12 345 x = y",
] * 20
PLAIN = {
    "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2,
}  # fmt: skip
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501


def trained(**changes: Any) -> bytes:
    file = io.BytesIO()
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(CORPUS), model_writer=file, **(PLAIN | changes))
    return file.getvalue()


@pytest.fixture(scope="module")
def spm() -> bytes:
    return trained(user_defined_symbols=["<tool>", "▁▁"], control_symbols=["[INST]"], pad_id=3)


def folder_of(folder: Path, content: bytes, **companions: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(content)
    for name, value in companions.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_encodes_as_the_library_does(prefix: bool, tmp_path: Path) -> None:
    content = trained(add_dummy_prefix=prefix)
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, content))
    for text in [*CORPUS[:3], "  two  ", "\n\t", "한글 é 👍🏽", "<s>the</s>", " the"]:
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.control == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_the_kinds_of_pieces_are_kept(spm: bytes, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, spm))
    library = sentencepiece.SentencePieceProcessor(model_proto=spm)
    assert tokenizer.control.keys() == {"<unk>", "<s>", "</s>", "<pad>", "[INST]"}
    assert library.piece_to_id("[INST]") not in tokenizer.encode("[INST]")
    assert library.piece_to_id("<tool>") in tokenizer.encode("a <tool> b")
    assert tokenizer.token_bytes(library.piece_to_id("▁▁")) == b"  "


def test_tokens_are_added_and_renamed(spm: bytes, tmp_path: Path) -> None:
    """As for models that were trained further: behind the vocabulary, and in place of reserved tokens."""
    size = sentencepiece.SentencePieceProcessor(model_proto=spm).vocab_size()
    inst = Tokenizer.from_folder(folder_of(tmp_path, spm)).control["[INST]"]
    added = {
        inst: {"content": "[TOOLS]", "special": True},
        size: {"content": "<|im_start|>", "special": False, "rstrip": True},
        size + 2: {"content": "<note>", "special": False},
    }
    config = {"added_tokens_decoder": added, "eos_token": "<|im_start|>", "add_bos_token": False}
    tokenizer = Tokenizer.from_folder(
        folder_of(tmp_path, spm, tokenizer_config=config, generation_config={"eos_token_id": 2})
    )
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.control["[TOOLS]"] == inst
    assert "[INST]" not in tokenizer.control
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.add_bos) == (size, {2, size}, False)
    assert tokenizer.encode("<note>")[-1] == size + 2
    assert tokenizer.split_control("<|im_start|>\nuser") == [size, "user"]


def test_added_tokens_json_of_old_folders_counts(spm: bytes, tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=spm).vocab_size()
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, spm, added_tokens={"<|im_end|>": size}))
    assert tokenizer.control["<|im_end|>"] == size
    assert size in tokenizer.stop_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "'unigram'"),
        ({"normalization_rule_name": "nmt_nfkc"}, "a table of normalisation"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"byte_fallback": False}, "no byte_fallback"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_rules_of_sentencepiece_that_are_not_ours_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder_of(tmp_path, trained(**changes)))


@given(data=st.data())
def test_a_damaged_model_is_refused_or_read(
    spm: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never any other exception."""
    position = data.draw(st.integers(1, len(spm) - 1))
    changed = data.draw(st.sampled_from([spm[:position], spm[:position] + bytes([data.draw(st.integers(0, 255))])]))
    content = changed + spm[len(changed) :] if data.draw(st.booleans()) else changed
    with contextlib.suppress(TokenizerError):
        Tokenizer.from_folder(folder_of(tmp_path_factory.mktemp("damaged"), content))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"x": {"content": "a"}}, "added_tokens_decoder"),
        ({10**9: {"content": "a"}}, "1000000000"),
        ([3], "added_tokens"),
    ],
)
def test_bad_added_tokens_are_refused(added: Any, message: str, spm: bytes, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder_of(tmp_path, spm, tokenizer_config={"added_tokens_decoder": added}))


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_an_unknown_tiktoken_file_is_refused(name: str, tmp_path: Path) -> None:
    """It does not say how it cuts words, and no default is right for every model."""
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / name).write_text("".join(lines))
    with pytest.raises(TokenizerError, match=r"SHA-256 [0-9a-f]{64}.*\nhint: "):
        Tokenizer.from_folder(tmp_path)


def tekken(**changes: Any) -> dict[str, Any]:
    config = {"pattern": TEKKEN, "default_vocab_size": 273, "default_num_special_tokens": 16, "version": "v3"}
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(ranks)]
    return {"config": config, "vocab": vocab} | changes


def test_tekken_lists_its_control_tokens_or_has_those_of_old(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(tekken()))
    old = Tokenizer.from_folder(tmp_path)
    assert list(old.control)[:4] == ["<unk>", "<s>", "</s>", "[INST]"]
    assert old.encode("ab") == [16 + 256]
    named = ["<unk>", "<s>", "[THINK]", "</s>"]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(named)]
    path.write_text(json.dumps(tekken(special_tokens=special)))
    listed = Tokenizer.from_folder(tmp_path)
    assert (listed.eos_id, listed.stop_ids, listed.control["<SPECIAL_4>"]) == (3, {3}, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"pattern": "x", "default_vocab_size": 273, "default_num_special_tokens": 16}}, "pattern is 'x'"),
        ({"config": {"pattern": TEKKEN, "default_vocab_size": 999, "default_num_special_tokens": 16}}, "999"),
        ({"config": {"pattern": TEKKEN, "default_vocab_size": 9, "default_num_special_tokens": 16}}, "9 tokens"),
        ({"special_tokens": [{"rank": 0, "token_str": "<s>"}]}, "no </s>"),
        ({"vocab": [{"rank": 2 * i, "token_bytes": "YQ=="} for i in range(300)]}, "rank 1"),
        ({"vocab": [{"rank": i, "token_bytes": "YQ=="} for i in range(300)]}, "twice"),
        ({"vocab": [{"rank": 0, "token_bytes": "!"}]}, "base64"),
        ({"vocab": 3}, "tekken.json"),
    ],
)
def test_a_bad_tekken_json_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(**changes)))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)
