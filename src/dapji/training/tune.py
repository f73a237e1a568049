"""`tune`: a recipe to a folder with what came of it: files, data, network, loop and output put together."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dapji.errors import ConfigError, UsageError
from dapji.model import Files, open_files
from dapji.models.config import weight_shapes
from dapji.models.torch_executor import find_device, load_weights
from dapji.training import output
from dapji.training.checkpoints import Checkpoints, whole_ones
from dapji.training.data.packing import fill
from dapji.training.data.stream import Stream
from dapji.training.methods import make_method, make_source
from dapji.training.metrics import Metrics
from dapji.training.network import Network, Stored
from dapji.training.run_data import RunData
from dapji.training.settings import Recipe, RunSettings, layer_matrices, write_recipe
from dapji.training.sharding import is_first, process_group, shard, together
from dapji.training.trainer import Report, Trainer, make_optimizer

RECIPE, METRICS, CHECKPOINTS, DATA = "recipe.toml", "metrics.jsonl", "checkpoints", "data"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a run is going to do, once its data is read."""

    steps: int
    done: int
    """Steps of a run that goes on."""
    parameters: int
    """Of the model."""
    trained: int
    """Parameters of the model, or of an adapter beside them."""
    samples: int
    invalid: int
    """Rows that were left out."""
    notes: Mapping[str, int]
    """What was done for how many examples (`encoding.Note`)."""
    fill: float
    """The share of the windows that holds tokens."""


def tune(
    recipe: Recipe,
    *,
    resume: bool = False,
    prepare: Callable[[int, int], None] = lambda done, total: None,
    plan: Callable[[Planned], None] = lambda planned: None,
    report: Report = lambda metrics: None,
) -> bool:
    """Run a recipe; whether it came to its end. Interrupted, it can go on with `resume`.

    On the first process, prepare: told how many windows of how many have been seen by the reference, where a method has
    one; plan: told before the first step; report: the metrics of every step.
    Raises UsageError where the folder holds another run, and what reading model and data raises.
    """
    with process_group(recipe.run.device) as device:
        folder = Path(recipe.output)
        if is_first():
            _claim(folder, recipe, resume)
        together()
        files = open_files(recipe.model)
        return _run(recipe, files, folder, find_device(device), resume, prepare, plan, report)


def _claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    if (folder / output.RECORD).exists():
        raise UsageError(f"{folder}: a finished run", hint="give another output, or remove it")
    path = folder / RECIPE
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: not an empty folder", hint="give a new one")
    if whole_ones(folder / CHECKPOINTS):
        if not resume:
            raise UsageError(f"{folder}: a run that has not ended", hint="--resume goes on with it; or remove it")
        if path.read_text(encoding="utf-8") != write_recipe(recipe):
            raise UsageError(f"{folder}: a run of another recipe", hint=f"compare with {path}")
    else:  # a run that never began to learn, if any
        shutil.rmtree(folder / DATA, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(write_recipe(recipe), encoding="utf-8")


def _run(
    recipe: Recipe,
    files: Files,
    folder: Path,
    device: torch.device,
    resume: bool,
    prepare: Callable[[int, int], None],
    plan: Callable[[Planned], None],
    report: Report,
) -> bool:
    if recipe.lora is None and recipe.run.dtype != "float32":
        raise ConfigError(
            f"run.dtype is {recipe.run.dtype!r}, but weights are trained in float32", hint="train an adapter ([lora])"
        )
    data = RunData.read(recipe, files, folder / DATA)
    network = Network(
        files.config,
        _weights(files, recipe.run.dtype, device),
        context=recipe.data.window,
        lora=recipe.lora,
        seed=recipe.seed,
        recompute=recipe.run.recompute,
    )
    n_trained = sum(parameter.numel() for parameter in network.trained().values())
    shard(network)
    optimizer = make_optimizer(network, recipe.optimizer)
    train, evaluate = (
        None
        if stream is None
        else make_source(
            recipe.method,
            stream,
            network,
            folder / DATA / f"{name}-reference.bin",
            prepare if is_first() else lambda done, total: None,
        )
        for name, stream in (("train", data.train), ("evaluate", data.evaluate))
    )
    assert train is not None
    with Metrics(folder / METRICS) as metrics:

        def both(values: Mapping[str, Any]) -> None:
            metrics.write(values)
            report(values)

        trainer = Trainer(
            network,
            make_method(recipe.method),
            train,
            windows=_windows(data.train, recipe.run),
            optimizer=recipe.optimizer,
            run=recipe.run,
            seed=recipe.seed,
            checkpoints=Checkpoints(folder / CHECKPOINTS, network, optimizer),
            torch_optimizer=optimizer,
            evaluation=None if evaluate is None or data.evaluate is None else (evaluate, len(data.evaluate.epoch(0))),
            report=both,
        )
        done = trainer.resume() if resume else 0
        if is_first():
            metrics.begin(done)
            epoch = [window.tolist() for window in data.train.epoch(0)]
            plan(
                Planned(
                    steps=trainer.steps,
                    done=done,
                    parameters=sum(math.prod(weight_shapes(files.config)[name]) for name in network.names),
                    trained=n_trained,
                    samples=len(data.samples),
                    invalid=data.record["invalid"],
                    notes=data.record["notes"],
                    fill=fill(epoch, data.samples.lengths, recipe.data.window),
                )
            )
        if not trainer.train():
            return False
    weights = output.gathered(network)
    if is_first():
        output.write(folder, recipe, files, weights, progress=trainer.progress, data=data.record["files"])
        shutil.rmtree(folder / DATA)
        shutil.rmtree(folder / CHECKPOINTS)
    together()
    return True


def _weights(files: Files, dtype: str, device: torch.device) -> dict[str, torch.Tensor | Stored]:
    stored = layer_matrices(files.config) if dtype == "stored" else []
    loaded = {name: files.tensors[name] for name in files.tensors.keys() - stored if not name.startswith("predictors.")}
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return {
        **load_weights(loaded, device=device, dtype=kept),
        **{name: Stored(files.tensors[name], device) for name in stored},
    }


def _windows(stream: Stream, run: RunSettings) -> int:
    if run.steps is not None:
        return run.steps * run.batch
    whole = int(run.epochs)
    windows = sum(len(stream.epoch(number)) for number in range(whole))
    if run.epochs > whole:
        windows += math.ceil((run.epochs - whole) * len(stream.epoch(whole)))
    return windows
