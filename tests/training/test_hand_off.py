"""What training leaves, in other programs' hands: llama.cpp and transformers compute what training did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

import tiny_training as tiny
from dapji.cli.main import main
from dapji.files import Files, open_files
from dapji.models.torch_executor import load_pairs, load_weights, sequence_logits
from dapji.ops.torch import TorchTables
from dapji.training.settings import read_recipe
from dapji.training.tune import tune
from llama_cpp import LlamaCpp

LORA = "[lora]\nrank = 4"
RUN = "[optimizer]\nlearning_rate = 1e-2\n[run]\nsteps = 4\nbatch = 2"
TOKENS = list(range(3, 43))
ASCII = range(3 + 0x20, 3 + 0x7F)
"""Ids of letters that are whole by themselves."""
LOGARITHM = 2e-3
"""Of log-probabilities: llama.cpp computes exp and silu by approximations."""


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    process = LlamaCpp()
    yield process
    process.close()


def trained(folder: Path, *tables: str) -> tuple[Path, Path]:
    """The base and what a run leaves."""
    assert tune(read_recipe(tiny.write_recipe(folder, RUN, *tables)))
    return folder / "tiny.gguf", folder / "run"


def dapji(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def log_probabilities(files: Files, adapter: Path | None = None) -> NDArray[np.float64]:
    """[T, V] as training computes them."""
    device = torch.device("cpu")
    weights = load_weights(files.tensors, device=device, dtype=torch.float32)
    pairs = None if adapter is None else load_pairs(files.adapter(adapter), weights, dtype=torch.float32)
    with torch.no_grad():
        (logits,) = sequence_logits(
            files.config, weights, torch.tensor([TOKENS]), TorchTables(len(TOKENS), device), pairs
        )
    return logits.double().log_softmax(dim=1).numpy()


def same_in_llama_cpp(
    process: LlamaCpp, path: Path, expected: NDArray[np.float64], adapter: Path | None = None
) -> None:
    """Where a letter is likeliest: of an end and of a part of a letter llama.cpp gives no probabilities."""
    places = np.flatnonzero(np.isin(expected.argmax(axis=1), ASCII))[::4]
    assert len(places) > 1
    prompts = [TOKENS[: i + 1] for i in places]
    got = process.log_probabilities(path, prompts, expected.shape[1], adapter=adapter)
    np.testing.assert_allclose(got, expected[places], rtol=0, atol=LOGARITHM)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_in_llama_cpp_beside_the_base_and_merged(llama_cpp: LlamaCpp, dora: bool, tmp_path: Path) -> None:
    base, out = trained(tmp_path, LORA + "\ndora = true" * dora)
    expected = log_probabilities(open_files(base), out)
    assert np.abs(expected - log_probabilities(open_files(base))).max() > 0.05, "it has learned something"
    if not dora:  # for which GGUF has no form
        dapji("export", out, tmp_path / "adapter.gguf")
        same_in_llama_cpp(llama_cpp, base, expected, tmp_path / "adapter.gguf")
    dapji("merge", base, "F32", tmp_path / "merged.gguf", "--adapter", out)
    same_in_llama_cpp(llama_cpp, tmp_path / "merged.gguf", expected)
    dapji("merge", base, "F32", tmp_path / "merged", "--adapter", out)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].double()
    # float32 sums in another order
    np.testing.assert_allclose(logits.log_softmax(dim=1).numpy(), expected, rtol=0, atol=1e-4)


def test_a_whole_model_in_llama_cpp(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    base, out = trained(tmp_path)
    expected = log_probabilities(open_files(out))
    assert np.abs(expected - log_probabilities(open_files(base))).max() > 0.05, "it has learned something"
    dapji("quantize", out, "F32", tmp_path / "tuned.gguf", "--base", base)
    same_in_llama_cpp(llama_cpp, tmp_path / "tuned.gguf", expected)
