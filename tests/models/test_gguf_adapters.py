"""GGUF adapters: what llama.cpp makes of a file, and of the same adapter as PEFT wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from peft_adapters import loaded, make, written
from peft_adapters import logits as peft_logits
from safetensors.numpy import load_file
from test_llama_cpp import LOGARITHM, write
from tiny_models import TEXT, VOCAB, oracle, text, translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.executor import open_executor
from dapji.ops.batch import Batch
from dapji.weights.adapter_file import open_adapter, write_adapter, write_gguf_adapter
from dapji.weights.checkpoint import open_checkpoint
from llama_cpp import LlamaCpp

PREFIXES = range(3, TEXT, 12)


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    process = LlamaCpp()
    yield process
    process.close()


def convert(name: str, folder: Path, path: Path, *, alpha: float, architecture: str | None = None) -> Path:
    """PEFT's folder as GGUF, in the way of llama.cpp's convert_lora_to_gguf.py, by the names of the gguf package."""
    config: Any = oracle(name).config
    arch = {"llama": "llama", "qwen2": "qwen2", "phi3": "phi3"}[config.model_type]
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), config.num_hidden_layers
    )
    writer = gguf.GGUFWriter(path, architecture or arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, values in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key)
        assert match is not None
        module, letter = match.groups()
        if letter == "B" and arch == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            values = paired(values, heads)
        writer.add_tensor(f"{names.get_name(module)}.weight.lora_{letter.lower()}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def paired(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's `permute`: the halves of each head in pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", ["llama-3", "qwen2", "phi3-longrope"])
def test_llama_cpp_gives_the_same_probabilities(llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    folder = written(make(name), tmp_path / "peft")
    adapter = convert(name, folder, tmp_path / "adapter.gguf", alpha=5.0)
    write(tmp_path / "model.gguf", *translated(name))
    tokens = text()
    prompts = [tokens[:n] for n in PREFIXES]
    theirs = llama_cpp.log_probabilities(tmp_path / "model.gguf", prompts, VOCAB, adapter=adapter)

    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    config, tensors = families.from_gguf(checkpoint.metadata, checkpoint.tensors)
    logits = []
    for path in (adapter, folder):
        executor = open_executor("native", config, tensors, context=TEXT, kv="f32")
        number = executor.add_adapter(open_adapter(path, config))
        plain = Batch.single(tokens)
        logits.append(executor.step(Batch(**{**vars(plain), "adapters": np.array([number], dtype=np.int32)})))
    np.testing.assert_array_equal(*logits)
    rows = logits[0][[n - 1 for n in PREFIXES]].astype(np.float64)
    ours = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LOGARITHM)


@pytest.mark.parametrize("name", ["llama-3", "qwen2", "phi3-longrope"])
def test_what_we_write_is_what_llama_cpps_converter_writes(llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    """And llama.cpp computes with it what PEFT does."""
    model = make(name)
    folder = written(model, tmp_path / "peft")
    config, tensors = translated(name)
    ours = tmp_path / "ours.gguf"
    write_gguf_adapter(ours, config, open_adapter(folder, config), name="tiny")
    theirs = gguf.GGUFReader(convert(name, folder, tmp_path / "theirs.gguf", alpha=5.0))
    got = gguf.GGUFReader(ours)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert got.fields[key].contents() == theirs.fields[key].contents()
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert expected.keys() == {tensor.name for tensor in got.tensors}
    for tensor in got.tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].data)
    write(tmp_path / "model.gguf", config, tensors)
    prompts = [text()[:n] for n in PREFIXES]
    found = llama_cpp.log_probabilities(tmp_path / "model.gguf", prompts, VOCAB, adapter=ours)
    logits = torch.tensor(peft_logits(model)[[n - 1 for n in PREFIXES]])
    np.testing.assert_allclose(found, logits.log_softmax(dim=1).numpy(), rtol=0, atol=LOGARITHM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back(llama_cpp: LlamaCpp, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's values, types, ranks and scales; llama.cpp takes all types."""
    model = make("llama-2", rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 25 / 3})  # one scale, two ranks
    folder = written(model.to(dtype), tmp_path / "peft")
    config, tensors = translated("llama-2")
    write_gguf_adapter(tmp_path / "a.gguf", config, open_adapter(folder, config), name="tiny")
    (tmp_path / "back").mkdir()
    write_adapter(tmp_path / "back", config, open_adapter(tmp_path / "a.gguf", config), base="tiny")
    before, after = (
        safetensors.torch.load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for key, values in before.items():
        if "q_proj.lora_B" in key:  # its alpha is not that of the others, which the file has: the ratio is in B
            torch.testing.assert_close(after[key], values.float() * 5 / 3, rtol=1e-6, atol=0)
        else:
            assert after[key].dtype == dtype
            assert torch.equal(after[key], values)
    write(tmp_path / "model.gguf", config, tensors)
    prompts = [text()[:n] for n in PREFIXES]
    found = llama_cpp.log_probabilities(tmp_path / "model.gguf", prompts, VOCAB, adapter=tmp_path / "a.gguf")
    logits = torch.tensor(peft_logits(loaded("llama-2", folder))[[n - 1 for n in PREFIXES]])
    # llama.cpp rounds what it multiplies by 16-bit matrices to 16 bits too (0.04 is what occurs in bfloat16)
    atol = LOGARITHM if dtype == torch.float32 else 0.1
    np.testing.assert_allclose(found, logits.log_softmax(dim=1).numpy(), rtol=0, atol=atol)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = written(make("llama-3.2"), tmp_path / "peft")
    path = convert("llama-3.2", folder, tmp_path / "adapter.gguf", alpha=5.0, architecture="gemma2")
    with pytest.raises(ConfigError, match="the adapter is for a gemma2, but the model is a llama"):
        open_adapter(path, translated("llama-3.2")[0])
