"""Weights sharded over processes: the same losses as in one, and a run that goes on with another number of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tune import LORA, lines

import tiny_training as tiny
from dapji.training.settings import read_recipe
from dapji.training.tune import tune

KTO = '[method]\nname = "kto"'
RUN = "[optimizer]\nlearning_rate = 1e-2\n[run]\nepochs = 3\nbatch = 5"


def torchrun(ranks: int, recipe: Path, stop: int = 0) -> None:
    script = Path(__file__).with_name("sharded_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(script), str(recipe), str(stop)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("tables", "ranks"),
    [
        pytest.param(RUN, [2, 1], id="full on two, then alone"),
        pytest.param(RUN, [2, 3], id="full on two, then three", marks=pytest.mark.slow),
        pytest.param(f"{LORA}\n{RUN}", [2, 3], id="lora on two, then three", marks=pytest.mark.slow),
        pytest.param(f"{LORA}\ndora = true\n{RUN}", [2, 3], id="dora on two, then three", marks=pytest.mark.slow),
        pytest.param(f"{KTO}\n{RUN}", [2, 3], id="kto on two, then three", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_learns_what_one_does(tmp_path: Path, tables: str, ranks: list[int]) -> None:
    """Steps of five windows, so that one rank has one less. Stopped after three steps, and gone on with others."""
    recipe = tiny.write_recipe(tmp_path, tables, window=64)
    if "kto" in tables:
        for name in ("train", "held-out"):
            tiny.write_rated(tmp_path / f"{name}.jsonl", 30)
    torchrun(ranks[0], recipe, stop=3)
    assert not (tmp_path / "run" / "dapji.json").exists()
    if ranks[1] > 1:
        torchrun(ranks[1], recipe)
    else:
        assert tune(read_recipe(recipe), resume=True)
    assert tune(read_recipe(tiny.write_recipe(tmp_path, tables, name="alone", window=64)))
    sharded, alone = (lines(tmp_path / name) for name in ("run", "alone"))
    assert len(sharded) == len(alone) > 5
    for a, b in zip(sharded, alone, strict=True):
        assert a["step"] == b["step"]
        for key in a.keys() & {"loss", "evaluation_loss", "gradient_norm", "kl", "evaluation_kl", "desirable_reward"}:
            # float32 sums in another order, over a dozen steps of AdamW
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
        assert a.get("trained_tokens") == b.get("trained_tokens")
