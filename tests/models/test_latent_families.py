"""DeepSeek V2, V3 and Kimi K2: what is special about their configurations and weights, in both formats.

Compared with transformers, the gguf package, what llama.cpp's converter writes and what llama.cpp computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_families import assert_same
from test_llama_cpp import LOGARITHM, write
from tiny_latent import TINY
from tiny_models import VOCAB, logits, oracle, oracle_logits, saved, text, translated

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.config import ExpertsConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.quantize import quantize
from dapji.weights.safetensors import write_safetensors
from llama_cpp import LlamaCpp

IN_GGUF = [name for name in TINY if name != "deepseek-v3-halves"]
Weights = dict[str, Tensor]


# ---- mechanisms ----


def with_plain_scale(config: ModelConfig) -> ModelConfig:
    """Scores scaled as without yarn."""
    layers = []
    for layer in config.layers:
        attention = layer.attention
        assert isinstance(attention, LatentAttentionConfig)
        scale = (attention.nope_dim + attention.rope.dim) ** -0.5
        layers.append(replace(layer, attention=replace(attention, scale=scale)))
    return replace(config, layers=tuple(layers))


def with_routing(config: ModelConfig, **values: Any) -> ModelConfig:
    def changed(layer: LayerConfig) -> LayerConfig:
        experts = layer.feed_forward
        if not isinstance(experts, ExpertsConfig):
            return layer
        return replace(layer, feed_forward=replace(experts, routing=replace(experts.routing, **values)))

    return replace(config, layers=tuple(map(changed, config.layers)))


def without_groups(config: ModelConfig) -> ModelConfig:
    return with_routing(config, n_groups=1, n_groups_per_token=1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, with_plain_scale) for name in ("deepseek-v2-lite", "deepseek-v3", "kimi-k2")),
        *((name, without_groups) for name in ("deepseek-v2", "deepseek-v3")),
        ("deepseek-v3", lambda c: with_routing(c, group_score="max")),
        ("deepseek-v3", lambda c: with_routing(c, normalized=False)),
        ("deepseek-v3", lambda c: with_routing(c, scale=1.0)),
        ("deepseek-v2", lambda c: with_routing(c, score="sigmoid")),
    ],
)
def test_mechanisms_matter_in_these_models(name: str, change: Callable[[ModelConfig], ModelConfig]) -> None:
    config, weights = translated(name)
    assert np.abs(logits(change(config), weights) - oracle_logits(name)).max() > 0.05


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_the_selection_bias_matters_once(factor: float) -> None:
    config, weights = translated("deepseek-v3")
    changed = {
        name: Tensor.from_float32(name, factor * tensor.float32()) if name.endswith("selection_bias") else tensor
        for name, tensor in weights.items()
    }
    assert np.abs(logits(config, changed) - oracle_logits("deepseek-v3")).max() > 0.05


def test_latent_vectors_are_normed_by_an_epsilon_of_their_own() -> None:
    """As the published code does, where rms_norm_eps is another."""
    for name in TINY:
        config, _ = translated(name)
        assert config.norm_eps == 1e-5
        assert {layer.attention.norm_eps for layer in config.layers} == {1e-6}  # type: ignore[union-attr]


# ---- Hugging Face ----


@pytest.mark.parametrize("name", TINY)
def test_a_folder_is_the_same_file_the_second_time(name: str, tmp_path: Path) -> None:
    config_json, named = families.to_hf(*translated(name))
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    written = []
    for path in paths:
        write_safetensors(path, [TensorToWrite.of(key, tensor) for key, tensor in named.items()])
        written.append(json.dumps(config_json))
        config_json, named = families.to_hf(*families.from_hf(json.loads(written[-1]), named))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim"), [(0.707, 0.707), (1.0, 1.0), (1.0, 0.707), (0.5, 1.25), (0.0, 1.0), (1.0, 0.0)]
)
def test_yarns_mscales_are_written_as_they_were(mscale: float, mscale_all_dim: float) -> None:
    config_json, _ = families.to_hf(*translated("deepseek-v3"))
    scaling = {**config_json["rope_scaling"], "mscale": mscale, "mscale_all_dim": mscale_all_dim}  # type: ignore[dict-item]
    config = families.config_from_hf({**config_json, "rope_scaling": scaling})
    _, weights = translated("deepseek-v3")
    again, _ = families.to_hf(config, weights)
    written: dict[str, Any] = again["rope_scaling"]  # type: ignore[assignment]
    # one without the other has no effect on rotation, where 0 and absence are the same
    expected = {
        "mscale_all_dim": mscale_all_dim or None,
        "mscale": mscale if mscale and mscale_all_dim else None,
        "attention_factor": None,
    }
    assert {key: written.get(key) for key in expected} == expected
    assert families.config_from_hf(again) == config


def test_kimi_k2_is_deepseek_v3_under_another_name() -> None:
    config, weights = translated("kimi-k2")
    config_json, named = families.to_hf(config, weights)
    renamed = {**config_json, "model_type": "kimi_k2"}
    kimi, read = families.from_hf(renamed, named)
    assert kimi == replace(config, family="kimi_k2")
    assert_same(read, weights)
    assert families.to_hf(kimi, read)[0] == renamed


def test_the_text_of_kimi_k25_is_kimi_k2() -> None:
    """What sees is left out. The names are those of the published folder."""
    config, weights = translated("kimi-k2")
    text_config, named = families.to_hf(replace(config, family="kimi_k2"), weights)
    # as transformers 4 wrote inner configurations, by its own defaults
    text_config |= {"num_beams": 1, "output_attentions": False, "pruned_heads": {}, "torchscript": False}
    outer = {"model_type": "kimi_k25", "text_config": text_config, "vision_config": {"vt_hidden_size": 32}}
    tensors = {f"language_model.{name}": tensor for name, tensor in named.items()}
    for name in ("vision_tower.patch_embed.pos_emb.weight", "mm_projector.proj.0.bias"):
        tensors[name] = Tensor.from_float32(name, np.zeros((4, 4), dtype=np.float32))
    read, read_weights = families.from_hf(outer, tensors)
    assert read == replace(config, family="kimi_k2")
    assert_same(read_weights, weights)
    with pytest.raises(
        ConfigError, match="text_config: model_type = 'deepseek_v3' is not supported, only 'kimi_k2' is"
    ):
        families.from_hf({**outer, "text_config": {**text_config, "model_type": "deepseek_v3"}}, tensors)
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}}
    published = {**outer, "text_config": {**text_config, "quantization_config": quantization}}
    with pytest.raises(ConfigError, match=r"quant_method 'compressed-tensors' is not supported"):
        families.from_hf(published, tensors)
    assert families.config_from_hf(published) == read  # its size can be planned


# ---- predictors ----


def with_predictor(name: str) -> tuple[dict[str, object], Weights]:
    """The folder's content with a predictor, as DeepSeek V3 has it: a layer of experts and what stands around it."""
    config_json, named = families.to_hf(*translated(name))
    last = f"model.layers.{oracle(name).config.num_hidden_layers - 1}."
    own = f"model.layers.{oracle(name).config.num_hidden_layers}."
    rng = np.random.default_rng(1)
    shapes = {key.replace(last, own): tensor.shape for key, tensor in named.items() if key.startswith(last)}
    dim = oracle(name).config.hidden_size
    shapes |= {own + key: (dim,) for key in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    shapes |= {own + key: (VOCAB, dim) for key in ("embed_tokens.weight", "shared_head.head.weight")}
    shapes[own + "eh_proj.weight"] = (dim, 2 * dim)
    made = {
        key: Tensor.from_float32(key, rng.standard_normal(shape, dtype=np.float32)) for key, shape in shapes.items()
    }
    return {**config_json, "num_nextn_predict_layers": 1}, named | made


def test_predictors_are_kept_in_both_formats(tmp_path: Path) -> None:
    config_json, named = with_predictor("deepseek-v3")
    config, weights = families.from_hf(config_json, named)
    assert len(config.predictors) == 1
    again, named_again = families.to_hf(config, weights)
    assert again == config_json
    assert_same(named_again, named)
    metadata, in_gguf = families.to_gguf(config, weights)
    assert metadata["deepseek2.block_count"] == 4
    assert metadata["deepseek2.nextn_predict_layers"] == 1
    assert {name.partition("nextn.")[2] for name in in_gguf if "nextn" in name} == {
        "eh_proj.weight", "embed_tokens.weight", "enorm.weight", "hnorm.weight", "shared_head_head.weight",
        "shared_head_norm.weight",
    }  # fmt: skip
    read, read_weights = families.from_gguf(metadata, in_gguf)
    assert read == config
    assert_same(read_weights, weights)
    # they change nothing, here and there
    np.testing.assert_allclose(logits(config, weights), oracle_logits("deepseek-v3"), rtol=0, atol=1e-4)
    write(tmp_path / "model.gguf", config, weights)
    llama_cpp = LlamaCpp()
    theirs = llama_cpp.log_probabilities(tmp_path / "model.gguf", [text()], VOCAB)[0]
    llama_cpp.close()
    ours = oracle_logits("deepseek-v3")[-1].astype(np.float64)
    np.testing.assert_allclose(theirs, ours - np.log(np.exp(ours).sum()), rtol=0, atol=LOGARITHM)


def test_predictors_that_a_configuration_names_may_be_absent() -> None:
    """transformers leaves them out of what it writes, and llama.cpp's converter out of GGUF."""
    config_json, named = families.to_hf(*translated("deepseek-v3"))
    config, weights = families.from_hf({**config_json, "num_nextn_predict_layers": 1}, named)
    assert config == translated("deepseek-v3")[0]
    metadata, in_gguf = families.to_gguf(config, weights)
    counted = {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    assert families.from_gguf({**metadata, **counted}, in_gguf)[0] == config


# ---- GGUF ----


def expected_metadata(name: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config.json, in keys of the gguf package (tokenizer and general apart)."""
    config = oracle(name).config
    llm, attention, rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
    scaling, gating = config.rope_parameters, gguf.ExpertGatingFuncType.SIGMOID
    if config.model_type == "deepseek_v2":
        gating = gguf.ExpertGatingFuncType.SOFTMAX
    keys = {
        llm.BLOCK_COUNT: config.num_hidden_layers,
        llm.CONTEXT_LENGTH: config.max_position_embeddings,
        llm.EMBEDDING_LENGTH: config.hidden_size,
        llm.VOCAB_SIZE: config.vocab_size,
        llm.LEADING_DENSE_BLOCK_COUNT: config.first_k_dense_replace,
        llm.EXPERT_FEED_FORWARD_LENGTH: config.moe_intermediate_size,
        llm.EXPERT_COUNT: config.n_routed_experts,
        llm.EXPERT_USED_COUNT: config.num_experts_per_tok,
        llm.EXPERT_SHARED_COUNT: config.n_shared_experts,
        llm.EXPERT_WEIGHTS_SCALE: config.routed_scaling_factor,
        llm.EXPERT_GROUP_COUNT: config.n_group or 1,
        llm.EXPERT_GROUP_USED_COUNT: config.topk_group or 1,
        llm.EXPERT_GATING_FUNC: int(gating),
        llm.EXPERT_WEIGHTS_NORM: config.norm_topk_prob,
        attention.HEAD_COUNT: config.num_attention_heads,
        attention.HEAD_COUNT_KV: 1,
        attention.LAYERNORM_RMS_EPS: config.rms_norm_eps,
        attention.KV_LORA_RANK: config.kv_lora_rank,
        attention.KEY_LENGTH: config.kv_lora_rank + config.qk_rope_head_dim,
        attention.VALUE_LENGTH: config.kv_lora_rank,
        attention.KEY_LENGTH_MLA: config.qk_nope_head_dim + config.qk_rope_head_dim,
        attention.VALUE_LENGTH_MLA: config.v_head_dim,
        # the converter leaves 0 out, but llama.cpp asks for the key unless there are 26 or 27 layers
        attention.Q_LORA_RANK: config.q_lora_rank or 0,
        rope.DIMENSION_COUNT: config.qk_rope_head_dim,
        rope.FREQ_BASE: scaling["rope_theta"],
    }
    if config.first_k_dense_replace:
        keys[llm.FEED_FORWARD_LENGTH] = config.intermediate_size
    if scaling["rope_type"] == "yarn":
        keys |= {
            rope.SCALING_TYPE: "yarn",
            rope.SCALING_FACTOR: scaling["factor"],
            rope.SCALING_ORIG_CTX_LEN: scaling["original_max_position_embeddings"],
            rope.SCALING_YARN_BETA_FAST: scaling["beta_fast"],
            rope.SCALING_YARN_BETA_SLOW: scaling["beta_slow"],
            rope.SCALING_YARN_LOG_MUL: 0.1 * scaling["mscale_all_dim"],
        }
    return {key.format(arch="deepseek2"): value for key, value in keys.items()}


@pytest.mark.parametrize("name", IN_GGUF)
def test_metadata_is_as_llama_cpps_converter_writes_it(name: str) -> None:
    config, weights = translated(name)
    metadata, named = families.to_gguf(config, weights)
    expected = expected_metadata(name)
    for key, value in expected.items():
        assert metadata[key] == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
    # without dense layers nothing depends on the size that they would have
    more = metadata.keys() - expected.keys() - {"general.architecture"}
    assert more == (set() if config.layers[0] != config.layers[-1] else {"deepseek2.feed_forward_length"})
    assert families.from_gguf(metadata, named)[0] == config


@pytest.mark.parametrize("name", IN_GGUF)
def test_tensors_are_those_of_llama_cpps_converter(name: str) -> None:
    """Named by the gguf package; experts one below the other; k_up and v_up apart, k_up transposed."""
    hf = oracle(name).config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, hf.num_hidden_layers)
    expected: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for key in sorted(saved(name), key=lambda key: [int(part) if part.isdigit() else 0 for part in key.split(".")]):
        values = saved(name)[key]
        if ".experts." in key:
            layer, _, rest = key.partition(".experts.")
            experts.setdefault(f"{layer}.experts.{rest.partition('.')[2]}", []).append(values)
        elif key.endswith("kv_b_proj.weight"):
            heads = values.reshape(hf.num_attention_heads, -1, hf.kv_lora_rank)
            expected[key.replace("kv_b", "k_b")] = heads[:, : hf.qk_nope_head_dim].transpose(0, 2, 1)
            expected[key.replace("kv_b", "v_b")] = heads[:, hf.qk_nope_head_dim :]
        elif key.endswith("e_score_correction_bias"):
            expected[key.replace("_bias", ".bias")] = values  # the converter renames it so
        else:
            expected[key] = values
    expected |= {key: np.stack(matrices) for key, matrices in experts.items()}
    _, named = families.to_gguf(*translated(name))
    theirs = {names.get_name(key, try_suffixes=(".weight", ".bias")): values for key, values in expected.items()}
    assert named.keys() == theirs.keys()
    for key, values in theirs.items():
        np.testing.assert_array_equal(named[key].float32(), values)


def unsplit(name: str, format: str) -> tuple[dict[str, Any], Weights]:
    """A GGUF file as llama.cpp's converter wrote it until April 2025: keys and values of all heads in one tensor."""
    hf = oracle(name).config
    metadata, named = families.to_gguf(*translated(name))
    for i in range(hf.num_hidden_layers):
        del named[f"blk.{i}.attn_k_b.weight"], named[f"blk.{i}.attn_v_b.weight"]
        values, key = saved(name)[f"model.layers.{i}.self_attn.kv_b_proj.weight"], f"blk.{i}.attn_kv_b.weight"
        named[key] = Tensor(
            name=key, format=FORMATS[format], shape=values.shape, source=quantize(values, FORMATS[format])
        )
    attention = gguf.Keys.Attention
    metadata = {
        **metadata,
        attention.HEAD_COUNT_KV.format(arch="deepseek2"): hf.num_attention_heads,
        attention.KEY_LENGTH.format(arch="deepseek2"): hf.qk_nope_head_dim + hf.qk_rope_head_dim,
        attention.VALUE_LENGTH.format(arch="deepseek2"): hf.v_head_dim,
    }
    for key in (attention.KEY_LENGTH_MLA, attention.VALUE_LENGTH_MLA):
        del metadata[key.format(arch="deepseek2")]
    return metadata, named


def test_older_files_are_read() -> None:
    config, weights = translated("deepseek-v2-lite")
    read, read_weights = families.from_gguf(*unsplit("deepseek-v2-lite", "F32"))
    assert read == config
    assert_same(read_weights, weights)


def test_older_files_in_blocks_have_the_same_values() -> None:
    """k_up cannot be transposed in blocks, but its values can, exactly."""
    hf = oracle("deepseek-v2-lite").config
    metadata, named = unsplit("deepseek-v2-lite", "Q8_0")
    _, weights = families.from_gguf(metadata, named)
    heads = named["blk.1.attn_kv_b.weight"].float32().reshape(hf.num_attention_heads, -1, hf.kv_lora_rank)
    k_up, v_up = weights["layers.1.attention.k_up"], weights["layers.1.attention.v_up"]
    assert (k_up.format.name, v_up.format.name) == ("F32", "Q8_0")
    np.testing.assert_array_equal(k_up.float32(), heads[:, : hf.qk_nope_head_dim].transpose(0, 2, 1))
    np.testing.assert_array_equal(v_up.float32(), heads[:, hf.qk_nope_head_dim :])


def test_a_folder_is_written_of_blocks() -> None:
    """GGUF in Q8_0 -> Hugging Face in float32: the values, in one tensor again."""
    config, weights = translated("deepseek-v3")
    q8 = FORMATS["Q8_0"]
    key = "layers.1.attention.v_up"
    values = weights[key].float32()
    rows = quantize(values.reshape(-1, values.shape[-1]), q8)
    weights = {**weights, key: Tensor(name=key, format=q8, shape=values.shape, source=rows)}
    _, named = families.to_hf(config, weights)
    written = named["model.layers.1.self_attn.kv_b_proj.weight"].float32()
    heads = written.reshape(len(values), -1, values.shape[-1])
    np.testing.assert_array_equal(heads[:, -values.shape[1] :], weights[key].float32())
