"""The configurations of published models are read without complaint, and count as many parameters as they have.

The files in `published` state the facts of each model's config.json; the counts are those that the hub shows for its
safetensors, exact to the last parameter. Where those are in 8-bit floats, whose scales the hub counts too, they are
those of transformers' model, and PREDICTED says how many the predictor adds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama4 import modeling_llama4

from dapji.models.config import AttentionConfig, FeedForwardConfig, weight_shapes
from dapji.models.families import FAMILIES, config_from_hf
from dapji.models.families.llama4 import LLAMA4
from dapji.models.size import active_parameters, parameters
from dapji.ops.attention import Temperature

FOLDER = Path(__file__).parent / "published"

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "tinyllama-1.1b-chat": 1_100_048_384,
    "vicuna-7b-v1.5-16k": 6_738_415_616,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "mistral-7b-instruct-v0.3": 7_248_023_552,
    "mistral-nemo-instruct-2407": 12_247_782_400,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b-instruct": 7_615_616_512,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-7b-instruct-yarn": 7_615_616_512,
    "qwen2.5-7b-instruct-1m": 7_615_616_512,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "exaone-3.0-7.8b-instruct": 7_818_448_896,
    "exaone-3.5-2.4b-instruct": 2_405_327_360,
    "exaone-3.5-7.8b-instruct": 7_818_448_896,
    "exaone-3.5-32b-instruct": 32_003_200_000,
    "exaone-4.0-1.2b": 1_279_391_488,
    "exaone-4.0-32b": 32_003_216_384,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
    # of their text: 416,866,032 and 1152 (dim + 1) less than the whole
    "gemma-3-4b-it": 3_880_263_168,
    "gemma-3-12b-it": 11_766_034_176,
    "gemma-3-27b-it": 27_009_346_304,
    "phi-3-mini-4k-instruct": 3_821_079_552,
    "phi-3-medium-4k-instruct": 13_960_238_080,
    "phi-3.5-mini-instruct": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "phi-4-mini-instruct": 3_836_021_760,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-32b-yarn": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-instruct-2507": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-235b-a22b-thinking-2507": 235_093_634_560,
    "qwen3-coder-480b-a35b-instruct": 480_154_875_392,
    "mixtral-8x7b-v0.1": 46_702_792_704,
    "mixtral-8x22b-v0.1": 140_620_634_112,
    "mixtral-8x22b-instruct-v0.1": 140_630_071_296,
    # of their text, which is what is read
    "llama-4-scout-17b-16e": 107_769_861_120,
    "llama-4-scout-17b-16e-instruct": 107_769_861_120,
    "llama-4-scout-text": 107_769_861_120,
    "llama-4-maverick-17b-128e-instruct": 400_711_848_960,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2.5": 235_741_434_880,
    "deepseek-coder-v2-lite-instruct": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "deepseek-r1": 671_026_419_200,
    "deepseek-v3.1": 671_026_419_200,
    "kimi-k2-instruct": 1_026_408_232_448,
    "moonlight-16b-a3b": 15_960_110_208,
}
PREDICTED = dict.fromkeys(("deepseek-v3", "deepseek-r1", "deepseek-v3.1"), 13_463_426_304)
"""11.5 G of its own, and copies of embedding and head (DeepSeek-V3, README_WEIGHTS)."""
CONTEXTS = {
    "llama-2-7b": 4096,
    "llama-3.1-8b": 131_072,
    "vicuna-7b-v1.5-16k": 16_384,
    "exaone-3.0-7.8b-instruct": 4096,
    "exaone-3.5-7.8b-instruct": 32_768,
    "exaone-4.0-32b": 131_072,
    "gemma-2-9b": 8192,
    "gemma-3-270m": 32_768,
    "gemma-3-4b-it": 131_072,
    "phi-3.5-mini-instruct": 131_072,
    "phi-4": 16_384,
    "qwen2.5-0.5b-instruct": 32_768,
    "qwen2.5-7b-instruct-yarn": 131_072,
    "qwen2.5-7b-instruct-1m": 262_144,
    "qwen3-32b": 40_960,
    "qwen3-32b-yarn": 131_072,
    "llama-4-scout-17b-16e-instruct": 10_485_760,
    "mistral-nemo-instruct-2407": 1_024_000,
    "deepseek-v2-lite": 163_840,
    "deepseek-v3": 163_840,
    "kimi-k2-instruct": 131_072,
    "moonlight-16b-a3b": 8192,
}


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return config


def test_every_file_has_its_count() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    total = sum(map(math.prod, weight_shapes(config_from_hf(published(name))).values()))
    assert total == PARAMETERS[name] + PREDICTED.get(name, 0)


@pytest.mark.parametrize("name", CONTEXTS)
def test_context(name: str) -> None:
    assert config_from_hf(published(name)).max_context == CONTEXTS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_we_write_of_it_means_the_same(name: str) -> None:
    config = config_from_hf(published(name))
    family = next(family for family in FAMILIES if family.name == config.family)
    assert config_from_hf({"model_type": family.name, **family.to_hf(config)}) == config


def test_windows() -> None:
    windows = {
        name: {
            layer.attention.window
            for layer in config_from_hf(published(name)).layers
            if isinstance(layer.attention, AttentionConfig)
        }
        for name in PARAMETERS
    }
    assert windows.pop("mistral-7b-v0.1") == {4096}
    assert windows.pop("exaone-4.0-32b") == {4096, None}
    for name, window in [
        *[(f"gemma-2-{size}", 4096) for size in ("2b", "9b", "27b")],
        *[(f"gemma-3-{size}", 512) for size in ("270m", "1b-it")],
        *[(f"gemma-3-{size}-it", 1024) for size in ("4b", "12b", "27b")],
    ]:
        assert windows.pop(name) == {window, None}
    for name, window in [
        *[(f"phi-3-{size}-4k-instruct", 2047) for size in ("mini", "medium")],
        *[(name, 262_144) for name in ("phi-3.5-mini-instruct", "phi-4-mini-instruct")],
    ]:
        assert windows.pop(name) == {window}
    assert all(window <= {None} for window in windows.values())


@pytest.mark.parametrize(
    ("name", "whole"),
    [("llama-4-scout-17b-16e", 108_641_793_536), ("llama-4-maverick-17b-128e-instruct", 401_583_781_376)],
)
def test_what_sees_makes_up_the_rest(name: str, whole: int) -> None:
    """The hub's count is of text and vision together; transformers says how large the parts are that we leave out."""
    file = published(name)
    text = {"hidden_size": file["text_config"]["hidden_size"]}
    config = transformers.Llama4Config(vision_config=file["vision_config"], text_config=text)
    with torch.device("meta"):
        parts = (
            transformers.Llama4VisionModel(config.vision_config),
            modeling_llama4.Llama4MultiModalProjector(config),
        )
    seeing = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert PARAMETERS[name] + seeing == whole


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("qwen3-30b-a3b", 3.3e9),
        ("qwen3-235b-a22b", 22e9),
        ("qwen3-coder-480b-a35b-instruct", 35e9),
        ("mixtral-8x7b-v0.1", 12.9e9),
        ("mixtral-8x22b-v0.1", 39e9),
        ("llama-4-scout-17b-16e", 17e9),
        ("llama-4-maverick-17b-128e-instruct", 17e9),
    ],
)
def test_active_parameters_are_those_of_the_names(name: str, active: float) -> None:
    """Published counts are rounded, and take in the embedding, of which we count the row that is read."""
    config = config_from_hf(published(name))
    assert active_parameters(config) + config.vocab_size * config.dim == pytest.approx(active, rel=0.025)


