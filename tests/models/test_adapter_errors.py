"""What is refused in adapters' files, each with the name of what is wrong."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from peft_adapters import make, written
from safetensors.numpy import load_file, save_file
from tiny_models import oracle, translated

from dapji.errors import ConfigError, FormatError
from dapji.models.adapter import Adapter
from dapji.weights.adapter_file import open_adapter

EMBED = "base_model.model.model.embed_tokens"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(make("llama-3.2"), tmp_path_factory.mktemp("adapter"))


def changed(folder: Path, target: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Adapter:
    """The adapter, read with other entries and tensors; None takes one away."""
    target.mkdir(exist_ok=True)
    read = {**json.loads((folder / "adapter_config.json").read_text()), **config}
    (target / "adapter_config.json").write_text(json.dumps(read))
    all_tensors = {**load_file(folder / "adapter_model.safetensors"), **tensors}
    save_file({k: v for k, v in all_tensors.items() if v is not None}, target / "adapter_model.safetensors")
    return open_adapter(target, translated("llama-3.2")[0])


def zeros(*shape: int) -> Any:
    return np.zeros(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "LOHA"}, {}, "peft_type 'LOHA' is not supported"),
        ({"use_dora": True}, {}, r"the adapter lacks .*_proj\.lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save is not supported"),
        ({"bias": "lora_only"}, {}, "bias 'lora_only' is not supported"),
        ({"lora_bias": True}, {}, "lora_bias is not supported"),
        ({"trainable_token_indices": [1]}, {}, "trainable_token_indices is not supported"),
        ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens is not supported"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "'pissa_niter_4' is for a base that it has changed"),
        ({"something_new": 3}, {}, "unknown key something_new"),
        ({"r": 4}, {}, r"\.lora_A\.weight has rank 3, but adapter_config.json says 4"),
        ({"rank_pattern": {".*(a|b)*": 4}}, {}, r"rank_pattern has '\.\*\(a\|b\)\*', and only names"),
        ({"alpha_pattern": {"q_proj": "x"}}, {}, "alpha_pattern: q_proj must be a finite number"),
        ({}, {f"{Q}.lora_B.weight": None}, r"the adapter lacks .*q_proj\.lora_B\.weight"),
        ({}, {f"{Q}.lora_magnitude_vector": zeros(64)}, "more than low-rank matrices: .*lora_magnitude_vector"),
        ({}, {f"{Q}.lora_B.weight": zeros(64, 5)}, r"shapes \[3, 64\] and \[64, 5\], no common rank"),
        (
            {},
            {f"{Q}.lora_B.weight": zeros(32, 3)},
            r"q_proj is \[64, 64\] .* \[32, 3\] and \[3, 64\] are for \[32, 64\]",
        ),
        (
            {},
            {f"{Q.replace('0', '7')}.lora_{x}.weight": zeros(*s) for x, s in {"A": (3, 64), "B": (64, 3)}.items()},
            r"changes model\.layers\.7\.self_attn\.q_proj, which is no matrix of this model",
        ),
        (
            {},
            {f"{EMBED}.lora_{x}.weight": zeros(*s) for x, s in {"A": (3, 64), "B": (96, 3)}.items()},
            r"embed_tokens \(the embedding\), which is not supported",
        ),
    ],
)
def test_what_is_wrong_is_named(
    config: dict[str, Any], tensors: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        changed(folder, tmp_path, config, tensors)
    assert str(tmp_path) in raised.value.message


def test_an_adapter_for_a_larger_model_is_refused_with_both_shapes(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"_proj is \[72, \d+\] in this model, but .* are for \[64, \d+\]"):
        open_adapter(folder, translated("smollm2")[0])


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("deepseek-v2", {"target_modules": ["kv_b_proj"]}, r"kv_b_proj \(k_up\), which is not supported"),
        (
            "qwen3-moe",
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
            r"changes model\.layers\.0\.mlp\.experts, .*\nhint: .* routed experts are never changed",
        ),
    ],
)
def test_what_adapters_cannot_change_is_named(name: str, targets: dict[str, Any], message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(deepcopy(oracle(name)), peft.LoraConfig(r=3, **targets))
        model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        open_adapter(tmp_path, translated(name)[0])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{Q}.lora_magnitude_vector": zeros(32)},
            r"q_proj\.lora_magnitude_vector is \[32\], but a row has one of 64",
        ),
        ({f"{Q}.lora_magnitude_vector": zeros(1, 64)}, r"magnitude_vector is \[1, 64\], but"),
        ({f"{Q}.lora_magnitude_vector": None}, r"the adapter lacks .*q_proj\.lora_magnitude_vector"),
        ({f"{EMBED}.lora_magnitude_vector": zeros(64)}, r"magnitudes without matrices: .*embed_tokens"),
    ],
)
def test_magnitudes_that_do_not_fit_are_named(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = written(make("llama-3.2", use_dora=True), tmp_path / "dora")
    changed(folder, tmp_path / "as it is", {}, {})
    with pytest.raises(ConfigError, match=message):
        changed(folder, tmp_path / "changed", {}, tensors)


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    data = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(data[:-4])
    with pytest.raises(FormatError):
        open_adapter(tmp_path, translated("llama-3.2")[0])
