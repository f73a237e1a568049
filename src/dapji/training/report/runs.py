"""`RunRecord`: what a run has left in its folder so far, read for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from dapji.errors import FormatError, UsageError
from dapji.proof.lineage import Lineage, read_lineage
from dapji.training.settings import Recipe, read_recipe
from dapji.weights.files import whole_lines

RECIPE, START, METRICS, SAMPLES = "recipe.toml", "run.json", "metrics.jsonl", "samples.jsonl"
"""Files of a run: all its settings; what is known before its first step; a line for each step and each evaluation; a
line for each answer of `samples`."""

State: TypeAlias = Literal["running", "stopped", "done"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    name: str
    """Of its folder and the one above."""
    recipe: Recipe
    changed: Mapping[str, Any]
    """Settings that differ from their defaults, by dotted key."""
    start: Mapping[str, Any]
    """`tune.Planned`, files, shown."""
    steps: Sequence[Mapping[str, Any]]
    """Metrics of each step, in order."""
    evaluations: Sequence[Mapping[str, Any]]
    """Metrics of what is held out, in order."""
    samples: Sequence[Mapping[str, Any]]
    lineage: Lineage | None
    """Once it has ended."""
    state: State

    @classmethod
    def read(cls, folder: Path, *, running: bool = False) -> RunRecord:
        """Raises UsageError where there is no run that has begun, FormatError where its files are broken."""
        if not (folder / START).exists() or not (folder / RECIPE).exists():
            raise UsageError(f"{folder}: no run that has begun", hint="give a folder that `dapji tune` writes")
        recipe = read_recipe(folder / RECIPE)
        metrics = _lines(folder / METRICS)
        lineage = read_lineage(folder)
        return cls(
            name="/".join(folder.resolve().parts[-2:]),
            recipe=recipe,
            changed=_changed(recipe),
            start=_json(folder / START),
            steps=[line for line in metrics if "loss" in line],
            evaluations=[line for line in metrics if "loss" not in line],
            samples=_lines(folder / SAMPLES),
            lineage=lineage,
            state="done" if lineage is not None else "running" if running else "stopped",
        )

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def held_out(self) -> tuple[float | None, float | None]:
        """The loss before training, and the last one after it, where they were measured."""
        losses = [(line["step"], line["evaluation_loss"]) for line in self.evaluations if "evaluation_loss" in line]
        before = next((loss for step, loss in losses if step == 0), None)
        return before, next((loss for step, loss in reversed(losses) if step > 0), None)

    @property
    def memory(self) -> int | None:
        """Bytes at most; None before the first step."""
        return max((line["memory"] for line in self.steps), default=None)

    @property
    def trained_tokens(self) -> int:
        return sum(line["trained_tokens"] for line in self.steps)

    @property
    def seconds(self) -> float:
        return float(sum(line["seconds"] for line in self.steps))


def _changed(settings: msgspec.Struct, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    config = type(settings).__struct_config__
    if config.tag is not None and config.tag != "supervised":
        found[f"{prefix}{config.tag_field}"] = config.tag
    for field in msgspec.structs.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if isinstance(value, msgspec.Struct):
            found |= _changed(value, f"{name}.")
        else:
            factory = field.default_factory
            default = field.default if factory is msgspec.NODEFAULT else factory()
            if value != default:
                found[name] = value
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: no JSON: {error}") from error
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in whole_lines(path).splitlines()]
    except ValueError as error:
        raise FormatError(f"{path}: no JSON: {error}") from error
