"""Writers: other programs' logs of a run, for those who compare many: TensorBoard and Weights & Biases.

Imported when a recipe names them (`run.writers`); neither belongs to the installation. A run that goes on goes on in
the same log. Metrics are called train/NAME and evaluation/NAME.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import msgspec

from dapji.errors import UnavailableError, UsageError
from dapji.training.settings import Recipe


class Writer(Protocol):
    """A context manager."""

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Of a step, or of an evaluation, as a line of metrics.jsonl."""
        ...

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """As lines of samples.jsonl."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_writer(name: Literal["tensorboard", "wandb"], folder: Path, recipe: Recipe, step: int) -> Writer:
    """folder: of the run, under whose `name` the log is kept. step: how many steps are done of a run that goes on.

    Raises UnavailableError where the program is not installed, UsageError where it refuses."""
    if not step:  # what is there is of a run that never got so far as to be gone on with
        shutil.rmtree(folder / name, ignore_errors=True)
    return (_TensorBoard if name == "tensorboard" else _Wandb)(folder / name, recipe, step)


class _TensorBoard:
    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # what was written of later steps is hidden: they come again
        self._writer = writer(str(folder), purge_step=step + 1 if step else None)
        if not step:
            self._writer.add_text("recipe", _fenced(msgspec.json.format(msgspec.json.encode(recipe)).decode()), 0)

    def metrics(self, values: Mapping[str, Any]) -> None:
        for tag, value in _tagged(values).items():
            self._writer.add_scalar(tag, value, values["step"])
        self._writer.flush()

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in samples:
            text = "\n".join(_fenced(sample[key]) for key in ("prompt", "answer"))
            self._writer.add_text(f"samples/{sample['sample']}", text, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


class _Wandb:
    """Where it sends what it is told, and whether, its own settings say (WANDB_MODE, WANDB_PROJECT, wandb login)."""

    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        wandb = _module("wandb", "wandb")
        self._table = wandb.Table
        folder.mkdir(exist_ok=True)
        known = folder / "id"
        if not known.exists():
            known.write_text(secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dapji"),
                name=folder.parent.name,
                id=known.read_text(),
                resume="allow",
                dir=str(folder.parent),
                config=msgspec.to_builtins(recipe),
            )
        except wandb.Error as error:
            raise UsageError(
                f"Weights & Biases: {error}", hint="wandb login; or WANDB_MODE=offline, which sends nothing"
            ) from error

    def metrics(self, values: Mapping[str, Any]) -> None:
        # of steps that come again after a run was cut off, the first telling stays; they are the same
        self._run.log(_tagged(values), step=values["step"])

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        if samples:
            columns = ["prompt", "answer", "expected"]
            table = self._table(columns=columns, data=[[sample[name] for name in columns] for sample in samples])
            self._run.log({"samples": table}, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"run.writers has {package!r}, but {error.name or package} is not installed", hint=f"pip install {package}"
        ) from error


def _tagged(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"evaluation/{name.removeprefix('evaluation_')}" if name.startswith("evaluation_") else f"train/{name}": value
        for name, value in values.items()
        if name != "step"
    }


def _fenced(text: str) -> str:
    """As a block of code in Markdown, whatever it says."""
    return "\n".join(f"    {line}" for line in text.split("\n")) + "\n"
