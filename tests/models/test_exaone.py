"""EXAONE 3.x against vLLM's implementation of it, and against transformers' Llama under EXAONE's names."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_exaone
from test_llama_cpp import LOGARITHM, write
from tiny_models import EXECUTORS, TEXT, VOCAB, opened, oracle, oracle_logits, text

from dapji.models import families
from dapji.models.config import ModelConfig
from dapji.ops.batch import Batch
from dapji.ops.tensor import Tensor
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from llama_cpp import LlamaCpp

_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.attention.q_proj",
    "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj",
    "self_attn.o_proj": "attn.attention.out_proj",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}
LLAMAS = ["llama-3.1", "llama-3.2", "llama-head-dim"]
"""As EXAONE 3.5 7.8B (llama3 scaling), 2.4B (tied head), and with heads apart from dim."""


def logits(kind: str, config: ModelConfig, tensors: dict[str, Tensor], tokens: list[int]) -> np.ndarray:
    return opened(kind, config, tensors, context=len(tokens), kv="f32").step(Batch.single(tokens))


@pytest.mark.parametrize("kind", EXECUTORS)
def test_log_probabilities_are_those_of_vllm(kind: str) -> None:
    got = log_probabilities(kind, tiny_exaone.CONFIG)
    want = np.load(tiny_exaone.LOG_PROBABILITIES)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)  # float32 sums in another order
    unscaled = log_probabilities(kind, {**tiny_exaone.CONFIG, "rope_scaling": None})
    assert np.abs(unscaled - want).max() > 0.01


def log_probabilities(kind: str, config_json: dict[str, Any]) -> np.ndarray:
    tensors = {name: Tensor.from_float32(name, values) for name, values in tiny_exaone.weights().items()}
    config, weights = families.from_hf(config_json, tensors)
    rows = logits(kind, config, weights, tiny_exaone.text())[tiny_exaone.ROWS]
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


@cache
def renamed(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A Llama of `tiny_models` as an EXAONE folder has it."""
    config = oracle(name).config
    config_json = {
        "model_type": "exaone",
        "architectures": ["ExaoneForCausalLM"],
        "activation_function": config.hidden_act,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_epsilon": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_layers": config.num_hidden_layers,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }
    tensors = {}
    for key, values in oracle(name).state_dict().items():
        for theirs, ours in _NAMES.items():
            key = key.replace(theirs, ours)
        tensors[key] = Tensor.from_float32(key, values.numpy())
    return config_json, tensors


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", LLAMAS)
def test_logits_are_those_of_a_llama_under_other_names(name: str, kind: str) -> None:
    config, tensors = families.from_hf(*renamed(name))
    np.testing.assert_allclose(logits(kind, config, tensors, text()), oracle_logits(name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LLAMAS)
def test_folders_and_files_and_back_are_exact(name: str, tmp_path: Path) -> None:
    config_json, tensors = renamed(name)
    config, weights = families.from_hf(config_json, tensors)
    written, named = families.to_hf(config, weights)
    assert named.keys() == tensors.keys() - ({"lm_head.weight"} if config.tied_head else set())
    assert all(named[key].data is tensors[key].data for key in named)
    assert written.items() <= {**config_json, "rope_scaling": written["rope_scaling"]}.items()
    assert families.config_from_hf(json.loads(json.dumps(written))) == config

    metadata, named = families.to_gguf(config, weights)
    write_gguf(tmp_path / "model.gguf", metadata, [TensorToWrite.of(key, tensor) for key, tensor in named.items()])
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    read, again = families.from_gguf(checkpoint.metadata, checkpoint.tensors)
    assert {key: tensor.data.tobytes() for key, tensor in again.items()} == {
        key: tensor.data.tobytes() for key, tensor in weights.items()
    }
    assert replace(read, layers=config.layers) == config  # llama3 scaling has become factors
    np.testing.assert_allclose(logits("reference", read, again, text(TEXT)), oracle_logits(name), rtol=0, atol=1e-4)


def test_gguf_has_the_names_of_llama_cpp() -> None:
    config, weights = families.from_hf(*renamed("llama-3.1"))
    metadata, named = families.to_gguf(config, weights)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.EXAONE, config.n_layers)
    theirs = {names.get_name(key, try_suffixes=(".weight",)) for key in renamed("llama-3.1")[1]}
    assert named.keys() == theirs | {"rope_freqs.weight"}
    assert metadata["general.architecture"] == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.EXAONE]
    # the keys that llama.cpp requires of this architecture
    for key in (gguf.Keys.LLM.BLOCK_COUNT, gguf.Keys.LLM.CONTEXT_LENGTH, gguf.Keys.Attention.LAYERNORM_RMS_EPS):
        assert key.format(arch="exaone") in metadata


def test_llama_cpp_gives_the_same_probabilities(tmp_path: Path) -> None:
    config, weights = families.from_hf(*renamed("llama-3.1"))
    write(tmp_path / "model.gguf", config, weights)
    prompts = [text(n) for n in (3, 40, 100)]
    llama_cpp = LlamaCpp()
    try:
        got = llama_cpp.log_probabilities(tmp_path / "model.gguf", prompts, VOCAB)
    finally:
        llama_cpp.close()
    rows = oracle_logits("llama-3.1")[[len(prompt) - 1 for prompt in prompts]]
    np.testing.assert_allclose(got, rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)), rtol=0, atol=LOGARITHM)