def test_llama_4s_layers() -> None:
    scout = config_from_hf(published("llama-4-scout-17b-16e-instruct"))
    maverick = config_from_hf(published("llama-4-maverick-17b-128e-instruct"))
    for config, qk_norm, dense in ((scout, "plain", ()), (maverick, None, range(0, 48, 2))):
        for i, layer in enumerate(config.layers):
            attention = layer.attention
            assert isinstance(attention, AttentionConfig)
            if (i + 1) % 4:
                assert (attention.chunk, attention.temperature, attention.qk_norm) == (8192, None, qk_norm)
                assert attention.rope is not None
            else:
                assert (attention.chunk, attention.rope, attention.qk_norm) == (None, None, None)
                assert attention.temperature == Temperature(scale=0.1, length=8192)
            assert isinstance(layer.feed_forward, FeedForwardConfig) == (i in dense)
    # older and newer files of the same model
    older = config_from_hf(published("llama-4-scout-17b-16e"))
    assert older == config_from_hf(published("llama-4-scout-text"))
    assert [layer.feed_forward for layer in older.layers] == [layer.feed_forward for layer in scout.layers]


def test_a_model_of_behemoths_size() -> None:
    """Of Llama 4 Behemoth this is known: 288 billion parameters take part in a token, of nearly two trillion, with 16
    experts. Its sizes were not published: these are assumed, with Scout's mechanisms, such that they give those counts.
    """
    sizes = {"hidden_size": 16_384, "intermediate_size": 24_064, "num_hidden_layers": 96, "num_attention_heads": 128}
    file = published("llama-4-scout-17b-16e")
    config = config_from_hf({**file, "text_config": {**file["text_config"], **sizes}})
    assert active_parameters(config) == pytest.approx(288e9, rel=0.02)
    assert parameters(config) == pytest.approx(2e12, rel=0.02)
    metadata = LLAMA4.to_gguf(config)
    assert metadata["expert_count"] == 16
