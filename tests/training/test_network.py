"""Packed windows against sequences alone, against transformers, and gradients of a step however it is split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tiny_training as tiny
from dapji.errors import ConfigError
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.training.data.stream import Window
from dapji.training.network import Network, Stored
from dapji.training.settings import LoraSettings, layer_matrices
from dapji.training.supervised import Supervised, losses_of
from dapji.training.trainer import Method
from dapji.weights.quantize import quantize

LENGTHS = [17, 40, 5, 17, 2]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32: sums over a few hundred terms, in another order."""


def gradients(network: Network, windows: list, method: Method | None = None) -> dict[str, torch.Tensor]:
    method = method or Supervised()
    count = sum(method.count(window) for window in windows)
    for window in windows:
        (method.loss(network, window).loss / count).backward()
    found = {name: parameter.grad for name, parameter in network.trained().items()}
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("window", [None, 6])
def test_no_sequence_sees_another(window: int | None) -> None:
    """Another text in one sequence changes the losses of that one, and not one bit of the others'."""
    network = tiny.network(tiny.config(window=window))
    packed = tiny.window(LENGTHS)
    losses = losses_of(network, packed).detach()
    owners = packed.segments[packed.learned]
    for changed in range(len(LENGTHS)):
        tokens = packed.tokens.copy()
        mine = slice(packed.starts[changed], packed.starts[changed + 1])
        tokens[mine] = 3 + (tokens[mine] + 7) % 256
        other = losses_of(network, dataclasses.replace(packed, tokens=tokens)).detach()
        assert torch.equal(losses[owners != changed], other[owners != changed])
        assert not torch.isclose(losses[owners == changed], other[owners == changed]).any()


@pytest.mark.parametrize("window", [None, 6])
def test_packed_is_each_alone(window: int | None) -> None:
    network = tiny.network(tiny.config(window=window))
    packed = tiny.window(LENGTHS)
    apart = torch.cat([losses_of(network, each) for each in tiny.alone(packed)])
    torch.testing.assert_close(losses_of(network, packed), apart, **CLOSE)


def shared() -> Window:
    """Answers to one question, two of which begin alike, one of them twice; others with the same system message."""
    system, question = [1, 7, 7, 8], [20, 21, 22, 23, 24]
    answers = [[30, 31, 32], [30, 40], [30, 40], [50, 30, 31]]
    asked = [[*system, *question, *answer] for answer in answers]
    others = [[*system, 60, 61], [*system, 20, 70]]
    return tiny.packed(asked + others, [len(system + question)] * len(asked) + [len(system)] * len(others))


def test_prefixes_are_found() -> None:
    window = shared()
    first, places = window.prefixes
    np.testing.assert_array_equal(window.tokens[first][places], window.tokens)
    np.testing.assert_array_equal(window.positions[first][places], window.positions)
    # the system message, the question, 30 31 32, 40, 50 30 31, 60 61, 70 after the question's first token
    assert len(first) == 4 + 5 + 3 + 1 + 3 + 2 + 1
    before = [tuple(window.tokens[window.starts[window.segments[i]] : i + 1]) for i in range(len(places))]
    assert len(set(before)) == len(first)
    assert all((before[i] == before[j]) == (places[i] == places[j]) for i in range(len(places)) for j in range(i))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4), LoraSettings(rank=4, dora=True)])
def test_a_shared_prefix_is_computed_once(window: int | None, lora: LoraSettings | None) -> None:
    """With fewer rows in the layers, a multiple of 16, and the losses and gradients of each sequence alone."""
    network, packed = tiny.network(tiny.config(window=window), lora=lora), shared()
    rows = []
    network.get_submodule("layers.0").register_forward_hook(lambda module, given, x: rows.append(len(x)))
    together = losses_of(network, packed)
    assert (len(packed.tokens), len(packed.prefixes[0]), rows) == (58, 19, [32])
    torch.testing.assert_close(together, torch.cat([losses_of(network, each) for each in tiny.alone(packed)]), **CLOSE)
    same_gradients = gradients(network, tiny.alone(packed))
    for name, gradient in gradients(network, [packed]).items():
        torch.testing.assert_close(
            gradient, same_gradients[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_shared_prefix_gives_the_same_bits_again() -> None:
    network, packed = tiny.network(tiny.config()), shared()
    once, again = (gradients(network, [packed]) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4), LoraSettings(rank=4, dora=True)])
