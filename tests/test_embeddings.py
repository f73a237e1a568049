"""Vectors against sentence-transformers, which reads the folder that it wrote, and llama.cpp, which reads our GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors

from dapji import load
from dapji.errors import ConfigError, ContextError, DapjiError, RequestError
from dapji.models.executor import ExecutorKind
from dapji.ops.tensor import Tensor
from dapji.tokenizer import Tokenizer
from dapji.weights import store
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import gguf_contents, write_folder, write_quantized
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from llama_cpp import LlamaCpp
from tiny import alphabet

transformers.utils.logging.disable_progress_bar()

TEXTS = ["안녕, 세상!", "Hello, world!", "a", "\n two  lines\n", "long " * 60]
TOLERANCE = 1e-5
"""Absolute, of vectors of length 1: the order of float32 sums; 5e-7 is what occurs."""
END = 256
"""The token that the tokenizer puts after a text."""
DIM = 64


def write_base(folder: Path, *, tied: bool = True) -> Path:
    """A decoder saved for itself, without a head, and a tokenizer of bytes that ends texts, but not by its EOS."""
    made = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet())}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[("<|endoftext|>", END)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=260, hidden_size=DIM, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    return folder


class Published:
    """A model that sentence-transformers made."""

    def __init__(self, folder: Path, pooling: str) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        base = write_base(folder / "base")
        modules = [Transformer(str(base)), Pooling(DIM, pooling_mode=pooling), Normalize()]
        self.path = folder / "model"
        self.original = SentenceTransformer(modules=modules, device="cpu")
        self.original.save(str(self.path))

    def vectors(self, texts: Sequence[str] = TEXTS, **options: Any) -> NDArray[np.float32]:
        """One by one: beside others, theirs is padded and no longer quite the same."""
        vectors: NDArray[np.float32] = np.stack([self.original.encode(text, **options) for text in texts])
        return vectors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    return {mode: Published(tmp_path_factory.mktemp(mode), mode) for mode in ("lasttoken", "mean")}


@pytest.fixture
def copy(made: dict[str, Published], tmp_path: Path) -> Path:
    """To spoil."""
    return Path(shutil.copytree(made["lasttoken"].path, tmp_path / "copy"))


@pytest.mark.parametrize("executor", ["reference", "native", "torch"])
@pytest.mark.parametrize(("mode", "pooling"), [("lasttoken", "last"), ("mean", "mean")])
def test_vectors_are_those_of_sentence_transformers(
    made: dict[str, Published], mode: str, pooling: str, executor: ExecutorKind
) -> None:
    with load(made[mode].path, executor=executor, kv="f32") as model:
        assert (model.embedding.pooling, model.embedding.declared) == (pooling, True)
        got = model.embed(TEXTS)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, made[mode].vectors(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_a_vector_is_the_same_alone_and_among_others(made: dict[str, Published], mode: str) -> None:
    """To the last bit, of texts longer than a step, beside an answer, and again when the cache has the text."""
    texts = [*TEXTS, "가나다" * 200, "x" * 1500]
    with load(made[mode].path, context=2048) as model:
        alone = np.concatenate([model.embed([text]) for text in texts])
    with load(made[mode].path, context=2048) as model:
        reply = model.complete("abc", temperature=0.0, max_tokens=40)
        first, again = model.embed(texts), model.embed(texts)
        assert len(list(reply)) > 0
    np.testing.assert_array_equal(first, alone)
    np.testing.assert_array_equal(again, alone)


def test_token_ids_are_taken_as_they_are(made: dict[str, Published]) -> None:
    with load(made["lasttoken"].path) as model:
        ids = [*model.tokenizer.encode(TEXTS[0]), END]
        np.testing.assert_array_equal(model.embed([ids]), model.embed(TEXTS[:1]))
        assert np.abs(model.embed([ids[:-1]]) - model.embed([ids])).max() > 0.01


def test_control_tokens_in_a_text_are_text(made: dict[str, Published]) -> None:
    with load(made["lasttoken"].path) as model:
        (text,) = model.prepare_embeddings(["a<|endoftext|>b"]).texts
        assert END not in text[:-1]
        assert len(text) == len("a<|endoftext|>b") + 1


def test_a_text_is_refused_where_it_is_too_long_or_empty(made: dict[str, Published]) -> None:
    with load(made["mean"].path, context=32) as model:
        with pytest.raises(ContextError, match=r"the text \(41 tokens\) exceeds the context \(32 tokens\)"):
            model.embed(["short", "x" * 40])
        cut = model.prepare_embeddings(["x" * 40], truncate=True)
        assert cut.texts == [[*model.tokenizer.encode("x" * 31), END]]
        with pytest.raises(RequestError, match="at least one token, got 0"):
            model.embed([[]])
        assert model.embed([]).shape == (0, DIM)


def test_vectors_are_cut_where_the_model_was_trained_for_it(made: dict[str, Published], copy: Path) -> None:
    with load(copy) as model, pytest.raises(RequestError, match=r"dimensions \(16\) must be the model's 64"):
        model.embed(TEXTS, dimensions=16)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [16, 32]}))
    with load(copy, kv="f32") as model:
        assert model.embedding.dimensions == [16, 32]
        want = made["lasttoken"].vectors(truncate_dim=16, normalize_embeddings=True)
        np.testing.assert_allclose(model.embed(TEXTS, dimensions=16), want, rtol=0, atol=TOLERANCE)
        assert model.embed(TEXTS, dimensions=64).shape == (5, 64)
        with pytest.raises(RequestError, match=r"dimensions \(17\)"):
            model.embed(TEXTS, dimensions=17)
    (copy / "config.json").write_text(json.dumps(config | {"is_matryoshka": True}))
    with load(copy) as model:
        assert model.embed(TEXTS, dimensions=17).shape == (5, 17)
    (copy / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [128]}))
    with load(copy) as model, pytest.raises(RequestError, match=r"must hold numbers from 1 to 64, not \[128\]"):
        model.embed(TEXTS)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "pooling by 'cls' is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling by 'max' is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "one way of pooling is supported, not mean, max"),
        ("1_Pooling/config.json", {"pooling_mode": None}, "not none"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt = False is not supported"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default_prompt_name = 'query'"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case = True"),
        ("modules.json", {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}, "the module Dense"),
        ("modules.json", None, "no module Pooling"),
        ("modules.json", {"type": "a.Pooling", "path": "../other"}, "the path '../other' is none"),
        ("modules.json", {"type": "a.Pooling", "path": "9_Pooling"}, "no such file"),
        ("modules.json", {"type": 3}, "modules.json: .*str"),
        ("1_Pooling/config.json", {"pooling_mode": [{}]}, "pooling by {} is not supported"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(
    copy: Path, file: str, changes: dict[str, Any] | None, message: str
) -> None:
    """And only where a vector is asked for."""
    content = json.loads((copy / file).read_text())
    if isinstance(content, list):
        content = content[:1] if changes is None else [*content, changes]
    else:
        content |= changes
    (copy / file).write_text(json.dumps(content))
    with load(copy) as model:
        assert len(list(model.complete("a", max_tokens=2))) >= 0
        with pytest.raises(RequestError, match=f"copy gives no embeddings: .*{message}"):
            model.embed(TEXTS)
    with pytest.raises(DapjiError, match=message):
        write_quantized(open_checkpoint(copy), copy / "model.gguf", "F32")


def test_older_names_are_read(made: dict[str, Published], copy: Path) -> None:
    """As most published models have them."""
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": DIM, **modes}))
    modules = json.loads((copy / "modules.json").read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (copy / "modules.json").write_text(json.dumps(modules))
    with load(copy, kv="f32") as model:
        np.testing.assert_allclose(model.embed(TEXTS), made["lasttoken"].vectors(), rtol=0, atol=TOLERANCE)


def test_a_decoder_without_a_head_gives_embeddings_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    original = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    with load(base, kv="f32") as model:
        prepared = model.prepare_embeddings(TEXTS)
        got = model.engine.embed(prepared.texts, pooling="last")
        with pytest.raises(RequestError, match="without the matrix that makes logits"):
            model.complete("a")
        with pytest.raises(RequestError, match="without the matrix that makes logits"):
            model.engine.score([1, 2, 3])
    with torch.no_grad():
        want = [original(torch.tensor([text])).last_hidden_state[0, -1].numpy() for text in prepared.texts]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)  # not of length 1
    write_folder(open_checkpoint(base), tmp_path / "again", "F32")
    assert open_checkpoint(tmp_path / "again").tensors.stored.keys() == original.state_dict().keys()
    with load(tmp_path / "again", kv="f32") as model:
        assert model.config.headless
        np.testing.assert_array_equal(model.engine.embed(prepared.texts, pooling="last"), got)


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    process = LlamaCpp()
    yield process
    process.close()


@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_conversions_keep_it(made: dict[str, Published], mode: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Folder to GGUF, which llama.cpp reads alike, and back, which sentence-transformers does."""
    from sentence_transformers import SentenceTransformer

    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    write_quantized(open_checkpoint(made[mode].path), file, "F32")
    write_folder(open_checkpoint(file), folder, "F32")
    want = made[mode].vectors()
    for path in (file, folder):
        with load(path, kv="f32") as model:
            assert model.embedding.declared
            np.testing.assert_allclose(model.embed(TEXTS), want, rtol=0, atol=TOLERANCE)
    # exp and silu by approximations there
    np.testing.assert_allclose(llama_cpp.embeddings(file, TEXTS), want, rtol=0, atol=1e-3)
    again = SentenceTransformer(str(folder), device="cpu")
    vectors = np.stack([again.encode(text, normalize_embeddings=True) for text in TEXTS])
    np.testing.assert_allclose(vectors, want, rtol=0, atol=TOLERANCE)
    assert Tokenizer.from_folder(folder).text_end == (END,)


