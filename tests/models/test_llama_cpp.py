"""What we write as GGUF is what llama.cpp reads: it loads the file and gives the same probabilities.

Of the tiny models that transformers made (`tiny_models`), so that Hugging Face -> GGUF is compared as a whole: names,
keys, orders of rows, and what llama.cpp computes from them, before and beyond every threshold of position.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_dense
import tiny_experts
import tiny_latent
from tiny_models import TEXT, TINY, VOCAB, oracle_logits, text, translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.config import ModelConfig
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from llama_cpp import LlamaCpp
from tiny import alphabet

PERPLEXITY = 0.003
"""Relative. 2e-5 is what occurs."""
LOGARITHM = 2e-3
"""Absolute, of any token's log probability: both compute in float32, llama.cpp exp and silu by approximations."""
LACKING = {
    "mistral": "windows in the architecture llama",
    "llama-yarn-attention-factor": "yarn's beta_fast and beta_slow in the architecture llama",
    **tiny_experts.LACKING,
    **tiny_dense.LACKING,
    **tiny_latent.LACKING,
}
"""What the file says and llama.cpp does not read."""
UNSAYABLE = {
    "llama-gelu": "the activation gelu is not supported",
    "llama-dynamic": "no form for dynamic rope scaling",
    "llama-yarn-mscale": "no form for yarn with truncate = false",
    "qwen2-window": "no form for windows in some layers only",
    **tiny_experts.UNSAYABLE,
    **tiny_dense.UNSAYABLE,
    **tiny_latent.UNSAYABLE,
}
"""What GGUF has no form for, and we refuse to write."""
PREFIXES = range(3, TEXT, 12)


def write(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """The model with a vocabulary of single bytes."""
    metadata, named = families.to_gguf(config, tensors)
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": alphabet()[:VOCAB],
        "tokenizer.ggml.token_type": np.ones(VOCAB, dtype=np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    write_gguf(path, metadata, [TensorToWrite.of(name, tensor) for name, tensor in named.items()])


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    process = LlamaCpp()
    yield process
    process.close()


@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_gives_the_same_probabilities(llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    config, tensors = translated(name)
    path = tmp_path / "model.gguf"
    if name in UNSAYABLE:
        with pytest.raises(ConfigError, match=UNSAYABLE[name]):
            write(path, config, tensors)
        return
    write(path, config, tensors)
    tokens = text()
    theirs = llama_cpp.log_probabilities(path, [tokens[:n] for n in PREFIXES], VOCAB)
    logits = oracle_logits(name)[[n - 1 for n in PREFIXES]].astype(np.float64)
    ours = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    following = np.array([tokens[n] for n in PREFIXES])
    perplexities = [np.exp(-rows[np.arange(len(rows)), following].mean()) for rows in (theirs, ours)]
    if name in LACKING:
        assert np.abs(theirs - ours).max() > 0.1, f"llama.cpp has learnt {LACKING[name]}"
        return
    # GELU comes out of a table of float16 there
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LOGARITHM * (2 if "gemma" in name else 1))
    assert perplexities[0] == pytest.approx(perplexities[1], rel=PERPLEXITY)
