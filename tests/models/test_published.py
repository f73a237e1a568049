"""The configurations of published models are read without complaint, and count as many parameters as they have.

The files in `published` state the facts of each model's config.json; the counts are those that the hub shows for its
safetensors, exact to the last parameter.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dapji.models.config import weight_shapes
from dapji.models.families import FAMILIES, config_from_hf

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
}
CONTEXTS = {
    "llama-2-7b": 4096,
    "llama-3.1-8b": 131_072,
    "vicuna-7b-v1.5-16k": 16_384,
    "exaone-3.0-7.8b-instruct": 4096,
    "exaone-3.5-7.8b-instruct": 32_768,
    "qwen2.5-0.5b-instruct": 32_768,
    "qwen2.5-7b-instruct-yarn": 131_072,
    "qwen2.5-7b-instruct-1m": 262_144,
    "mistral-nemo-instruct-2407": 1_024_000,
}


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return config


def test_every_file_has_its_count() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert sum(map(math.prod, weight_shapes(config_from_hf(published(name))).values())) == PARAMETERS[name]


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
        name: {layer.attention.window for layer in config_from_hf(published(name)).layers} for name in PARAMETERS
    }
    assert windows.pop("mistral-7b-v0.1") == {4096}
    assert all(window == {None} for window in windows.values())
