"""Whole models from and to foreign formats, bit-exact both ways.

Compared with transformers, the gguf package and what llama.cpp's converter writes.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_dense
import tiny_experts
import tiny_latent
import torch
import transformers
from tiny_models import TEXT, TINY, WINDOW, oracle, oracle_logits, text, translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.config import ModelConfig, weight_shapes
from dapji.models.executor import open_executor
from dapji.models.families.layout import HF
from dapji.models.families.rope import ROPE_FREQS, rope_tensors
from dapji.ops.batch import Batch
from dapji.ops.formats import FORMATS
from dapji.ops.rope import RopeConfig, RopeScaling
from dapji.ops.tensor import Tensor
from dapji.weights import store
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from dapji.weights.safetensors import write_safetensors

NOT_IN_GGUF = {
    "llama-dynamic",
    "llama-yarn-mscale",
    "llama-gelu",
    "qwen2-window",
    *tiny_experts.UNSAYABLE,
    *tiny_dense.UNSAYABLE,
    *tiny_latent.UNSAYABLE,
}
IN_GGUF = [name for name in TINY if name not in NOT_IN_GGUF]
"""Those that GGUF can express."""
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    **tiny_experts.ARCHITECTURES,
    **tiny_dense.ARCHITECTURES,
}
"""By model_type."""
LLAMA_LIKE = [name for name in IN_GGUF if name not in tiny_latent.TINY]
"""Those without latent attention, of which test_latent_families.py tells."""


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].format, a[name].shape) == (b[name].format, b[name].shape)
        np.testing.assert_array_equal(a[name].data, b[name].data)


def through_gguf(
    config: ModelConfig, tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], ModelConfig, dict[str, Tensor]]:
    """Written to a file and read back: metadata, configuration, weights."""
    metadata, named = families.to_gguf(config, tensors)
    write_gguf(folder / "model.gguf", metadata, [TensorToWrite.of(name, tensor) for name, tensor in named.items()])
    checkpoint = open_checkpoint(folder / "model.gguf")
    return dict(checkpoint.metadata), *families.from_gguf(checkpoint.metadata, checkpoint.tensors)


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.2",
        "llama-bias",
        "llama-head-dim",
        "llama-linear",
        "llama-dynamic",
        "llama-yarn-mscale",
        "mistral",
        "qwen2-window",
        *tiny_experts.TINY,
        *tiny_dense.TINY,
        *tiny_latent.TINY,
    ],
)
def test_transformers_loads_what_to_hf_writes(name: str, tmp_path: Path) -> None:
    config, tensors = translated(name)
    config_json, named = families.to_hf(config, tensors)
    # a token that the tokenizer would say; Phi's default is beyond a tiny vocabulary
    (tmp_path / "config.json").write_text(json.dumps({**config_json, "pad_token_id": 0}))
    write_safetensors(tmp_path / "model.safetensors", [TensorToWrite.of(key, tensor) for key, tensor in named.items()])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(oracle(name))
    with torch.no_grad():
        logits = loaded(torch.tensor([text()]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(logits, oracle_logits(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TINY if name != "deepseek-v3-halves"])  # we write pairs
def test_huggingface_and_back_is_exact(name: str, tmp_path: Path) -> None:
    """The tensors are those of the folder that transformers writes."""
    config, tensors = translated(name)
    config_json, named = families.to_hf(config, tensors)
    oracle(name).save_pretrained(tmp_path)
    assert_same(named, dict(open_checkpoint(tmp_path).tensors))
    again, weights = families.from_hf(json.loads(json.dumps(config_json)), named)
    assert again == config
    assert_same(weights, tensors)


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_has_the_same_logits(name: str, tmp_path: Path) -> None:
    config, tensors = translated(name)
    _, read, weights = through_gguf(config, tensors, tmp_path)
    assert_same(weights, tiny_dense.as_in_gguf(config, tensors))
    executor = open_executor("reference", read, weights, context=TEXT, kv="f32")
    np.testing.assert_allclose(executor.step(Batch.single(text())), oracle_logits(name), rtol=0, atol=1e-4)
    metadata, named = families.to_gguf(config, tensors)
    metadata_again, named_again = families.to_gguf(read, weights)
    assert_same(named_again, named)
    assert metadata_again.keys() == metadata.keys()


def expected_metadata(name: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config.json, in keys of the gguf package (tokenizer and general apart)."""
    config = oracle(name).config
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    llm, attention, rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
    keys = {
        llm.BLOCK_COUNT: config.num_hidden_layers,
        llm.CONTEXT_LENGTH: config.max_position_embeddings,
        llm.EMBEDDING_LENGTH: config.hidden_size,
        llm.FEED_FORWARD_LENGTH: config.intermediate_size,
        attention.HEAD_COUNT: config.num_attention_heads,
        attention.HEAD_COUNT_KV: config.num_key_value_heads,
        attention.LAYERNORM_RMS_EPS: config.rms_norm_eps,
        rope.FREQ_BASE: config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"],
    }
    if arch == "llama":
        keys |= {
            llm.VOCAB_SIZE: config.vocab_size,
            rope.DIMENSION_COUNT: head_dim,
            attention.KEY_LENGTH: head_dim,
            attention.VALUE_LENGTH: head_dim,
        }
    kind = config.rope_parameters.get("rope_type")
    if kind in ("linear", "yarn"):
        keys |= {rope.SCALING_TYPE: kind, rope.SCALING_FACTOR: config.rope_parameters["factor"]}
    if kind == "yarn":
        keys[rope.SCALING_ORIG_CTX_LEN] = config.rope_parameters["original_max_position_embeddings"]
        for key, written in (("beta_fast", rope.SCALING_YARN_BETA_FAST), ("beta_slow", rope.SCALING_YARN_BETA_SLOW)):
            if key in config.rope_parameters:
                keys[written] = config.rope_parameters[key]
    keys |= tiny_experts.expected_metadata(config) | tiny_dense.expected_metadata(config)
    return {gguf.Keys.General.ARCHITECTURE: arch, **{key.format(arch=arch): value for key, value in keys.items()}}


