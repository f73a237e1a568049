"""The methods of recipes: what a table [method] becomes, and the windows that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dapji.engine import BaseEngine
from dapji.files import Files, open_files
from dapji.model import load
from dapji.models.executor import ExecutorKind, default_kind
from dapji.training.actor import Actor
from dapji.training.data.packing import fill
from dapji.training.data.stream import Stream
from dapji.training.distillation import Distillation
from dapji.training.network import Network
from dapji.training.output import gathered
from dapji.training.policy import Policy
from dapji.training.preference import Dpo, Kto, Orpo, Simpo
from dapji.training.reference import RatedSource, ReferencedSource, reference_log_probs
from dapji.training.rewards import Reward
from dapji.training.rollouts import EvaluationSource, Judge, RolloutSource, Writing, judge_by_reward, judge_by_teacher
from dapji.training.run_data import RunData, RunPrompts
from dapji.training.settings import (
    DistillSettings,
    DpoSettings,
    GrpoSettings,
    KtoSettings,
    MethodSettings,
    OnPolicySettings,
    OrpoSettings,
    Recipe,
    RolloutSettings,
    RunSettings,
    SimpoSettings,
)
from dapji.training.supervised import Supervised
from dapji.training.teacher import Opinions, TaughtSource, check_alike
from dapji.training.trainer import Method, Source

DATA, ROLLOUTS = "data", "rollouts"
"""Folders of a run: what it has read, and what it has written to learn from."""
_TEACHER_CACHE = 1 << 30
"""Bytes of a teacher's keys and values."""