@pytest.mark.parametrize("tied_head", [True, False])
def test_gradients_of_a_step_do_not_depend_on_its_split(lora: LoraSettings | None, tied_head: bool) -> None:
    network = tiny.network(tiny.config(tied_head=tied_head), lora=lora)
    for name, parameter in network.trained().items():
        if name.endswith("_lora_b"):  # at the beginning 0, which would keep all gradients of a at 0
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    packed = tiny.window(LENGTHS)
    whole = gradients(network, [packed])
    apart = gradients(network, tiny.alone(packed))
    assert whole.keys() == apart.keys()
    for name in whole:
        scale = whole[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(apart[name] / scale, whole[name] / scale, **CLOSE, msg=name)


@pytest.mark.parametrize("dora", [False, True])
def test_recomputing_changes_no_bit(dora: bool) -> None:
    packed = tiny.window(LENGTHS)
    lora = LoraSettings(rank=4, dropout=0.3, dora=dora)
    found = []
    for recompute in (False, True):
        network = tiny.network(tiny.config(), lora=lora, recompute=recompute)
        torch.manual_seed(3)
        found.append(gradients(network, [packed]))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_targets_by_our_names_and_by_those_of_peft() -> None:
    config = tiny.config()
    assert LoraSettings(targets=["q_proj", "feed_forward.down"]).chosen(config) == [
        f"layers.{i}.{part}" for i in range(2) for part in ("attention.q", "feed_forward.down")
    ]
    assert len(LoraSettings().chosen(config)) == 14
    assert LoraSettings(targets=["layers.1.attention.v"]).chosen(config) == ["layers.1.attention.v"]
    with pytest.raises(ConfigError, match=r"'qkv' is no matrix of this model"):
        LoraSettings(targets=["q_proj", "qkv"]).chosen(config)


def test_dropout_is_for_training_alone() -> None:
    network = tiny.network(tiny.config(), lora=LoraSettings(rank=4, dropout=0.5))
    for name, parameter in network.trained().items():
        if name.endswith("_lora_b"):
            torch.nn.init.normal_(parameter)
    packed = tiny.window(LENGTHS)
    assert not torch.equal(losses_of(network, packed), losses_of(network, packed))
    network.eval()
    assert torch.equal(losses_of(network, packed), losses_of(network, packed))


@pytest.mark.parametrize(
    "lora",
    [
        LoraSettings(rank=4),
        LoraSettings(rank=4, targets=["attention.q"]),
        LoraSettings(rank=4, alpha=8, dora=True, targets=["q_proj", "v_proj", "down_proj"]),
    ],
)
def test_a_stored_base_gives_the_same_bits(lora: LoraSettings) -> None:
    """Dequantised for each product, or once."""
    config, packed = tiny.config(), tiny.window(LENGTHS)
    stored, loaded = {}, {}
    for name, values in tiny.weights(config).items():
        loaded[name] = torch.tensor(values)
        if name in layer_matrices(config) and values.shape[1] % 32 == 0:
            data = quantize(values, FORMATS["Q8_0"])
            tensor = Tensor(name=name, format=FORMATS["Q8_0"], shape=values.shape, source=data)
            stored[name], loaded[name] = Stored(tensor, torch.device("cpu")), torch.tensor(tensor.float32())
    assert len(stored) > 6
    found = [gradients(Network(config, {**loaded, **some}, context=64, lora=lora), [packed]) for some in (stored, {})]
    assert any(name.endswith("_lora_magnitude") for name in found[0]) == lora.dora
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name