def known_keys(group: type) -> set[str]:
    return {value for value in vars(group).values() if isinstance(value, str)}


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_metadata_is_as_llama_cpps_converter_writes_it(name: str, tmp_path: Path) -> None:
    metadata, _, _ = through_gguf(*translated(name), tmp_path)
    expected = expected_metadata(name)
    for key, value in expected.items():
        got = metadata[key].tolist() if isinstance(metadata[key], np.ndarray) else metadata[key]
        assert got == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
    arch = expected[gguf.Keys.General.ARCHITECTURE]
    known = known_keys(gguf.Keys.LLM) | known_keys(gguf.Keys.Attention) | known_keys(gguf.Keys.Rope)
    assert metadata.keys() - expected.keys() <= {key.replace("{arch}", arch) for key in known}


@pytest.mark.parametrize("name", [name for name in IN_GGUF if name not in {*tiny_dense.TINY, *tiny_latent.TINY}])
def test_tensors_are_named_and_permuted_as_in_llama_cpp(name: str) -> None:
    config, tensors = translated(name)
    metadata, named = families.to_gguf(config, tensors)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.family], config.n_layers)
    expected = {
        names.get_name(tiny_experts.merged_name(config.family, key) or HF.name(key), (".weight", ".bias")): key
        for key in weight_shapes(config)
    }
    assert named.keys() - {"rope_freqs.weight"} == expected.keys()
    for gguf_name, key in expected.items():
        values = tensors[key].float32()
        n_heads = {"q": config.layers[0].attention.n_heads, "k": config.layers[0].attention.n_kv_heads}.get(
            key.rsplit(".", 1)[-1].removesuffix("_bias")
        )
        in_pairs = metadata["general.architecture"] in ("llama", "llama4", "smollm3")
        if n_heads is not None and in_pairs:
            pairs = values.reshape(n_heads, 2, len(values) // n_heads // 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        np.testing.assert_array_equal(named[gguf_name].float32(), values)


@pytest.mark.parametrize(
    ("theta", "dim", "scaling"),
    [
        pytest.param(500_000.0, 128, (8.0, 1.0, 4.0, 8192), id="Llama-3.1"),
        pytest.param(500_000.0, 64, (32.0, 1.0, 4.0, 8192), id="Llama-3.2-1B"),
        pytest.param(10_000.0, 16, (3.0, 1.5, 6.0, 128), id="odd"),
    ],
)
def test_rope_freqs_are_those_of_llama_cpps_converter(
    theta: float, dim: int, scaling: tuple[float, float, float, int]
) -> None:
    factor, low, high, original = scaling
    rope = RopeConfig(
        theta=theta,
        dim=dim,
        scaling=RopeScaling(
            kind="llama3",
            factor=factor,
            low_frequency_factor=low,
            high_frequency_factor=high,
            original_context=original,
        ),
    )
    expected = []
    for i in range(dim // 2):
        wave = 2 * math.pi * theta ** (2 * i / dim)
        smooth = (original / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        expected.append(1.0 if wave < original / high else factor if wave > original / low else between)
    assert len({1.0, factor} & set(expected)) == 2
    np.testing.assert_allclose(rope_tensors(rope)[ROPE_FREQS], expected, rtol=2e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_1", "Q6_K", "Q4_K", "F16", "BF16"])
def test_rows_are_permuted_exactly_in_every_format(name: str, tmp_path: Path) -> None:
    """GGUF -> canonical -> GGUF gives the same bytes, and canonical rows are the file's rows in another order."""
    format = FORMATS[name]
    config = replace(translated("llama-head-dim")[0], dim=format.block * 2)
    rng = np.random.default_rng(0)
    tensors = {
        key: Tensor.from_float32(key, rng.standard_normal(shape, dtype=np.float32))
        if len(shape) == 1
        else Tensor(
            name=key,
            format=format if shape[-1] % format.block == 0 else FORMATS["F32"],
            shape=shape,
            source=rng.integers(
                0,
                256,
                (shape[0], (format if shape[-1] % format.block == 0 else FORMATS["F32"]).row_bytes(shape[-1])),
                dtype=np.uint8,
            ),
        )
        for key, shape in weight_shapes(config).items()
    }
    _, read, weights = through_gguf(config, tensors, tmp_path)
    assert read == config
    assert_same(weights, tensors)


def test_the_shipped_model_is_the_same_after_a_round_trip() -> None:
    """GGUF -> canonical -> GGUF of SmolLM2: every tensor's bytes, every key of the architecture that the file has."""
    checkpoint = open_checkpoint(store.resolve("smollm2-135m"))
    config, weights = families.from_gguf(checkpoint.metadata, checkpoint.tensors)
    metadata, named = families.to_gguf(config, weights)
    assert_same(named, dict(checkpoint.tensors))
    own = {key: value for key, value in checkpoint.metadata.items() if key.startswith("llama.")}
    for key, value in own.items():
        assert metadata[key] == pytest.approx(value, rel=1e-7), key


def test_a_gguf_file_without_a_window_is_read_as_llama(tmp_path: Path) -> None:
    """The two are one architecture there; they compute the same."""
    config, tensors = translated("mistral-nemo")
    _, read, _ = through_gguf(config, tensors, tmp_path)
    assert read == replace(config, family="llama")
    config, tensors = translated("mistral")
    metadata, read, _ = through_gguf(config, tensors, tmp_path)
    assert metadata[gguf.Keys.Attention.SLIDING_WINDOW.format(arch="llama")] == WINDOW
    assert read == config


def test_old_checkpoints_with_frequencies_are_read() -> None:
    config, tensors = translated("llama-1")
    config_json, named = families.to_hf(config, tensors)
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = Tensor.from_float32("", np.ones(8, dtype=np.float32))
    assert_same(families.from_hf(config_json, named)[1], tensors)


def test_a_tied_head_may_be_stored_too() -> None:
    config, tensors = translated("llama-3.2")
    config_json, named = families.to_hf(config, tensors)
    named["lm_head.weight"] = named["model.embed_tokens.weight"]
    assert_same(families.from_hf(config_json, named)[1], tensors)
    named["lm_head.weight"] = Tensor.from_float32("", named["lm_head.weight"].float32() + 1)
    with pytest.raises(ConfigError, match=r"tie_word_embeddings, but lm_head.weight differs from .*\nhint: set"):
        families.from_hf(config_json, named)
