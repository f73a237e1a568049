"""One tokenizer in both layouts, tokenizer.json and GGUF, against each other and against the tokenizers library.

The tokenizers are trained here on a few sentences, written with the libraries of the two formats, and read with ours.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dapji.errors import TokenizerError
from dapji.tokenizer import Tokenizer
from dapji.weights.gguf import read_gguf

CORPUS = [
    "답지는 열린 언어 모델을 직접 돌리는 도구입니다. 답지로 모델을 직접 배우고 나눕니다.",
    "An answer sheet is handed out after the exam; the answers are handed out to all of us.",
    "the lower, the newer: 1234 numbers, 56 more.  Two  spaces, don't they're we'll.",
] * 3
TEXTS = [*CORPUS[:3], "각 é 👍🏽", "  two\n\nlines\t", "don'T 12345 <tool>x</tool> 한", "a<|user|>b</s><s><unk>", "▁_▁"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|im_end|>"]
"""<|user|> is marked `special: false`, as DeepSeek and others do."""
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def sentencepiece() -> tokenizers.Tokenizer:
    """Every way to write a piece as two pieces is a merge, as SentencePiece has it; ranked by the order of learning."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["".join(pair) for pair in learned["merges"]]
    letters = [piece for piece in learned["vocab"] if len(piece) == 1]
    vocabulary = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    known = {*pieces, *letters}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in known and piece[cut:] in known
    ]
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(vocabulary)},
            merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer = learner.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


MAKERS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


