"""The loop against transformers, PEFT and torch's AdamW: the same losses for 20 steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model

import tiny_training as tiny
from dapji.errors import TrainingError
from dapji.models import families
from dapji.ops.tensor import Tensor
from dapji.training.checkpoints import Checkpoints
from dapji.training.data.stream import Window
from dapji.training.network import Network
from dapji.training.settings import LoraSettings, OptimizerSettings, RunSettings
from dapji.training.supervised import Supervised
from dapji.training.trainer import Trainer, make_optimizer

STEPS = 20
BATCH = 2
OPTIMIZER = OptimizerSettings(learning_rate=3e-3, weight_decay=0.1, warmup=0.2, clip=0.5)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32: 20 steps of AdamW, which divides by the size of gradients, on losses of about 5."""


class Windows:
    """The same few again and again."""

    def take(self, indices: Sequence[int]) -> list[Window]:
        return [tiny.window([30, 12, 21], seed=index % 5) for index in indices]


def run(network: Network, folder: Path, source: Any = None, **settings: Any) -> list[dict[str, Any]]:
    reported: list[dict[str, Any]] = []
    optimizer = make_optimizer(network, OPTIMIZER)
    trainer = Trainer(
        network,
        Supervised(),
        source or Windows(),
        windows=STEPS * BATCH - 1,  # the last step has one less
        optimizer=OPTIMIZER,
        run=RunSettings(batch=BATCH, **settings),
        seed=0,
        checkpoints=Checkpoints(folder, network, optimizer),
        torch_optimizer=optimizer,
        report=lambda values: reported.append(dict(values)),
    )
    assert trainer.train()
    return reported


def oracle(seed: int = 0) -> transformers.PreTrainedModel:
    weights = tiny.weights(tiny.config(), seed)
    config_json, tensors = families.to_hf(
        tiny.config(), {name: Tensor.from_float32(name, value) for name, value in weights.items()}
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_json))
    state = {name: torch.tensor(tensor.float32()) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


def oracle_losses(model: torch.nn.Module) -> list[float]:
    """As HF's examples train, one sequence after another, the sum over all learned tokens of a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=OPTIMIZER.learning_rate)
    losses = []
    for step in range(STEPS):
        numbers = range(step * BATCH, min((step + 1) * BATCH, STEPS * BATCH - 1))
        windows = [each for window in Windows().take(numbers) for each in tiny.alone(window)]
        count = sum(int(window.learned.sum()) for window in windows)
        total = 0.0
        for window in windows:
            tokens = torch.tensor(window.tokens[None].astype("int64"))
            labels = tokens.masked_fill(~torch.tensor(window.learned[None]), -100)
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip)
        for group in adamw.param_groups:
            group["lr"] = OPTIMIZER.rate(step, STEPS)
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses


def test_full_training_is_that_of_transformers(tmp_path: Path) -> None:
    got = [values["loss"] for values in run(tiny.network(tiny.config()), tmp_path)]
    want = oracle_losses(oracle())
    torch.testing.assert_close(got, want, **CLOSE)
    assert got[-1] < got[0] - 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_learns_as_in_peft(tmp_path: Path, rslora: bool) -> None:
    """From the same beginning."""
    lora = LoraSettings(rank=4, alpha=8, rslora=rslora, targets=["q_proj", "v_proj", "down_proj"])
    network = tiny.network(tiny.config(), lora=lora)
    model = get_peft_model(
        oracle(),
        LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    names = {"q_proj": "attention.q", "v_proj": "attention.v", "down_proj": "feed_forward.down"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                index, module = name.split(".layers.")[1].split(".")[0], name.split(".lora_A")[0].rpartition(".")[2]
                parameter.copy_(network.get_parameter(f"layers.{index}.{names[module]}_lora_a"))
    got = [values["loss"] for values in run(network, tmp_path)]
    torch.testing.assert_close(got, oracle_losses(model), **CLOSE)
    assert got[-1] < got[0] - 0.01


def test_the_same_run_gives_the_same_bits(tmp_path: Path) -> None:
    lora = LoraSettings(rank=4, dropout=0.2)
    first, second = (run(tiny.network(tiny.config(), lora=lora), tmp_path / str(i)) for i in range(2))
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "gradient_norm", "learning_rate", "trained_tokens"):
            assert a[key] == b[key]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates(schedule: str) -> None:
    """Against transformers' schedules from their second step on: their first has the rate 0."""
    settings = OptimizerSettings(learning_rate=1.0, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
    rates = [settings.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, 10, 100)
    want = []
    for _ in range(100):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates[10:] == pytest.approx(want[10:])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    network = tiny.network(tiny.config())
    with torch.no_grad():
        network.get_parameter("layers.0.attention.q")[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan"):
        run(network, tmp_path)