def test_a_model_made_to_answer_gives_the_mean(llama_cpp: LlamaCpp) -> None:
    """Of a published one."""
    texts = ["The sun shines.", "It is a bright day.", "Potatoes cost 3 euros.", "word " * 200]
    path = store.resolve("smollm2-135m")
    with load(path) as model:
        assert (model.embedding.pooling, model.embedding.declared) == ("mean", False)
        cosines = (model.embed(texts) * llama_cpp.embeddings(path, texts, mean=True)).sum(axis=1)
    assert cosines.min() > 0.999  # both round activations to 8 bits, each in its own way


RERANK = "<|im_end|>Does it answer?\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
DOCUMENTS = ["서울의 날씨는 맑다.", "a", "Potatoes cost 3 euros {query}.", "<|im_end|> the end"]


def write_ranker(path: Path, **changes: Any) -> Path:
    """The decoder with a head for yes and no, as llama.cpp's converter writes Qwen3's rerankers."""
    base = open_checkpoint(write_base(path.parent / "base"))
    contents, tensors = gguf_contents(base)
    head = np.random.default_rng(0).standard_normal((2, DIM)).astype(np.float32)
    named = {**tensors, "cls.output.weight": Tensor.from_float32("cls.output.weight", head)}
    metadata = {
        **contents,
        "qwen3.pooling_type": 4,
        "qwen3.classifier.output_labels": ["yes", "no"],
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.rerank": RERANK,
    }
    metadata |= changes
    kept = {key: value for key, value in metadata.items() if value is not None}
    write_gguf(path, kept, [TensorToWrite.of(name, tensor) for name, tensor in named.items() if changes.get(name, 1)])
    return path