class Both:
    """The library's own tokenizer, and ours read from both layouts."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.original = MAKERS[kind]()
        self.original.add_special_tokens([AddedToken(spelling, normalized=False) for spelling in SPECIAL])
        self.original.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
        bos = self.original.token_to_id("<s>")
        self.original.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
        write_folder(folder, self.original)
        write_gguf_of(folder / "model.gguf", self.original, kind)
        self.folder = Tokenizer.from_folder(folder)
        self.gguf = Tokenizer.from_gguf(read_gguf(folder / "model.gguf").metadata)


def write_folder(folder: Path, made: tokenizers.Tokenizer) -> None:
    content = json.loads(made.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|user|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    end = made.token_to_id("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [made.token_to_id("</s>"), end]}))


def write_gguf_of(path: Path, made: tokenizers.Tokenizer, kind: str) -> None:
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    types = []
    for token in tokens:
        if token in SPECIAL:
            types.append(gguf.TokenType.UNKNOWN if token == "<unk>" else gguf.TokenType.CONTROL)
        elif token in ("<tool>", "</tool>"):
            types.append(gguf.TokenType.USER_DEFINED)
        elif kind == "sentencepiece" and token.startswith("<0x"):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2" if kind == "byte-level" else "llama")
    if kind == "byte-level":
        writer.add_tokenizer_pre("qwen2")
        merges = json.loads(made.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(made.token_to_id("<s>"))
    writer.add_eos_token_id(made.token_to_id("</s>"))
    writer.add_unk_token_id(made.token_to_id("<unk>"))
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture(scope="module", params=MAKERS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(request.param, tmp_path_factory.mktemp(request.param))


def test_describe_the_same_vocabulary(both: Both) -> None:
    a, b = both.folder, both.gguf
    for field in (
        "vocab_size", "bos_id", "eos_id", "add_bos", "stop_ids", "control", "special_tokens", "chat_templates",
    ):  # fmt: skip
        assert getattr(a, field) == getattr(b, field), field
    assert a.control.keys() == set(SPECIAL)
    assert [a.token_bytes(i) for i in range(a.vocab_size)] == [b.token_bytes(i) for i in range(b.vocab_size)]
    assert a.stop_ids == {a.control["</s>"], a.control["<|im_end|>"]}


def check(both: Both, text: str) -> None:
    both.original.encode_special_tokens = True
    without_user = both.original.encode(text, add_special_tokens=False).ids
    ids = both.folder.encode(text)
    assert ids == both.gguf.encode(text)
    assert ids == without_user
    assert both.folder.decode(ids) == both.gguf.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_alike(both: Both, text: str) -> None:
    check(both, text)


@given(text=st.text(max_size=40) | st.text("답지는 모델을 the lower.'s12\n", max_size=40))
def test_encode_any_text_alike(both: Both, text: str) -> None:
    check(both, text)


def test_place_control_tokens_alike(both: Both) -> None:
    text = "<s><|user|>\n답지 </s>the lower<|im_end|><tool> a"
    both.original.encode_special_tokens = False
    expected = both.original.encode(text, add_special_tokens=False).ids
    for tokenizer in (both.folder, both.gguf):
        assert tokenizer.encode_parts(tokenizer.split_control(text)) == expected
    # what the library writes with its BOS, we write as a part
    assert both.folder.encode_parts([1 if both.folder.bos_id == 1 else both.folder.control["<s>"], "the"]) == (
        both.original.encode("the").ids
    )


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_the_space_that_metaspace_puts(scheme: str, tmp_path: Path) -> None:
    """Newer SentencePiece models write tokenizer.json so; `first` puts a space before the first text only."""
    made = sentencepiece()
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    made.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
    made.add_special_tokens([AddedToken(spelling, normalized=False) for spelling in SPECIAL])
    write_folder(tmp_path, made)
    tokenizer = Tokenizer.from_folder(tmp_path)
    made.encode_special_tokens = False
    for text in ("the lower", " the lower", "the<|im_end|>lower", "<s>the</s> lower<|im_end|>\n답지", "  two<s>  two"):
        assert tokenizer.encode_parts(tokenizer.split_control(text)) == made.encode(text, add_special_tokens=False).ids
    for text in ("the lower", "two  "):  # a space at the beginning is one that Metaspace need not put, so it is lost
        assert tokenizer.decode(tokenizer.encode(text)) == text


def edited(folder: Path, source: Path, **changes: Any) -> Path:
    """A copy of the folder `source` whose tokenizer.json has other values."""
    for path in source.glob("*.json"):
        (folder / path.name).write_text(path.read_text())
    content = json.loads((source / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    return folder


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    Both("byte-level", folder)
    return folder


def test_a_control_token_swallows_the_space_that_it_is_marked_to(source: Path, tmp_path: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["content"] == "<|im_end|>":
            token |= {"lstrip": True, "rstrip": True}
    folder = edited(tmp_path, source, added_tokens=content["added_tokens"])
    tokenizer = Tokenizer.from_folder(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("a <|im_end|> \nb", "<|im_end|> <|im_end|>", " <|im_end|>"):
        parts = tokenizer.split_control(text)
        assert tokenizer.encode_parts(parts) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "'Unigram'"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}, "empty"),
        ({"model": {"type": "BPE", "vocab": {"a": 10**9}, "merges": []}}, "1000000000"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "tokenizer.json"),
        ({"model": 3}, "None"),
        ({"added_tokens": [{"id": "x"}]}, "tokenizer.json"),
        ({"added_tokens": [{"id": 0, "content": "", "special": True}]}, "''"),
        ({"pre_tokenizer": {"type": "nonsense"}}, "tokenizer.json"),
        ({"decoder": 7}, "tokenizer.json"),
    ],
)
def test_a_bad_tokenizer_json_is_refused(source: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(edited(tmp_path, source, **change))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}'),
        ("generation_config.json", '{"eos_token_id": ["x"]}'),
        ("generation_config.json", '{"eos_token_id": -1}'),
    ],
)
def test_a_bad_file_beside_it_is_refused(source: Path, file: str, content: str) -> None:
    (source / file).write_text(content)
    with pytest.raises(TokenizerError, match=file):
        Tokenizer.from_folder(source)


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "unheard of"),
        ("model", None),
        ("tokens", None),
        ("tokens", [1, 2]),
        ("tokens", np.arange(3)),
        ("tokens", []),
        ("tokens", "abc"),
        ("token_type", np.array([1], np.int32)),
        ("token_type", ["1"]),
        ("token_type", "huge"),
        ("bos_token_id", 10**9),
        ("bos_token_id", -1),
        ("bos_token_id", "1"),
        ("eot_token_id", True),
        ("add_bos_token", 1),
    ],
)
def test_bad_metadata_is_refused(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    Both(kind, tmp_path)
    metadata = dict(read_gguf(tmp_path / "model.gguf").metadata)
    if isinstance(value, str) and value == "huge":
        value = np.full(len(metadata["tokenizer.ggml.tokens"]), 99, np.int32)
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(TokenizerError):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("byte-level", "pre", None),
        ("byte-level", "pre", "unheard-of"),
        ("byte-level", "merges", None),
        ("byte-level", "merges", ["a"]),
        ("byte-level", "merges", [""]),
        ("byte-level", "merges", ["nowhere tofind"]),
        ("sentencepiece", "scores", None),
        ("sentencepiece", "scores", np.zeros(3, np.float32)),
        ("sentencepiece", "scores", "nan"),
        ("sentencepiece", "remove_extra_whitespaces", True),
        ("sentencepiece", "no bytes", None),
        ("sentencepiece", "long", None),
        ("sentencepiece", "twice", None),
    ],
)
def test_bad_metadata_of_one_kind_is_refused(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    Both(kind, tmp_path)
    metadata = dict(read_gguf(tmp_path / "model.gguf").metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    if key == "no bytes":
        metadata["tokenizer.ggml.token_type"] = np.ones(len(tokens), np.int32)
    elif key in ("long", "twice"):
        metadata["tokenizer.ggml.tokens"] = [*tokens[:-8], "x" * 5000 if key == "long" else tokens[-1], *tokens[-7:]]
    else:
        metadata[f"tokenizer.ggml.{key}"] = np.full(len(tokens), np.nan) if isinstance(value, str) else value
    with pytest.raises(TokenizerError):
        Tokenizer.from_gguf(metadata)
