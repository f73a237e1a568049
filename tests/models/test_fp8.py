"""Folders in 8-bit floats with scales of blocks, as DeepSeek V3 is published, against torch's own float8.

A tiny model of transformers is quantised as its weights are published and written by the safetensors package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, oracle, text
from transformers.integrations import finegrained_fp8

from dapji.errors import ConfigError, FormatError
from dapji.models import families
from dapji.models.executor import open_executor
from dapji.ops.batch import Batch
from dapji.ops.formats import F8_E4M3
from dapji.weights.checkpoint import open_checkpoint

BLOCK = 16
"""Divides some of the tiny model's sizes and not others."""
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def test_every_byte_is_the_value_that_torch_gives_it() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(F8_E4M3.dequantize(codes[None])[0], expected)
    assert np.isnan(expected).sum() == 2


def by_block(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and what they mean, by loops over blocks."""
    rows, cols = values.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    meant = torch.empty(rows, cols)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = values[block].abs().max() / 448
            codes[block] = (values[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[block] = codes[block].float() * scales[i, j]
    return codes, scales, meant


def test_blocks_mean_what_transformers_takes_them_for() -> None:
    """With whole and with partial blocks at both ends."""
    for shape in ((32, 48), (40, 20), (7, 50)):
        codes, scales, meant = by_block(torch.randn(shape))
        theirs = finegrained_fp8._dequantize_fp8_weight(codes, scales, [BLOCK, BLOCK], torch.float32)
        torch.testing.assert_close(meant, theirs, rtol=0, atol=0)


QUANTISED = ("_proj.weight", "_proj_with_mqa.weight")
"""The matrices of layers; embedding, head, norms and routers are not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    oracle("deepseek-v3").save_pretrained(folder)
    written = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if name.endswith(QUANTISED):
            written[name], written[f"{name}_scale_inv"], _ = by_block(values)
        else:
            written[name] = values
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    return folder


def test_values_are_codes_times_scales(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.formats.keys() == {"F32", "F8_E4M3"}
    config, weights = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    _, named = families.to_hf(config, weights)
    oracle("deepseek-v3").save_pretrained(tmp_path)
    partial = 0
    for name, values in load_file(tmp_path / "model.safetensors").items():
        meant = by_block(values)[2] if name.endswith(QUANTISED) else values
        partial += any(size % BLOCK for size in meant.shape)
        np.testing.assert_array_equal(named[name].float32(), meant.numpy())
    assert partial > 50


def test_the_model_computes_what_transformers_computes_of_these_values(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    config, weights = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    got = open_executor("reference", config, weights, context=TEXT, kv="f32").step(Batch.single(text()))
    config_json, named = families.to_hf(config, weights)
    assert "quantization_config" not in config_json
    model = type(oracle("deepseek-v3"))(oracle("deepseek-v3").config).eval()
    with torch.no_grad():
        state = {name: torch.from_numpy(tensor.float32().copy()) for name, tensor in named.items()}
        experts = {name: state.pop(name) for name in list(state) if ".experts." in name}
        for i in range(1, 3):
            of = lambda part, i=i: torch.stack(  # noqa: E731
                [experts[f"model.layers.{i}.mlp.experts.{n}.{part}_proj.weight"] for n in range(16)]
            )
            state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([of("gate"), of("up")], dim=1)
            state[f"model.layers.{i}.mlp.experts.down_proj"] = of("down")
        model.load_state_dict(state)
        want = model(torch.tensor([text()]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], to: Path) -> Path:
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    if not config["quantization_config"]:
        del config["quantization_config"]
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_block_may_be_larger_than_any_matrix(folder: Path, tmp_path: Path) -> None:
    def one_scale_each(tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
        quantization["weight_block_size"] = [1 << 40, 1 << 40]
        tensors.update({name: torch.full((1, 1), 0.5) for name in tensors if name.endswith("_scale_inv")})

    checkpoint = open_checkpoint(changed(folder, one_scale_each, tmp_path))
    _, weights = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    codes = load_file(folder / "model.safetensors")[O].float()
    np.testing.assert_array_equal(weights["layers.0.attention.o"].float32(), (codes * 0.5).numpy())


O = "model.layers.0.self_attn.o_proj.weight"  # noqa: E741


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, q: q.update(quant_method="awq"), "quant_method 'awq' is not supported\nhint: .*fp8"),
        (lambda t, q: q.update(fmt="e5m2"), "quantization_config: fmt 'e5m2' is not supported"),
        (lambda t, q: q.update(activation_scheme="static"), "activation_scheme 'static' is not supported"),
        (lambda t, q: q.update(weight_block_size=None), "weight_block_size is missing"),
        (lambda t, q: q.update(weight_block_size=[0, 8]), r"must be two positive integers, not \[0, 8\]"),
        (lambda t, q: q.update(weight_block_size=[8]), r"must be two positive integers, not \[8\]"),
        (lambda t, q: q.update(group_size=8), "quantization_config: unknown key group_size"),
        (lambda t, q: q.clear(), "has the format F8_E4M3, but config.json has no quantization_config"),
        (lambda t, q: t.pop(f"{O}_scale_inv"), f"missing tensor: {O}_scale_inv, the scales of {O}"),
        (lambda t, q: t.pop(O), f"unexpected tensor: {O}_scale_inv, scales of {O}, which is missing"),
        (
            lambda t, q: t.update({f"{O}_scale_inv": torch.ones(4, 2)}),
            r"o_proj.weight_scale_inv has shape \[4, 2\], but .* \[64, 48\] has \[4, 3\] blocks of 16 x 16",
        ),
        (lambda t, q: t.update({O: torch.ones(64, 48)}), f"{O} has the format F32, but scales: {O}_scale_inv"),
        (
            lambda t, q: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn),
                                   "model.norm.weight_scale_inv": torch.ones(4)}),
            r"model.norm.weight has shape \[64\]; scales of blocks are supported for matrices",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(changed(folder, change, tmp_path))
    with pytest.raises(ConfigError, match=message):
        families.from_hf(checkpoint.metadata, checkpoint.tensors)


def test_other_small_floats_are_refused(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, lambda t, q: t.update({O: torch.ones(64, 48).to(torch.float8_e5m2)}), tmp_path)
    checkpoint = open_checkpoint(path)
    with pytest.raises(FormatError, match=r"o_proj.weight' has type F8_E5M2, which is not supported"):
        families.from_hf(checkpoint.metadata, checkpoint.tensors)
