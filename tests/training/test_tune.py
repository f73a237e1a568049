"""Whole runs from recipes: what is in the folder loads elsewhere and answers alike; a folder is of one run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import tiny_training as tiny
from dapji.errors import ConfigError, ModelNotFound, UsageError
from dapji.files import open_files
from dapji.models.torch_executor import load_weights, sequence_logits
from dapji.ops.torch import TorchTables
from dapji.proof.lineage import read_lineage
from dapji.training.run_data import RunData
from dapji.training.settings import Recipe, read_recipe, write_recipe
from dapji.training.tune import Planned, tune
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_folder

ROOT = Path(__file__).parents[2]
LORA = "[lora]\nrank = 4\ndropout = 0.1"
RUN = "[optimizer]\nlearning_rate = 1e-2\n[run]\nepochs = 4\nbatch = 2\nsave_every = 1\nevaluate_every = 5"
TOKENS = torch.arange(3, 43)[None]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exact(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on the machine's load."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory")} for line in metrics]


def base_in_transformers(folder: Path) -> transformers.PreTrainedModel:
    whole = folder / "base-hf"
    write_folder(open_checkpoint(folder / "tiny.gguf"), whole, "F32")
    return transformers.AutoModelForCausalLM.from_pretrained(whole)


def held_out_loss(model: torch.nn.Module, recipe: Recipe, folder: Path) -> float:
    """Of a model of transformers, one example after another."""
    data = RunData.read(recipe, open_files(recipe.model), folder / "again")
    assert data.evaluate is not None
    loss, count = 0.0, 0
    for number in range(len(data.evaluate.epoch(0))):
        for each in tiny.alone(data.evaluate.window(number)):
            tokens = torch.tensor(each.tokens[None].astype("int64"))
            labels = tokens.masked_fill(~torch.tensor(each.learned[None]), -100)
            with torch.no_grad():
                logits = model(tokens).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
            count += int(each.learned.sum())
    return loss / count


def test_a_whole_model_loads_in_transformers(tmp_path: Path) -> None:
    recipe = read_recipe(tiny.write_recipe(tmp_path, RUN))
    assert tune(recipe)
    out = tmp_path / "run"
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "recipe.toml", "dapji.json"} <= names
    assert not names & {"data", "checkpoints", "whole"}
    files = open_files(str(out))
    weights = load_weights(files.tensors, device=torch.device("cpu"), dtype=torch.float32)
    ours = sequence_logits(files.config, weights, TOKENS, TorchTables(64, torch.device("cpu")))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # float32, two layers
    before, after = (line["evaluation_loss"] for line in (lines(out)[0], lines(out)[-1]))
    assert after < before - 0.5
    lineage = read_lineage(out)
    assert lineage is not None
    assert [(each.role, list(each.files)) for each in lineage.parents] == [("base", ["tiny.gguf"])]
    names = {each.use: each.file for each in lineage.data}
    assert names == {"train": str(tmp_path / "train.jsonl"), "evaluate": str(tmp_path / "held-out.jsonl")}
    assert lineage.settings["seed"] == 0
    assert lineage.outcome["steps"] == lines(out)[-1]["step"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_loads_in_peft(tmp_path: Path) -> None:
    """Its held-out loss there is the one that the run reported at its end."""
    recipe = read_recipe(tiny.write_recipe(tmp_path, "[lora]\nrank = 4\nrslora = true", RUN))
    assert tune(recipe)
    model = PeftModel.from_pretrained(base_in_transformers(tmp_path), tmp_path / "run").eval()
    assert set(model.peft_config["default"].target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    metrics = lines(tmp_path / "run")
    assert metrics[-1]["evaluation_loss"] < metrics[0]["evaluation_loss"] - 0.1
    assert held_out_loss(model, recipe, tmp_path) == pytest.approx(metrics[-1]["evaluation_loss"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "stored"])
def test_an_adapter_learns_on_a_smaller_base(tmp_path: Path, dtype: str) -> None:
    """As on float32, whose weights are those of the file."""
    table = "[lora]\nrank = 4"
    losses = []
    for name in ("float32", dtype):
        recipe = read_recipe(tiny.write_recipe(tmp_path, table, RUN, name=name), changes={"run.dtype": name})
        assert tune(recipe)
        losses.append([line["loss"] for line in lines(tmp_path / name) if "loss" in line])
    # bfloat16 has 8 bits, of activations in two layers too; what is stored in float32 is the same bits
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if dtype == "bfloat16" else 0)


def test_all_weights_want_float32(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.dtype is 'bfloat16', but weights are trained in float32"):
        tune(read_recipe(tiny.write_recipe(tmp_path, RUN), changes={"run.dtype": "bfloat16"}))


def interrupt_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    """As Ctrl-C while that step runs."""

    def interrupt(metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return interrupt


def test_an_interrupt_keeps_the_step_and_ends(tmp_path: Path) -> None:
    recipe = read_recipe(tiny.write_recipe(tmp_path, RUN), changes={"run.save_every": "1000"})
    assert not tune(recipe, report=interrupt_at(2))
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    planned: list[Planned] = []
    assert tune(recipe, resume=True, plan=planned.append)
    assert planned[0].done == 2
    steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, planned[0].steps + 1))


def test_a_folder_is_of_one_run(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path, "[run]\nsteps = 2\nbatch = 1")
    recipe = read_recipe(path)
    with pytest.raises(ModelNotFound):  # which leaves nothing that is in the way
        tune(read_recipe(path, changes={"model": "no-such-model"}))
    interrupt = interrupt_at(1)

    def second(metrics: Mapping[str, Any]) -> None:
        with pytest.raises(UsageError, match="another process"):
            tune(recipe, resume=True)
        interrupt(metrics)

    assert not tune(recipe, report=second)
    with pytest.raises(UsageError, match="has not ended"):
        tune(recipe)
    with pytest.raises(UsageError, match="another recipe"):
        tune(read_recipe(path, changes={"seed": "1"}), resume=True)
    assert tune(recipe, resume=True)
    with pytest.raises(UsageError, match="a finished run"):
        tune(recipe, resume=True)
    with pytest.raises(UsageError, match="not an empty folder"):
        tune(read_recipe(path, changes={"output": str(tmp_path)}))


def test_recipes_are_strict(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path, LORA, "[profiles.tiny.run]\nsteps = 2")
    recipe = read_recipe(path, profile="tiny", changes={"lora.rank": "32", "output": "elsewhere/run"})
    assert (recipe.run.steps, recipe.lora and recipe.lora.rank, recipe.output) == (2, 32, "elsewhere/run")
    again = tmp_path / "again.toml"
    again.write_text(write_recipe(recipe))
    assert read_recipe(again) == recipe
    for changes, message in (
        ({"lora.rnak": "3"}, r"unknown field `rnak` - at `\$.lora`"),
        ({"lora.rank": "0"}, r"Expected `int` >= 1 - at `\$.lora.rank`"),
        ({"method.name": "dop"}, r"Invalid value 'dop' - at `\$.method.name`"),
        ({"method.name": "dpo", "method.gamma": "1"}, r"unknown field `gamma` - at `\$.method`"),
        ({"method.name": "dpo", "method.beta": "0"}, r"Expected `float` > 0.0 - at `\$.method.beta`"),
        ({"optimizer": "adam"}, r"Expected `object`, got `str` - at `\$.optimizer`"),
    ):
        with pytest.raises(UsageError, match=message):
            read_recipe(path, changes=changes)
    with pytest.raises(UsageError, match="no profile 'large'"):
        read_recipe(path, profile="large")
    assert isinstance(recipe, Recipe)


RECIPES = sorted((ROOT / "runs").glob("*/*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=[f"{path.parent.name}-{path.stem}" for path in RECIPES])
def test_every_recipe_has_a_tiny_profile_that_runs(path: Path, tmp_path: Path) -> None:
    """On a tiny model; its own examples, where it has some."""
    changes = {"model": str(tiny.write_model(tmp_path / "tiny.gguf")), "output": str(tmp_path / "out")}
    if not (path.parent / "train.jsonl").exists():
        write = tiny.write_pairs if path.parent.name == "preference" else tiny.write_examples
        changes["data.train"] = changes["data.evaluate"] = json.dumps([str(write(tmp_path / "train.jsonl"))])
    if path.parent.name == "distillation":
        changes |= {"method.name": "distill", "method.teacher": changes["model"]}
    if path.parent.name != "arithmetic":  # whose prompts are short
        changes["data.truncate"] = "true"
    recipe = read_recipe(path, profile="tiny", changes=changes)
    assert tune(recipe)
    assert lines(tmp_path / "out")[-1]["step"] == 2