def make_method(settings: MethodSettings, token_bytes: NDArray[np.int64] | None = None) -> Method:
    """token_bytes: as `bits_per_byte` takes it."""
    match settings:
        case DpoSettings():
            return Dpo(settings)
        case KtoSettings():
            return Kto(settings)
        case OrpoSettings():
            return Orpo(settings)
        case SimpoSettings():
            return Simpo(settings)
        case GrpoSettings() | OnPolicySettings():
            return Policy(clip=settings.clip, kl=settings.kl)
        case DistillSettings():
            return Distillation(settings, token_bytes)
        case _:
            return Supervised(token_bytes)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a run learns from, as the loop takes it."""

    train: Source
    windows: int
    """That the run takes."""
    evaluation: tuple[Source, int] | None
    """What is held out, and how many windows that is."""
    examples: int
    """Of training."""
    fill: float | None
    """The share of the windows that holds tokens; None where they are not there yet."""


@contextmanager
def open_sources(
    recipe: Recipe,
    data: RunData | RunPrompts,
    files: Files,
    network: Network,
    folder: Path,
    device: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Sources]:
    """network: as it is before the first step. folder: of the run. All ranks call this. progress: as `tune`."""
    if isinstance(data, RunPrompts):
        with _actor(recipe, files, device) as actor, _judge(recipe, files, device) as judge:
            yield _rollout_sources(recipe, data, files, network, folder, actor, judge)
    elif isinstance(recipe.method, DistillSettings):
        opinions = _ask_teacher(recipe.method, data, files, folder / DATA, device, progress)
        yield _packed_sources(recipe, data, lambda stream, name: TaughtSource(stream, opinions[name]))
    else:
        yield _packed_sources(
            recipe,
            data,
            lambda stream, name: make_source(
                recipe.method, stream, network, folder / DATA / f"{name}-reference.bin", progress
            ),
        )


def make_source(
    settings: MethodSettings,
    stream: Stream,
    network: Network,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Source:
    """The windows of a stream with what the method needs beside them. path: of the file where the log-probabilities of
    a reference are kept."""
    match settings:
        case DpoSettings():
            return ReferencedSource(stream, reference_log_probs(network, stream, path, progress))
        case KtoSettings():
            return RatedSource(stream, reference_log_probs(network, stream, path, progress))
        case _:
            return stream


def _ask_teacher(
    settings: DistillSettings,
    data: RunData,
    files: Files,
    folder: Path,
    device: str,
    progress: Callable[[int, int], None],
) -> dict[str, Opinions]:
    """Of the samples of train and evaluate. The teacher is closed again."""
    streams = {"train": data.train, "evaluate": data.evaluate}
    opinions = {
        name: Opinions(folder / f"{name}-teacher.bin", stream.dataset, settings.k, vocab_size=files.config.vocab_size)
        for name, stream in streams.items()
        if stream is not None
    }
    if any(each.missing() for each in opinions.values()):
        context = max(int(stream.dataset.lengths.max()) for stream in streams.values() if stream is not None)
        with _teacher(settings.teacher, files, context, device) as teacher:
            for each in opinions.values():
                each.compute(teacher, progress)
    return opinions


def _packed_sources(recipe: Recipe, data: RunData, source: Callable[[Stream, str], Source]) -> Sources:
    """source: what the loop takes of a stream, whose name is train or evaluate."""
    held_out = data.evaluate
    epoch = [window.tolist() for window in data.train.epoch(0)]
    return Sources(
        train=source(data.train, "train"),
        windows=_windows(recipe.run, lambda number: len(data.train.epoch(number))),
        evaluation=None if held_out is None else (source(held_out, "evaluate"), len(held_out.epoch(0))),
        examples=len(data.samples),
        fill=fill(epoch, data.samples.lengths, recipe.data.window),
    )


def _rollout_sources(
    recipe: Recipe, data: RunPrompts, files: Files, network: Network, folder: Path, actor: Actor, judge: Judge
) -> Sources:
    settings, tokenizer = recipe.method, files.tokenizer()
    assert isinstance(settings, RolloutSettings)

    writing = Writing(
        actor=actor, judge=judge, tokenizer=tokenizer, settings=settings, weights=partial(gathered, network)
    )
    train = RolloutSource(
        data.train,
        writing,
        folder=folder / ROLLOUTS,
        batch=recipe.run.batch,
        capacity=recipe.data.window,
        seed=recipe.seed,
    )
    evaluate = EvaluationSource(data.evaluate, writing)
    turns = -(-_windows(recipe.run, lambda number: len(data.train)) // recipe.run.batch)
    return Sources(
        train=train,
        windows=turns * recipe.run.batch * (settings.reuse if recipe.run.steps is None else 1),
        evaluation=(evaluate, len(data.evaluate)) if data.evaluate else None,
        examples=len(data.train),
        fill=None,
    )


@contextmanager
def _judge(recipe: Recipe, files: Files, device: str) -> Iterator[Judge]:
    if isinstance(recipe.method, GrpoSettings):
        yield judge_by_reward(Reward(recipe.method.reward), scale=recipe.method.scale)
    else:
        assert isinstance(recipe.method, OnPolicySettings)
        with _teacher(recipe.method.teacher, files, recipe.data.window, device) as teacher:
            yield judge_by_teacher(teacher)


@contextmanager
def _teacher(name: str, files: Files, context: int, device: str) -> Iterator[BaseEngine]:
    """A model that has the student's tokens. Raises ConfigError where it has others."""
    check_alike(open_files(name).tokenizer(), files.tokenizer())
    kind: ExecutorKind = default_kind() if device == "cpu" else "torch"
    with load(name, executor=kind, device=device, context=context, kv_memory=_TEACHER_CACHE) as teacher:
        yield teacher.engine


@contextmanager
def _actor(recipe: Recipe, files: Files, device: str) -> Iterator[Actor]:
    actor = Actor(
        files.config,
        {name: tensor.without_blocks() for name, tensor in files.tensors.items() if not name.startswith("predictors.")},
        files.tokenizer(),
        lora=recipe.lora,
        context=recipe.data.window,
        device=device,
        dtype="bfloat16" if recipe.run.dtype == "bfloat16" else "float32",
    )
    try:
        yield actor
    finally:
        actor.close()


def _windows(run: RunSettings, epoch: Callable[[int], int]) -> int:
    """That a run takes. epoch: windows of one, by its number."""
    if run.steps is not None:
        return run.steps * run.batch
    whole = int(run.epochs)
    windows = sum(epoch(number) for number in range(whole))
    if run.epochs > whole:
        windows += math.ceil((run.epochs - whole) * epoch(whole))
    return windows
