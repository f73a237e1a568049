"""What the ranks of test_sharding run: a recipe, stopped after some steps as an interrupt would."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dapji.training import trainer
from dapji.training.settings import read_recipe
from dapji.training.tune import tune

torch.set_num_threads(1)
recipe, stop = read_recipe(Path(sys.argv[1])), int(sys.argv[2])
steps = 0


def interrupted(self: trainer.Trainer, values: object) -> bool:
    global steps
    steps += 1
    return steps == stop


if stop:
    trainer.Trainer._any = interrupted  # type: ignore[assignment, method-assign]
tune(recipe, resume=(Path(recipe.output) / "recipe.toml").exists())
