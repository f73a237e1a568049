"""Models of experts beside the common tests: each mechanism decides, and the text of a model that sees is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_llama_cpp import write
from tiny_models import VOCAB, logits, oracle_logits, text, translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.config import AttentionConfig, ExpertsConfig, LayerConfig
from dapji.models.executor import open_executor
from dapji.ops.batch import Batch
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_folder
from dapji.weights.files import TensorToWrite
from dapji.weights.safetensors import write_safetensors
from llama_cpp import LlamaCpp

Change = Callable[[LayerConfig], LayerConfig]


def attending(**changes: Any) -> Change:
    def change(layer: LayerConfig) -> LayerConfig:
        assert isinstance(layer.attention, AttentionConfig)
        return replace(layer, attention=replace(layer.attention, **changes))

    return change


def routing(**changes: Any) -> Change:
    def change(layer: LayerConfig) -> LayerConfig:
        if not isinstance(layer.feed_forward, ExpertsConfig):
            return layer
        changed = replace(layer.feed_forward.routing, **changes)
        return replace(layer, feed_forward=replace(layer.feed_forward, routing=changed))

    return change


def without_shared(layer: LayerConfig) -> LayerConfig:
    assert isinstance(layer.feed_forward, ExpertsConfig)
    return replace(layer, feed_forward=replace(layer.feed_forward, shared_hidden_dim=0))


def rotated(layer: LayerConfig) -> LayerConfig:
    rope = translated("llama-4")[0].layers[0].attention.rope
    return layer if layer.attention.rope is not None else attending(rope=rope)(layer)


def scaled_plainly(layer: LayerConfig) -> LayerConfig:
    rope = layer.attention.rope
    return layer if rope is None else attending(rope=replace(rope, scaling=None))(layer)


@pytest.mark.parametrize(
    ("name", "change", "first"),
    [
        pytest.param("llama-4", attending(chunk=None), 24, id="chunk"),
        pytest.param("llama-4", attending(temperature=None), 15, id="temperature"),
        pytest.param("llama-4", attending(qk_norm=None), 1, id="qk_norm"),
        pytest.param("llama-4", rotated, 1, id="layers without rope"),
        pytest.param("llama-4", scaled_plainly, 1, id="llama3 scaling"),
        pytest.param("llama-4", routing(score="softmax"), 0, id="sigmoid"),
        pytest.param("llama-4", routing(weighs="output"), 0, id="weighed input"),
        pytest.param("llama-4", routing(normalized=True), 0, id="weights as they are"),
        pytest.param("llama-4", without_shared, 0, id="shared expert"),
        pytest.param("qwen3-moe", routing(normalized=False), 0, id="norm_topk_prob"),
        pytest.param("qwen3-moe-dense-layer", routing(normalized=True), 0, id="not norm_topk_prob"),
        pytest.param("qwen3-moe", attending(qk_norm=None), 1, id="weighted qk_norm"),
        pytest.param("qwen3-moe-yarn", scaled_plainly, 1, id="yarn"),
        pytest.param("mixtral", routing(normalized=False), 0, id="mixtral's weights"),
        pytest.param("mixtral", routing(n_experts_per_token=1), 0, id="two experts"),
        pytest.param("mixtral-window", attending(window=None), 24, id="window"),
    ],
)
def test_mechanisms_matter(name: str, change: Change, first: int) -> None:
    """From position `first` on, and not before; the tolerance is that of parity."""
    config, tensors = translated(name)
    changed = replace(config, layers=tuple(map(change, config.layers)))
    difference = np.abs(logits(changed, tensors) - oracle_logits(name))
    assert difference[:first].max(initial=0) <= 1e-4
    assert difference[first:].max() > 0.1


def test_the_text_of_a_model_that_sees(tmp_path: Path) -> None:
    """As transformers writes the whole of Llama 4; the other way it becomes a model of text alone."""
    config = transformers.Llama4Config(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 32,
            "intermediate_size_mlp": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 3,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 24,
            "max_position_embeddings": 512,
            "eos_token_id": [7, 8],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "vision_output_dim": 16,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    )
    torch.manual_seed(1)
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
        want = model.language_model(torch.tensor([text()]), use_cache=False).logits[0].numpy()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    own, tensors = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    np.testing.assert_allclose(logits(own, tensors), want, rtol=0, atol=1e-4)

    written, named = families.to_hf(own, tensors)
    assert written["model_type"] == "llama4_text"
    for name, tensor in named.items():
        np.testing.assert_array_equal(tensor.data, checkpoint.tensors[f"language_model.{name}"].data)
    write_folder(checkpoint, tmp_path / "text", "F32")
    text_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(text_model) is transformers.Llama4ForCausalLM
    assert text_model.config.eos_token_id == [7, 8]
    with torch.no_grad():
        np.testing.assert_array_equal(text_model(torch.tensor([text()]), use_cache=False).logits[0].numpy(), want)
    with pytest.raises(ConfigError, match="tie_word_embeddings = True is not supported, only False is"):
        families.from_hf({**checkpoint.metadata, "tie_word_embeddings": True}, checkpoint.tensors)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "llama-4", "llama-4-dense-layers"])
def test_twice_round_is_the_same_file(name: str, tmp_path: Path) -> None:
    config, tensors = translated(name)
    folders = []
    for i in range(2):
        config_json, named = families.to_hf(config, tensors)
        folders.append(folder := tmp_path / str(i))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_json))
        write_safetensors(folder / "model.safetensors", [TensorToWrite.of(key, value) for key, value in named.items()])
        checkpoint = open_checkpoint(folder)
        config, tensors = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    for file in ("config.json", "model.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.slow
def test_llama_4_beyond_its_chunk(tmp_path: Path) -> None:
    """At the published thresholds: the second chunk and the first step of temperature begin at 8,192 tokens, natively
    and in llama.cpp, which reads neither from the file."""
    config = transformers.Llama4TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=16_384,
        attn_implementation="eager",
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = text(8400)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        want = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    own, tensors = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    got = open_executor("native", own, tensors, context=len(tokens), kv="f32").step(Batch.single(tokens))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)  # 2e-5 is what occurs
    for mechanism in ("chunk", "temperature"):
        plain = replace(own, layers=tuple(attending(**{mechanism: None})(layer) for layer in own.layers))
        other = open_executor("native", plain, tensors, context=len(tokens), kv="f32").step(Batch.single(tokens))
        assert np.abs(other - want)[:8191].max() < 2e-4
        assert np.abs(other - want)[8191:].max() > 1

    write(tmp_path / "model.gguf", own, tensors)
    lengths = [4000, 8191, 8192, 8193, 8400]
    llama_cpp = LlamaCpp()
    theirs = llama_cpp.log_probabilities(tmp_path / "model.gguf", [tokens[:n] for n in lengths], VOCAB)
    llama_cpp.close()
    rows = want[[n - 1 for n in lengths]].astype(np.float64)
    np.testing.assert_allclose(theirs, rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)), rtol=0, atol=2e-3)
