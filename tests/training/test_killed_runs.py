"""Runs that are killed with SIGKILL, whatever they are about, and go on to the same files, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_rollouts import prompts, rewards
from test_tune import LORA, RUN, exact, lines

import tiny_training as tiny
from dapji.training.settings import read_recipe
from dapji.training.tune import tune


@dataclass(frozen=True)
class Killed:
    """A run, and when it is killed."""

    tables: str
    """Of its recipe; FOLDER is that of the test."""
    at: tuple[str | int, ...]
    """A step that is told, or a file of the run that is there."""
    method: str = ""

    def write(self, folder: Path, name: str) -> Path:
        """Its recipe, with the data that the method wants."""
        tables = self.tables.replace("FOLDER", str(folder))
        path = tiny.write_recipe(folder, f'[method]\nname = "{self.method or "supervised"}"', tables, name=name)
        for file, n in (("train.jsonl", 24), ("held-out.jsonl", 8)):
            if self.method == "dpo":
                tiny.write_pairs(folder / file, n)
            elif self.method == "kto":
                tiny.write_rated(folder / file, n)
            elif self.method in ("grpo", "on-policy"):
                prompts(folder / file, n // 4)
        return path


ROLLOUTS = "max_tokens = 8\nreuse = 2\nkl = 0.05"
TEACHER = 'teacher = "FOLDER/teacher.gguf"'
SHORT = RUN.replace("epochs = 4", "steps = 6")
CASES = {
    "lora": Killed(f"{LORA}\n{RUN}", (4,)),
    "dora": Killed(f"{LORA}\ndora = true\n{RUN}", (2, 5)),
    "full": Killed(RUN, (1, 4, 7)),
    "dpo": Killed(f"{LORA}\n{SHORT}", ("data/train-reference.bin", 1, 4), "dpo"),
    "kto": Killed(SHORT, ("data/train-reference.bin", 3), "kto"),
    "grpo": Killed(
        f'reward = "FOLDER/rewards.py:letters"\ngroup = 4\n{ROLLOUTS}\n{LORA}\n{SHORT}',
        ("rollouts/step-00000001.jsonl", 1, "rollouts/step-00000005.jsonl"),
        "grpo",
    ),
    "distill": Killed(f"{TEACHER}\nk = 8\n{SHORT}", ("data/train-teacher.bin", 2), "distill"),
    "on-policy": Killed(f"{TEACHER}\n{ROLLOUTS}\n{SHORT}", (1, "rollouts/step-00000003.jsonl"), "on-policy"),
}


def start(recipe: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dapji", "tune", str(recipe), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(at: str | int, run: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    metrics, step = run / "metrics.jsonl", f'"step": {at}, "loss"'
    while not (
        (run / at).exists() if isinstance(at, str) else metrics.exists() and step in metrics.read_text(encoding="utf-8")
    ):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=pytest.mark.slow if name != "lora" else ()) for name, case in CASES.items()],
)
def test_killed_and_resumed_is_uninterrupted(case: Killed, tmp_path: Path) -> None:
    rewards(tmp_path)
    tiny.write_model(tmp_path / "teacher.gguf", seed=1)
    recipe = case.write(tmp_path, "run")
    process = start(recipe)
    for at in case.at:
        wait_for(at, tmp_path / "run", process)
        process.kill()
        process.communicate()
        process = start(recipe, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert b"goes on after step" in errors
    assert tune(read_recipe(case.write(tmp_path, "whole")))
    assert len(exact(lines(tmp_path / "run"))) > 6
    assert exact(lines(tmp_path / "run")) == exact(lines(tmp_path / "whole"))
    kept = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("rollouts/*")]
    assert bool(kept) == (case.method in ("grpo", "on-policy"))
    for path in (*kept, *(path.name for path in (tmp_path / "whole").glob("*.safetensors"))):
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "run" / path).read_bytes()
