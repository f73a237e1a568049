"""Every vocabulary that llama.cpp ships, from GGUF metadata alone, against llama.cpp's vectors.

The vectors were made with the models' original tokenizers, so they judge the splitting into words, the merging and the
handling of added tokens all at once.
"""

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from dapji.errors import TokenizerError
from dapji.tokenizer import Tokenizer
from dapji.weights.gguf import Metadata, read_gguf

SUPPORTED = [
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt",
    "phi-3", "qwen2", "qwen35", "refact", "starcoder",
]  # fmt: skip
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module", params=SUPPORTED)
def name(request: pytest.FixtureRequest) -> str:
    """One vocabulary after the other, so that only one is in memory."""
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(name: str, llama_cpp_models: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf(llama_cpp_models / f"ggml-vocab-{name}.gguf").metadata)


@pytest.fixture(scope="module")
def vectors(name: str, llama_cpp_models: Path) -> list[tuple[str, list[int]]]:
    """Texts and their ids, the last text ended by a separator or by the end of the file."""
    texts = (llama_cpp_models / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = (llama_cpp_models / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    if texts[-1] == "" and len(texts) == len(lines) + 1:
        texts.pop()
    assert len(texts) == len(lines) >= 46
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=True)]


def test_encodes_as_llama_cpp_says(name: str, tokenizer: Tokenizer, vectors: list[tuple[str, list[int]]]) -> None:
    wrong = {text: (ids, tokenizer.encode(text)) for text, ids in vectors if tokenizer.encode(text) != ids}
    # The tokenizer.json of Qwen 3.5 has NFC, and so have we; llama.cpp's vocabulary under that name is another one.
    composed = {text for text, _ in vectors if name == "qwen35" and unicodedata.normalize("NFC", text) != text}
    assert wrong.keys() == composed
    assert all(tokenizer.encode(text) == tokenizer.encode(unicodedata.normalize("NFC", text)) for text in composed)


def test_decodes_to_the_text_again(tokenizer: Tokenizer, vectors: list[tuple[str, list[int]]]) -> None:
    wrong = {text: tokenizer.decode(ids) for text, ids in vectors if tokenizer.decode(ids) != text}
    assert wrong == {}


def test_no_spelling_of_a_control_token_becomes_one(tokenizer: Tokenizer) -> None:
    control = frozenset(tokenizer.control.values())
    assert control
    for spelling in tokenizer.control:
        for text in (spelling, f" {spelling}", f"안녕{spelling}\n{spelling}{spelling}", spelling[1:] + spelling[:1]):
            assert control.isdisjoint(tokenizer.encode(text)), text
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_template_can_place_every_control_token(tokenizer: Tokenizer) -> None:
    for spelling, token in tokenizer.control.items():
        assert tokenizer.split_control(f"a{spelling}{spelling} b") == ["a", token, token, " b"]
        assert tokenizer.decode([token]) == ""
        assert tokenizer.decode([token], skip_control=False) == spelling


@pytest.mark.parametrize(
    ("name", "model"), [("bert-bge", "bert"), ("nomic-bert-moe", "t5"), ("gpt-neox", "missing"), ("aquila", "missing")]
)
def test_what_is_not_supported_is_named(name: str, model: str, llama_cpp_models: Path) -> None:
    with pytest.raises(TokenizerError, match=model):
        Tokenizer.from_gguf(read_gguf(llama_cpp_models / f"ggml-vocab-{name}.gguf").metadata)


def test_reads_the_special_tokens(llama_cpp_models: Path) -> None:
    metadata = read_gguf(llama_cpp_models / "ggml-vocab-llama-bpe.gguf").metadata
    tokenizer = Tokenizer.from_gguf(metadata)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (128256, 128000, 128001)
    assert tokenizer.add_bos  # the file does not say; llama-bpe means yes
    assert tokenizer.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    names = {"<|end_of_text|>", "<|eot_id|>"} & tokenizer.control.keys()
    assert {tokenizer.control[name] for name in names} <= tokenizer.stop_ids


def changed(metadata: Metadata, **changes: Any) -> dict[str, Any]:
    return dict(metadata) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_reads_the_named_templates(llama_cpp_models: Path) -> None:
    tokenizer = Tokenizer.from_gguf(read_gguf(llama_cpp_models / "ggml-vocab-command-r.gguf").metadata)
    assert tokenizer.chat_templates.keys() == {"default", "tool_use", "rag"}


def test_add_bos_token_of_the_file_decides(llama_cpp_models: Path) -> None:
    metadata = read_gguf(llama_cpp_models / "ggml-vocab-gpt-2.gguf").metadata
    assert not Tokenizer.from_gguf(metadata).add_bos
    assert Tokenizer.from_gguf(changed(metadata, add_bos_token=True)).add_bos


def test_a_character_that_the_vocabulary_lacks_is_refused(llama_cpp_models: Path) -> None:
    """The tokenizers library would drop it."""
    tokenizer = Tokenizer.from_gguf(read_gguf(llama_cpp_models / "ggml-vocab-falcon.gguf").metadata)
    with pytest.raises(TokenizerError, match="0x03"):
        tokenizer.encode("a\x03b")
    assert tokenizer.decode(tokenizer.encode("a\x02b")) == "a\x02b"


def test_without_types_the_spelling_tells_control_tokens(llama_cpp_models: Path) -> None:
    metadata = read_gguf(llama_cpp_models / "ggml-vocab-qwen2.gguf").metadata
    typed, untyped = Tokenizer.from_gguf(metadata), Tokenizer.from_gguf(changed(metadata, token_type=None))
    assert untyped.control == typed.control
    text = "<|im_start|>user\n한 <|> 둘"
    assert untyped.encode(text) == typed.encode(text)
    assert untyped.split_control(text) == typed.split_control(text) == [151644, "user\n한 <|> 둘"]
