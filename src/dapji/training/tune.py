"""`tune`: a recipe to a folder with what came of it: files, data, network, loop and output put together."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dapji.errors import ConfigError, UsageError
from dapji.files import Files, open_files
from dapji.models.config import weight_shapes
from dapji.models.torch_executor import find_device, load_weights
from dapji.proof.record import record_path
from dapji.training import output
from dapji.training.checkpoints import Checkpoints, whole_ones
from dapji.training.log import RunLog
from dapji.training.methods import DATA, ROLLOUTS, make_method, open_sources
from dapji.training.network import Network, Stored
from dapji.training.report import RECIPE
from dapji.training.run_data import read_data
from dapji.training.samples import Question, Sampler, own_questions
from dapji.training.settings import Recipe, layer_matrices, write_recipe
from dapji.training.sharding import is_first, process_group, shard, together
from dapji.training.supervised import bytes_of_tokens
from dapji.training.trainer import Report, Trainer, make_optimizer
from dapji.weights.sources_base import Progress as Bars
from dapji.weights.store_lock import try_lock

CHECKPOINTS = "checkpoints"


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
    fill: float | None
    """The share of the windows that holds tokens; None where they are not there yet."""


def tune(
    recipe: Recipe,
    *,
    resume: bool = False,
    prepare: Callable[[int, int], None] = lambda done, total: None,
    plan: Callable[[Planned], None] = lambda planned: None,
    report: Report = lambda metrics: None,
    bars: Bars | None = None,
) -> bool:
    """Run a recipe; whether it came to its end. Interrupted, it can go on with `resume`.

    On the first process, prepare: told how much of what has been computed, where a method has something to compute of
    all examples before the first step; plan: told before the first step; report: the metrics of every step; bars:
    of what takes its time after the last.
    Raises UsageError where the folder holds another run, and what reading model and data raises.
    """
    folder = Path(recipe.output)
    with (
        process_group(recipe.run.device) as device,
        _claimed(folder, recipe, resume) if is_first() else nullcontext(),
    ):
        together()
        files = open_files(recipe.model)
        return _run(recipe, files, folder, find_device(device), resume, prepare, plan, report, bars)


@contextmanager
def _claimed(folder: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """The folder's recipe is locked meanwhile: nobody else may run it."""
    if record_path(folder).exists():
        raise UsageError(f"{folder}: a finished run", hint="give another output, or remove it")
    path = folder / RECIPE
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: not an empty folder", hint="give a new one")
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(path)
    if lock is None:
        raise UsageError(f"{folder}: another process runs it now", hint="wait for it, or give another output")
    try:
        _begin(folder, recipe, resume)
        yield
    finally:
        os.close(lock)


def _begin(folder: Path, recipe: Recipe, resume: bool) -> None:
    path = folder / RECIPE
    if whole_ones(folder / CHECKPOINTS):
        if not resume:
            raise UsageError(f"{folder}: a run that has not ended", hint="--resume goes on with it; or remove it")
        if path.read_text(encoding="utf-8") != write_recipe(recipe):
            raise UsageError(f"{folder}: a run of another recipe", hint=f"compare with {path}")
    elif not (resume and path.exists() and path.read_text(encoding="utf-8") == write_recipe(recipe)):
        # a run that never began to learn, if any; one that goes on keeps what it has read and computed
        for name in (DATA, ROLLOUTS):
            shutil.rmtree(folder / name, ignore_errors=True)
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
    bars: Bars | None,
) -> bool:
    if recipe.lora is None and recipe.run.dtype != "float32":
        raise ConfigError(
            f"run.dtype is {recipe.run.dtype!r}, but weights are trained in float32", hint="train an adapter ([lora])"
        )
    tokenizer = files.tokenizer()
    questions = own_questions(recipe.samples, tokenizer, files.config)
    data = read_data(recipe, files, folder / DATA)
    questions += [Question(**question) for question in data.record["questions"]]
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
    with (
        RunLog(folder, recipe) as log,
        open_sources(
            recipe, data, files, network, folder, str(device), prepare if is_first() else lambda done, total: None
        ) as sources,
    ):

        def both(values: Mapping[str, Any]) -> None:
            log.metrics(values)
            report(values)

        def watch(step: int) -> None:
            answers = sampler.answers()
            if is_first():
                log.samples(step, answers)
                log.write_page(running=True)

        sampler = Sampler(
            questions,
            recipe=recipe,
            files=files,
            tokenizer=tokenizer,
            device=str(device),
            weights=partial(output.gathered, network),
        )

        trainer = Trainer(
            network,
            make_method(recipe.method, bytes_of_tokens(tokenizer, files.config.vocab_size)),
            sources.train,
            windows=sources.windows,
            optimizer=recipe.optimizer,
            run=recipe.run,
            seed=recipe.seed,
            checkpoints=Checkpoints(folder / CHECKPOINTS, network, optimizer),
            torch_optimizer=optimizer,
            evaluation=sources.evaluation,
            report=both,
            watch=watch,
        )
        done = trainer.resume() if resume else 0
        if is_first():
            planned = Planned(
                steps=trainer.steps,
                done=done,
                parameters=sum(math.prod(weight_shapes(files.config)[name]) for name in network.names),
                trained=n_trained,
                samples=sources.examples,
                invalid=data.record["invalid"],
                notes=data.record["notes"],
                fill=sources.fill,
            )
            log.begin({**asdict(planned), "files": data.record["files"], "shown": data.record["shown"]}, done)
            plan(planned)
        if not trainer.train():
            return False
    weights = output.gathered(network)
    if is_first():
        output.write(folder, recipe, files, weights, progress=trainer.progress, data=data.record["files"], bars=bars)
        shutil.rmtree(folder / DATA)
        shutil.rmtree(folder / CHECKPOINTS)
        log.write_page(running=False)
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