def test_a_head_that_ranks_gives_what_it_gives_in_llama_cpp(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """But for a document that spells control tokens, which are none here."""
    path = write_ranker(tmp_path / "ranker.gguf")
    with load(path, kv="f32") as model:
        scores = model.rerank("날씨?", DOCUMENTS)
        assert model.prepare_reranking("날씨?", DOCUMENTS).method == "classifier"
        with pytest.raises(RequestError, match="the model ranks documents and gives no embeddings"):
            model.embed(TEXTS)
    with pytest.raises(ConfigError, match="a folder has no form for a head that ranks"):
        write_folder(open_checkpoint(path), tmp_path / "folder", "F32")
    want = llama_cpp.ranking(path, "날씨?", DOCUMENTS)
    assert np.ptp(want) > 0.05
    np.testing.assert_allclose(scores[:2], want[:2], rtol=0, atol=1e-3)  # exp and silu by approximations there
    assert abs(scores[3] - want[3]) > 0.01


def test_a_place_in_a_document_is_text(tmp_path: Path) -> None:
    """Query and document are put in at once, so that one cannot name the other's place."""
    with load(write_ranker(tmp_path / "ranker.gguf")) as model:
        text = model.tokenizer.decode(model.prepare_reranking("{document}", ["{query}"]).texts[0], skip_control=False)
    assert text == "<|im_end|>Does it answer?\n<Query>: {document}\n<Document>: {query}<|im_end|>\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qwen3.classifier.output_labels": ["no", "yes"]}, "ranks by the labels"),
        ({"qwen3.classifier.output_labels": np.array([1, 0], dtype=np.int32)}, "ranks by the labels"),
        ({"tokenizer.chat_template.rerank": None}, "no template `rerank`"),
        ({"cls.output.weight": None}, "there is no cls.output.weight"),
        ({"qwen3.pooling_type": 7}, "pooling_type must be 0 to 4, not 7"),
    ],
)
def test_a_ranker_that_lacks_something_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with load(write_ranker(tmp_path / "ranker.gguf", **changes)) as model, pytest.raises(RequestError, match=message):
        model.rerank("날씨?", DOCUMENTS)


def test_without_a_head_embeddings_are_compared(made: dict[str, Published]) -> None:
    with load(made["mean"].path, kv="f32") as model:
        scores = model.rerank(TEXTS[0], TEXTS[1:])
        assert model.prepare_reranking("a", ["b"]).method == "cosine"
    vectors = made["mean"].vectors()
    np.testing.assert_allclose(scores, vectors[1:] @ vectors[0], rtol=0, atol=TOLERANCE)
