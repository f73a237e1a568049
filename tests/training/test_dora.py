"""DoRA against PEFT: losses of whole runs, gradients, dropout; and folders that PEFT loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from test_network import gradients
from test_trainer import CLOSE, oracle, oracle_losses, run
from test_tune import RUN, base_in_transformers, held_out_loss, lines

import tiny_training as tiny
from dapji.training.network import Network
from dapji.training.settings import LoraSettings, read_recipe
from dapji.training.supervised import losses_of
from dapji.training.tune import tune

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it

NAMES = {"q_proj": "attention.q", "v_proj": "attention.v", "down_proj": "feed_forward.down"}
PARTS = {"lora_A": "_lora_a", "lora_B": "_lora_b", "lora_magnitude_vector": "_lora_magnitude"}
LORA = LoraSettings(rank=4, alpha=8, dora=True, targets=list(NAMES))


def ours(name: str) -> str:
    """Of one of PEFT's parameters, the name of the network's."""
    *_, index, _, module, part = name.removesuffix(".weight").removesuffix(".default").split(".")
    return f"layers.{index}.{NAMES[module]}{PARTS[part]}"


def peft_model(network: Network, dropout: float = 0.0) -> PeftModel:
    """With the network's values."""
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, lora_dropout=dropout, target_modules=list(NAMES))
    model = get_peft_model(oracle(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = network.get_parameter(ours(name))
                if "magnitude" in name:  # begins as in PEFT, whatever was made of it here
                    torch.testing.assert_close(value, parameter, rtol=0.5, atol=1)
                parameter.copy_(value)
    return model


def changed(lora: LoraSettings) -> Network:
    """As after some training: no B of zeros, no row with the base's length."""
    network = tiny.network(tiny.config(), lora=lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.trained().items():
        if not name.endswith("_lora_a"):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def test_runs_lose_as_in_peft(tmp_path: Path) -> None:
    """Magnitudes begin as the lengths of the base's rows."""
    network = tiny.network(tiny.config(), lora=LORA)
    model = get_peft_model(oracle(), LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=list(NAMES)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(network.get_parameter(ours(name)))
            elif parameter.requires_grad:
                torch.testing.assert_close(network.get_parameter(ours(name)), parameter)
    packed = tiny.window([9, 14])
    plain = losses_of(tiny.network(tiny.config()), packed)
    assert torch.equal(losses_of(network, packed), plain), "what has not learned yet is the base, bit for bit"
    got = [values["loss"] for values in run(network, tmp_path)]
    torch.testing.assert_close(got, oracle_losses(model), **CLOSE)
    assert got[-1] < got[0] - 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_peft(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout both drop the same: every fifth value of each row."""

    def drop(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return x * (torch.arange(x.shape[-1]) % 5 > 0) / (1 - p) if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    network = changed(LoraSettings(rank=4, alpha=8, dora=True, dropout=dropout, targets=list(NAMES)))
    model = peft_model(network, dropout)
    packed = tiny.window([17, 30, 9])
    got = gradients(network, [packed])
    count = int(packed.learned.sum())
    for each in tiny.alone(packed):
        tokens = torch.tensor(each.tokens[None].astype("int64"))
        labels = tokens.masked_fill(~torch.tensor(each.learned[None]), -100)
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
        (torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / count).backward()
    theirs = {ours(name): parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert theirs.keys() == got.keys()
    for name, want in theirs.items():
        scale = want.abs().max()
        assert scale > 0
        torch.testing.assert_close(got[name] / scale, want / scale, **CLOSE, msg=name)


def test_a_row_of_zeros_stays_one() -> None:
    """PEFT divides by its length, 0."""
    values = {name: torch.tensor(value) for name, value in tiny.weights(tiny.config()).items()}
    values["layers.0.attention.v"][3] = 0
    network = Network(tiny.config(), values, context=64, lora=LORA)
    for name, gradient in gradients(network, [tiny.window([17, 5])]).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("dtype", ["float32", "stored"])
def test_a_run_loads_in_peft(tmp_path: Path, dtype: str) -> None:
    """Its held-out loss there is the one that the run reported at its end."""
    table = "[lora]\nrank = 4\ndora = true\ndropout = 0.1"
    recipe = read_recipe(tiny.write_recipe(tmp_path, table, RUN), changes={"run.dtype": dtype})
    assert tune(recipe)
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    learned = tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_magnitude_vector"]
    begun = np.linalg.norm(tiny.weights(tiny.config())["layers.1.attention.k"], axis=1)
    assert 0.01 < np.abs(learned - begun).max() < 1
    model = PeftModel.from_pretrained(base_in_transformers(tmp_path), tmp_path / "run").eval()
    metrics = lines(tmp_path / "run")
    assert metrics[-1]["evaluation_loss"] < metrics[0]["evaluation_loss"] - 0.1
    assert held_out_loss(model, recipe, tmp_path) == pytest.approx(metrics[-1]["evaluation_loss"], rel=1e-5)
