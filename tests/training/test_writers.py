"""Other programs' logs, read back by their own readers: the numbers of metrics.jsonl, also of a run that went on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_tune import interrupt_at, lines

import tiny_training as tiny
from dapji.errors import UnavailableError
from dapji.training.settings import read_recipe
from dapji.training.tune import tune

TABLES = '[run]\nsteps = 6\nbatch = 1\nevaluate_every = 3\nwriters = ["tensorboard"]\n[samples]\ncount = 1'


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = read_recipe(tiny.write_recipe(tmp_path, TABLES))
    assert not tune(recipe, report=interrupt_at(4))
    assert tune(recipe, resume=True)
    log = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={reader.TENSORS: 0}).Reload()
    metrics = lines(tmp_path / "run")
    for tag, name in (("train/loss", "loss"), ("train/memory", "memory"), ("evaluation/loss", "evaluation_loss")):
        written = [(event.step, event.value) for event in log.Scalars(tag)]
        # a log of TensorBoard holds float32
        assert written == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in metrics if name in line]
    assert [event.step for event in log.Tensors("samples/0/text_summary")] == [0, 3, 6]


def test_a_writer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = read_recipe(tiny.write_recipe(tmp_path, TABLES), changes={"run.writers": '["wandb"]'})
    with pytest.raises(UnavailableError, match=r"run\.writers has 'wandb', but wandb is not installed") as raised:
        tune(recipe)
    assert raised.value.hint == "pip install wandb"
