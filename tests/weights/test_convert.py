"""Whole models from one layout to the other: transformers and the gguf package read what we write."""

import json
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dapji.errors import FormatError, TokenizerError, UsageError
from dapji.models import families
from dapji.ops.tensor import Tensor
from dapji.tokenizer import Tokenizer
from dapji.tokenizer.pretokenizers import PRE_TOKENIZERS
from dapji.weights import vocabulary
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_folder, write_quantized
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import read_gguf, write_gguf
from dapji.weights.summary import summarize
from tiny import CHATML, write_tiny

TEXTS = (
    "Hello, world! It's 2026.", "안녕하세요, 답지입니다. 🎉", " leading and  double  spaces\n\n\ttab", "abc ABC aB1b2",
    "<|im_start|>user\nhi<|im_end|>", "", "é e\u0301 ﬁ 漢字かな",
)  # fmt: skip
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pattern: str | None = None, *, nfc: bool = False) -> tokenizers.Tokenizer:
    """A trained byte-level BPE, as Qwen and Llama 3 write theirs into a tokenizer.json."""
    made = tokenizers.Tokenizer(models.BPE())
    if nfc:
        made.normalizer = normalizers.NFC()
    parts: list[pre_tokenizers.PreTokenizer] = []
    if pattern is not None:
        parts.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def sentencepiece() -> tokenizers.Tokenizer:
    """A SentencePiece-BPE, as transformers writes Llama 2's: a merge for every way to make a piece, by rank."""
    by_rank = ["▁h", "el", "lo", "hello", "▁hello", "llo", "ello", "▁▁"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helo", *by_rank]
    normal = set("▁helo") | set(by_rank)
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in by_rank
        for cut in sorted(range(1, len(piece)), key=lambda cut: (ids.get(piece[:cut], 0), ids.get(piece[cut:], 0)))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    made = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def hf_folder(
    folder: Path,
    encoder: tokenizers.Tokenizer,
    config: transformers.PreTrainedConfig,
    special: dict[str, str],
    *,
    noise: float = 0.3,
) -> transformers.PreTrainedModel:
    """Save a random model and a tokenizer with transformers."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))  # biases and norms not neutral
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=encoder, **special).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return model


CHAT_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp("qwen") / "Tiny-Qwen"
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return folder, hf_folder(folder, byte_level(QWEN2, nfc=True), config, CHAT_TOKENS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama") / "Tiny-Llama"
    config = transformers.LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
        rope_parameters={
            "rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0,
        },
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return folder, hf_folder(folder, sentencepiece(), config, special)


def logits(model: transformers.PreTrainedModel) -> np.ndarray:
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 288, (1, 40)))
    with torch.no_grad():
        return model(ids).logits[0].float().numpy()


def same_tokenizers(one: Tokenizer, other: Tokenizer) -> None:
    for text in TEXTS:
        ids = one.encode(text)
        assert other.encode(text) == ids, text
        assert other.decode(ids) == one.decode(ids)
        assert other.split_control(text) == one.split_control(text)
    assert one.encode("hello h\u1112\u1161\u11ab ▁") == other.encode("hello h\u1112\u1161\u11ab ▁")
    assert (other.bos_id, other.eos_id, other.add_bos) == (one.bos_id, one.eos_id, one.add_bos)
    assert other.stop_ids == one.stop_ids
    assert other.control == one.control
    assert other.chat_templates == one.chat_templates


def test_the_licence_goes_along(qwen: tuple[Path, transformers.PreTrainedModel], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(qwen[0], source)
    (source / "README.md").write_text("---\nlanguage: ko\nlicense: apache-2.0\n---\n# Tiny\n")
    write_quantized(open_checkpoint(source), tmp_path / "m.gguf", "F16")
    assert read_gguf(tmp_path / "m.gguf").metadata["general.license"] == "apache-2.0"
    write_folder(open_checkpoint(tmp_path / "m.gguf"), tmp_path / "back", "F16")
    write_folder(open_checkpoint(source), tmp_path / "copy", "F16")
    assert summarize(open_checkpoint(tmp_path / "back")).licence == "apache-2.0"
    assert (tmp_path / "copy" / "README.md").read_bytes() == (source / "README.md").read_bytes()


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_folder_to_gguf_to_folder_in_transformers(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder, model = request.getfixturevalue(family)
    path = tmp_path / "m.gguf"
    report = write_quantized(open_checkpoint(folder), path, "F32", measure=True)
    assert {tensor.error for tensor in report.tensors} == {0.0}
    metadata = read_gguf(path).metadata
    same_tokenizers(Tokenizer.from_folder(folder), Tokenizer.from_gguf(metadata))
    assert metadata["general.name"] == folder.name

    back = tmp_path / "back"
    write_folder(open_checkpoint(path), back, "F32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(logits(loaded), logits(model))
    same_tokenizers(Tokenizer.from_folder(folder), Tokenizer.from_folder(back))
    theirs, original = (transformers.AutoTokenizer.from_pretrained(f) for f in (back, folder))
    for text in TEXTS:
        assert theirs(text)["input_ids"] == original(text)["input_ids"]
        assert theirs.decode(theirs(text)["input_ids"]) == original.decode(original(text)["input_ids"])
    chat = [{"role": "user", "content": "안녕"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)


def test_a_quantised_folder_is_what_the_gguf_package_reads(
    qwen: tuple[Path, transformers.PreTrainedModel], tmp_path: Path
) -> None:
    folder, model = qwen
    path = tmp_path / "m.gguf"
    seen: list[int] = []
    source = open_checkpoint(folder)
    report = write_quantized(source, path, "Q4_K_M", measure=True, advance=seen.append)
    assert sum(seen) == source.nbytes
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "qwen2"
    assert reader.fields["general.file_type"].contents() == 15
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 512
    assert sum(tensor.n_bytes for tensor in reader.tensors) == report.target_bytes
    _, ours = families.from_hf(source.metadata, source.tensors)
    weights = dict(model.state_dict())
    errors = {tensor.name: tensor.error for tensor in report.tensors}
    for tensor in reader.tensors:
        if tensor.name.endswith("ffn_up.weight"):
            layer = tensor.name.split(".")[1]
            wanted = weights[f"model.layers.{layer}.mlp.up_proj.weight"].numpy()
            got = gguf.dequantize(tensor.data, tensor.tensor_type)
            error = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
            assert 0 < error < 0.08
            assert errors[tensor.name] == pytest.approx(error, rel=1e-3)
    assert len(ours) == len(errors)


def test_the_same_file_whatever_the_number_of_threads(
    qwen: tuple[Path, transformers.PreTrainedModel], tmp_path: Path
) -> None:
    for threads in (1, 3):
        write_quantized(open_checkpoint(qwen[0]), tmp_path / f"{threads}.gguf", "Q6_K", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_a_folder_in_another_dtype_and_in_shards(
    qwen: tuple[Path, transformers.PreTrainedModel], tmp_path: Path
) -> None:
    folder, model = qwen
    out = tmp_path / "bf16"
    report = write_folder(open_checkpoint(folder), out, "BF16", max_shard_bytes=400_000)
    assert report.formats == {"BF16": report.target_bytes}
    assert len(list(out.glob("*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.state_dict().items():
        torch.testing.assert_close(parameter, model.state_dict()[name].to(torch.bfloat16), rtol=0, atol=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_quantised_weights_are_not_quantised_again_unless_asked(tmp_path: Path) -> None:
    source, twice = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    write_quantized(open_checkpoint(write_tiny(tmp_path / "tiny.gguf", ["a"])), source, "Q8_0")
    with pytest.raises(UsageError, match=r"is Q8_0 already; quantising it to Q4_0 loses") as error:
        write_quantized(open_checkpoint(source), twice, "Q4_0")
    assert "--allow-requantize" in str(error.value)
    assert not twice.exists()
    write_quantized(open_checkpoint(source), twice, "Q4_0", allow_requantize=True)
    write_quantized(open_checkpoint(twice), tmp_path / "f32.gguf", "F32")  # dequantising loses nothing
    for name, tensor in read_gguf(twice).tensors.items():
        np.testing.assert_array_equal(read_gguf(tmp_path / "f32.gguf").tensors[name].float32(), tensor.float32())


def test_metadata_of_a_gguf_file_is_kept_byte_for_byte(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", ["a"])
    write_quantized(open_checkpoint(source), tmp_path / "out.gguf", "Q8_0")
    before, after = read_gguf(source).metadata, read_gguf(tmp_path / "out.gguf").metadata
    assert set(after) - set(before) == {"general.file_type", "general.quantization_version"}
    for key in before:
        assert bytes(after.encoded(key).data) == bytes(before.encoded(key).data)


def test_values_that_are_no_numbers_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        values = np.ones((2, 32), dtype=np.float32)
        values[1, 3] = value
        source = tmp_path / f"{name}.gguf"
        tensors = [TensorToWrite.of("blk.0.ffn_up.weight", Tensor.from_float32("w", values))]
        write_gguf(source, {"general.architecture": "llama"}, tensors)
        with pytest.raises(FormatError, match=r"'blk\.0\.ffn_up\.weight' has infinite or undefined values"):
            write_quantized(open_checkpoint(source), tmp_path / "out.gguf", "Q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inf.gguf", "nan.gguf"]


def test_a_folder_is_never_replaced_and_a_failure_leaves_none(
    qwen: tuple[Path, transformers.PreTrainedModel], tmp_path: Path
) -> None:
    source = open_checkpoint(qwen[0])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="exists already"):
        write_folder(source, tmp_path / "there", "F16")
    with pytest.raises(UsageError, match="a folder holds weights as F32, F16, BF16, not 'Q4_0'"):
        write_folder(source, tmp_path / "new", "Q4_0")
    with pytest.raises(UsageError, match="cannot write"):
        write_folder(source, tmp_path / "no" / "parent", "F16")
    with pytest.raises(UsageError, match="cannot write"):
        write_quantized(source, tmp_path / "no" / "parent.gguf", "Q8_0")
    with pytest.raises(UsageError, match="unknown type 'Q9'"):
        write_quantized(source, tmp_path / "m.gguf", "Q9")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


# ---- tokenizers that have no form in GGUF


def refused(folder: Path, target: Path, **changes: object) -> str:
    """The message for `folder` with changed entries of tokenizer.json."""
    original = (folder / "tokenizer.json").read_text()
    try:
        content = json.loads(original)
        for key, value in changes.items():
            part, _, inner = key.partition("__")
            if inner:
                content[part][inner] = value
            else:
                content[part] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(TokenizerError) as error:
            write_quantized(open_checkpoint(folder), target, "F16")
    finally:
        (folder / "tokenizer.json").write_text(original)
    assert not target.exists()
    return error.value.message


def test_what_gguf_cannot_say_about_a_tokenizer_is_refused(
    qwen: tuple[Path, transformers.PreTrainedModel], llama: tuple[Path, transformers.PreTrainedModel], tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    words = {"type": "Whitespace"}
    assert "cuts text into words in a way" in refused(qwen[0], out, pre_tokenizer=words)
    assert "cuts text into words in a way" in refused(qwen[0], out, normalizer={"type": "Lowercase"})
    assert "prefixes and suffixes" in refused(qwen[0], out, model__end_of_word_suffix="</w>")
    assert "model is 'Unigram'" in refused(qwen[0], out, model__type="Unigram")
    tokenizer = json.loads((llama[0] / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    for missing in (0, 4, -1):
        fewer = [merge for merge in merges if merge != merges[missing]]
        assert f"{len(fewer)} merges, SentencePiece would have {len(merges)};" in refused(
            llama[0], out, model__merges=fewer
        )
    assert "not in a row" in refused(llama[0], out, model__merges=[*merges[1:], merges[4]])
    stripping = [token | {"lstrip": True} for token in tokenizer["added_tokens"]]
    assert "swallows white space" in refused(llama[0], out, added_tokens=stripping)


@pytest.mark.parametrize("pre", {id(kind): name for name, kind in PRE_TOKENIZERS.items()}.values())
def test_every_way_of_cutting_words_survives_the_way_to_a_folder_and_back(pre: str, tmp_path: Path) -> None:
    trained = json.loads(byte_level(QWEN2).to_str())["model"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": list(trained["vocab"]),
        "token_type": np.array([3] * len(CONTROL) + [1] * (len(trained["vocab"]) - len(CONTROL)), dtype=np.int32),
        "merges": [" ".join(pair) for pair in trained["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "add_bos_token": True,
    }
    original = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    for name, content in vocabulary.huggingface_files(original).items():
        (tmp_path / name).write_text(json.dumps(content))
    same_tokenizers(Tokenizer.from_gguf(original), Tokenizer.from_folder(tmp_path))
    back = vocabulary.gguf_metadata(tmp_path, n_tokens=len(trained["vocab"]) + 3)
    expected = "stablelm2" if pre == "bailingmoe" else pre  # the same words by another expression
    assert PRE_TOKENIZERS[back["tokenizer.ggml.pre"]].patterns == PRE_TOKENIZERS[expected].patterns
    same_tokenizers(Tokenizer.from_gguf(original), Tokenizer.from_gguf(back))
    assert back["tokenizer.ggml.tokens"][-1] == f"[PAD{len(trained['vocab']) + 2}]"


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DeepSeek V3 is published, with 64 experts of 64 x 256 values, which are 12 MB as float32."""
    folder = tmp_path_factory.mktemp("fp8")
    config = transformers.DeepseekV3Config(
        vocab_size=512, hidden_size=256, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = {}
    for name, values in load_file(folder / "model.safetensors").items():
        tensors[name] = values
        if values.ndim == 2 and "_proj" in name:
            scale = torch.full([-(-size // 128) for size in values.shape], 0.01)
            tensors[name], tensors[f"{name}_scale_inv"] = (values / 0.01).to(torch.float8_e4m3fn), scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": quantization}))
    byte_level(QWEN2).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "folder"])
def test_8_bit_floats_are_made_one_after_another(in_8_bits: Path, kind: str, tmp_path: Path) -> None:
    """64 experts of a layer are one tensor in GGUF, but are never in memory at once."""
    source = open_checkpoint(in_8_bits)
    seen: list[int] = []
    tracemalloc.start()
    if kind == "folder":
        report = write_folder(source, tmp_path / "folder", "F32", threads=1, advance=seen.append)
    else:
        report = write_quantized(source, tmp_path / "model.gguf", kind, threads=1, advance=seen.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.values * 4 > 12e6
    assert peak < 4e6
    assert report.source_bytes == source.nbytes
    assert sum(seen) == pytest.approx(source.nbytes, rel=0.01)
    values = families.from_hf(source.metadata, source.tensors)[1]["layers.1.feed_forward.experts.up"].float32()
    if kind == "folder":
        read = open_checkpoint(tmp_path / "folder")
        assert "quantization_config" not in read.metadata
        written = families.from_hf(read.metadata, read.tensors)[1]["layers.1.feed_forward.experts.up"].float32()
        np.testing.assert_array_equal(written, values)
    else:
        written = read_gguf(tmp_path / "model.gguf").tensors["blk.1.ffn_up_exps.weight"].float32()
        assert np.abs(written - values).max() < np.abs(values).max() / 100
