"""What the newer dense families have beside Llama: it matters, and it is what transformers and llama.cpp mean by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_dense
import torch
import transformers
from test_families import assert_same, through_gguf
from test_llama_cpp import LOGARITHM, write
from tiny_models import (
    EXECUTORS,
    ORIGINAL,
    TOLERANCE,
    VOCAB,
    WINDOW,
    logits,
    oracle,
    oracle_logits,
    text,
    translated,
)

from dapji.models import families
from dapji.models.config import AttentionConfig, LayerConfig, ModelConfig
from dapji.models.families.rope import ROPE_TENSORS
from dapji.ops.tensor import Tensor
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.files import TensorToWrite
from dapji.weights.safetensors import write_safetensors
from llama_cpp import LlamaCpp

IN_GGUF = [name for name in tiny_dense.TINY if name not in tiny_dense.UNSAYABLE]


def attention(layer: LayerConfig) -> AttentionConfig:
    assert isinstance(layer.attention, AttentionConfig)
    return layer.attention


def changed(config: ModelConfig, change: Callable[[AttentionConfig], AttentionConfig]) -> ModelConfig:
    layers = [replace(layer, attention=change(attention(layer))) for layer in config.layers]
    return replace(config, layers=tuple(layers))


def global_rope(config: ModelConfig) -> ModelConfig:
    (full,) = {attention(layer).rope for layer in config.layers if attention(layer).window is None}
    return changed(config, lambda old: replace(old, rope=full))


def local_rope(config: ModelConfig) -> ModelConfig:
    (local,) = {attention(layer).rope for layer in config.layers if attention(layer).window is not None}
    return changed(config, lambda old: replace(old, rope=local))


def without_scaling(config: ModelConfig) -> ModelConfig:
    return changed(config, lambda old: replace(old, rope=old.rope and replace(old.rope, scaling=None)))


def rotated_as_a_whole(config: ModelConfig) -> ModelConfig:
    def whole(old: AttentionConfig) -> AttentionConfig:
        assert old.rope is not None
        assert old.rope.scaling is not None
        scaling = replace(old.rope.scaling, long_factors=(2.0,) * (old.head_dim // 2), short_factors=(1.0,) * 8)
        return replace(old, rope=replace(old.rope, dim=old.head_dim, scaling=scaling))

    return changed(config, whole)


def plain_attention_factor(config: ModelConfig) -> ModelConfig:
    def plain(old: AttentionConfig) -> AttentionConfig:
        assert old.rope is not None
        assert old.rope.scaling is not None
        return replace(old, rope=replace(old.rope, scaling=replace(old.rope.scaling, attention_factor=1.0)))

    return changed(config, plain)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("exaone4", without_scaling, id="exaone4: llama3 scaling"),
        pytest.param("exaone4", lambda c: changed(c, lambda a: replace(a, qk_norm=None)), id="exaone4: head norms"),
        pytest.param("exaone4-hybrid", local_rope, id="exaone4: no rope in layers without a window"),
        pytest.param("exaone4-hybrid", lambda c: changed(c, lambda a: replace(a, window=None)), id="exaone4: windows"),
        pytest.param("gemma2", lambda c: changed(c, lambda a: replace(a, softcap=None)), id="gemma2: cap of scores"),
        pytest.param("gemma2", lambda c: replace(c, logit_softcap=None), id="gemma2: cap of logits"),
        pytest.param("gemma2", lambda c: changed(c, lambda a: replace(a, window=None)), id="gemma2: windows"),
        pytest.param("gemma2", lambda c: replace(c, embed_scale=1.0), id="gemma2: scaled embeddings"),
        pytest.param("gemma2", lambda c: replace(c, norm_offset=0.0), id="gemma2: offset of norms"),
        pytest.param("gemma2-scale", lambda c: changed(c, lambda a: replace(a, scale=None)), id="gemma2: scale"),
        pytest.param("gemma3", lambda c: changed(c, lambda a: replace(a, window=None)), id="gemma3: windows"),
        pytest.param("gemma3", global_rope, id="gemma3: theta of layers with a window"),
        pytest.param("gemma3", local_rope, id="gemma3: theta of layers without"),
        pytest.param("gemma3-linear", without_scaling, id="gemma3: scaling of layers without a window"),
        pytest.param("phi3", lambda c: changed(c, lambda a: replace(a, window=None)), id="phi3: windows"),
        pytest.param("phi3-longrope", without_scaling, id="phi3: longrope"),
        pytest.param("phi3-longrope", plain_attention_factor, id="phi3: longrope's attention factor"),
        pytest.param("phi4-mini", rotated_as_a_whole, id="phi4-mini: heads rotated in part"),
    ],
)
def test_it_matters(name: str, change: Callable[[ModelConfig], ModelConfig]) -> None:
    config, tensors = translated(name)
    assert np.abs(logits(change(config), tensors) - oracle_logits(name)).max() > 0.05


def test_windows_are_in_the_layers_that_the_configurations_say() -> None:
    def windowed(name: str) -> str:
        return "".join("GL"[attention(layer).window is not None] for layer in translated(name)[0].layers)

    assert windowed("exaone4") == "GGG"
    assert windowed("exaone4-hybrid") == "LLLGL"
    assert windowed("gemma2") == "LGLG"
    assert windowed("gemma3") == "LLLLLGL"
    assert windowed("phi3") == "LLL"


@pytest.mark.parametrize(
    ("written", "windowed"),
    [
        ({}, "LLLGLLLG"),
        ({"sliding_window_pattern": 3}, "LLGLLGLL"),
        ({"sliding_window_pattern": "LLG"}, "LLGLLGLG"),  # the last has none
        ({"sliding_window_pattern": "LLLG", "layer_types": ["full_attention", "sliding_attention"] * 4}, "GLGLGLGL"),
    ],
)
def test_forms_of_patterns(written: dict[str, object], windowed: str) -> None:
    config_json, _ = families.to_hf(*translated("exaone4-hybrid"))
    del config_json["layer_types"]
    config = families.config_from_hf({**config_json, "num_hidden_layers": 8, **written})
    assert "".join("GL"[attention(layer).window is not None] for layer in config.layers) == windowed
    assert all((attention(layer).rope is None) == (attention(layer).window is None) for layer in config.layers)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", ["phi3-longrope", "phi4-mini"])
@pytest.mark.parametrize("context", [ORIGINAL, ORIGINAL + 1, 100])
def test_longrope_has_the_factors_of_the_executors_context(name: str, kind: str, context: int) -> None:
    """transformers takes the length of the text that it sees in one pass; we the context, whatever the text."""
    config, tensors = translated(name)
    want = oracle_logits(name, context)
    np.testing.assert_allclose(logits(config, tensors, context, kind=kind), want, rtol=0, atol=TOLERANCE)
    part = logits(config, tensors, ORIGINAL, kind=kind, context=context)
    np.testing.assert_allclose(part, want[:ORIGINAL], rtol=0, atol=TOLERANCE)
    longer = np.abs(oracle_logits(name, ORIGINAL) - oracle_logits(name, ORIGINAL + 1)[:ORIGINAL]).max()
    assert longer > 0.1


@pytest.mark.parametrize("name", IN_GGUF)
def test_tensors_are_those_of_llama_cpps_converter(name: str) -> None:
    """The name map of the gguf package on transformers' own names; values as there, Gemma's norms with 1 added."""
    config, tensors = translated(name)
    _, named = families.to_gguf(config, tensors)
    names = gguf.get_tensor_name_map(tiny_dense.ARCHITECTURES[config.family], config.n_layers)
    state = oracle(name).state_dict()
    if config.tied_head:
        del state["lm_head.weight"]
    expected = {names.get_name(key, try_suffixes=(".weight",)): values.numpy() for key, values in state.items()}
    assert named.keys() - set(ROPE_TENSORS) == expected.keys()
    for key, values in expected.items():
        offset = np.float32(config.norm_offset if key.endswith("norm.weight") else 0)
        np.testing.assert_array_equal(named[key].float32(), values + offset)


@pytest.mark.parametrize("name", IN_GGUF)
def test_the_configuration_comes_back_from_gguf(name: str, tmp_path: Path) -> None:
    config, tensors = translated(name)
    _, read, _ = through_gguf(config, tensors, tmp_path)
    if name.startswith("exaone4"):  # llama3 scaling has become factors
        read = replace(read, layers=without_factors(read))
        config = replace(config, layers=without_scaling(config).layers)
    if name.startswith("phi"):  # factors are float32 there
        read, config = without_scaling(read), without_scaling(config)
    assert replace(read, norm_offset=config.norm_offset) == config


def without_factors(config: ModelConfig) -> tuple[LayerConfig, ...]:
    return changed(config, lambda old: replace(old, rope=old.rope and replace(old.rope, frequency_factors=None))).layers


@pytest.mark.parametrize("name", ["gemma2", "gemma3-linear"])
def test_norms_lose_their_offset_on_the_way_back_to_a_folder(name: str, tmp_path: Path) -> None:
    """Folder -> GGUF -> folder: 1 is added and subtracted in float32, all else is the same bits."""
    config, tensors = translated(name)
    _, read, weights = through_gguf(config, tensors, tmp_path)
    assert read.norm_offset == 0
    config_json, named = families.to_hf(read, weights)
    _, original = families.to_hf(config, tensors)
    norms = {key for key in named if key.endswith("norm.weight")}
    for key in norms:
        np.testing.assert_allclose(named[key].float32(), original.pop(key).float32(), rtol=0, atol=2**-23)
    assert_same({key: tensor for key, tensor in named.items() if key not in norms}, original)
    again, weights = families.from_hf(json.loads(json.dumps(config_json)), named)
    assert again == config
    np.testing.assert_allclose(logits(again, weights), oracle_logits(name), rtol=0, atol=TOLERANCE)


def test_the_text_of_a_multimodal_gemma_3(tmp_path: Path) -> None:
    """The folder that transformers writes of Gemma 3 with eyes: the text is read, the eyes are left out."""
    text_config = oracle("gemma3-linear").config
    config = transformers.Gemma3Config(
        text_config=text_config,
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "image_size": 28,
            "patch_size": 14, "num_hidden_layers": 1, "num_attention_heads": 2,
        },
        mm_tokens_per_image=1,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    state = oracle("gemma3-linear").state_dict()
    model.load_state_dict(
        {key.replace("model.", "model.language_model.", 1): values for key, values in state.items()}, strict=False
    )
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert any(name.startswith("vision_tower.") for name in checkpoint.tensors)
    read, tensors = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    assert read == translated("gemma3-linear")[0]
    assert_same(
        {key: Tensor.from_float32(key, tensor.float32()) for key, tensor in tensors.items()},
        translated("gemma3-linear")[1],
    )


def test_gemmas_head_may_be_its_own(tmp_path: Path) -> None:
    config, tensors = translated("gemma3")
    config = replace(config, tied_head=False)
    tensors = {**tensors, "head": Tensor.from_float32("head", tensors["embed"].float32() * 2)}
    config_json, named = families.to_hf(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps({**config_json, "pad_token_id": 0}))
    write_safetensors(tmp_path / "model.safetensors", [TensorToWrite.of(key, tensor) for key, tensor in named.items()])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        want = loaded(torch.tensor([text()]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(logits(config, tensors), want, rtol=0, atol=2 * TOLERANCE)  # twice the head


def test_the_window_reaches_as_far_as_in_transformers() -> None:
    """Up to its length a model with windows computes as one without."""
    config, tensors = translated("phi3")
    difference = logits(changed(config, lambda old: replace(old, window=None)), tensors) - oracle_logits("phi3")
    assert np.abs(difference[:WINDOW]).max() <= TOLERANCE
    assert np.abs(difference[WINDOW]).max() > 1e-3


def test_llama_cpp_reads_windows_of_the_hybrid_with_64_layers(tmp_path: Path) -> None:
    """It takes exaone4 for a hybrid by this number of layers alone (compare `tiny_dense.LACKING`)."""
    config = transformers.Exaone4Config(
        **{**oracle("exaone4-hybrid").config.to_dict(), "num_hidden_layers": 64, "layer_types": None, "hidden_size": 32}
    )
    torch.manual_seed(3)
    model = transformers.Exaone4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / "model.gguf"
    write(path, *families.from_hf(checkpoint.metadata, checkpoint.tensors))
    prompts = [text(n) for n in (3, WINDOW, WINDOW + 8, 100)]
    llama_cpp = LlamaCpp()
    try:
        got = llama_cpp.log_probabilities(path, prompts, VOCAB)
    finally:
        llama_cpp.close()
    with torch.no_grad():
        rows = [model(torch.tensor([prompt]), use_cache=False).logits[0, -1] for prompt in prompts]
    np.testing.assert_allclose(got, torch.log_softmax(torch.stack(rows), dim=-1), rtol=0, atol=LOGARITHM)
