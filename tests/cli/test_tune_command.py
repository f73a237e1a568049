"""`dapji tune`: what it prints, where, and with which exit code. Runs themselves are in tests/training."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pexpect
import pytest
from in_process import Dapji


@pytest.fixture
def recipe(tmp_path: Path, tiny: Path) -> Path:
    rows = [{"prompt": f"{i}", "completion": f" and {i + 1}"} for i in range(8)]
    for name in ("train", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "{tiny}"\noutput = "{tmp_path}/out"\n[lora]\nrank = 2\n[run]\nsteps = 3\nbatch = 1\n'
        f'[data]\ntrain = ["{tmp_path}/train.jsonl"]\nevaluate = ["{tmp_path}/held-out.jsonl"]\nwindow = 64\n'
        "[profiles.tiny]\nrun = { steps = 1 }\n"
    )
    return path


def test_a_run_prints_its_folder(recipe: Path, tmp_path: Path, dapji: Dapji) -> None:
    done = dapji("tune", recipe)
    assert (done.code, done.out) == (0, f"{tmp_path}/out\n")
    first, page, before, after, summary, again = done.err.splitlines()
    assert first.startswith("8 examples, 3 steps, ")
    assert page == again == f"report     {tmp_path}/out/report.html"
    assert "Finished after 3 steps." in (tmp_path / "out" / "report.html").read_text()
    assert [line.split()[:2] for line in (before, after)] == [["step", "0"], ["step", "3"]]
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line["trained_tokens"] for line in metrics if "loss" in line)
    held_out = " -> ".join(f"{line['evaluation_loss']:.4f}" for line in metrics if "evaluation_loss" in line)
    assert summary.startswith(
        f"held-out loss {held_out}, loss {metrics[-2]['loss']:.4f}, {tokens} trained tokens in 00:0"
    )
    again = dapji("tune", recipe)
    assert again.code == 1
    assert "a finished run" in again.err


def test_metrics_as_json(recipe: Path, tmp_path: Path, dapji: Dapji) -> None:
    done = dapji("tune", recipe, "--json", "--profile", "tiny", "optimizer.learning_rate=1e-3")
    assert done.code == 0
    metrics = [json.loads(line) for line in done.out.splitlines()]
    assert [sorted(line) for line in metrics] == [
        ["evaluation_bits_per_byte", "evaluation_loss", "step"],
        ["bits_per_byte", "gradient_norm", "learning_rate", "loss", "memory", "seconds", "step", "trained_tokens"],
        ["evaluation_bits_per_byte", "evaluation_loss", "step"],
    ]
    assert metrics[1]["learning_rate"] == 1e-3
    assert done.out == (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["lora.rnak=3"], 1, "unknown field `rnak` - at `$.lora`"),
        (["rank"], 2, "'rank' is no KEY=VALUE"),
        (["--profile", "large"], 1, "no profile 'large'"),
        (["model=nothing-of-that-name"], 1, "nothing-of-that-name"),
    ],
)
def test_mistakes(recipe: Path, dapji: Dapji, options: list[str], code: int, message: str) -> None:
    done = dapji("tune", recipe, *options)
    assert done.code == code
    assert message in done.err
    assert done.out == ""


def test_a_bar_and_colour_on_a_terminal(recipe: Path) -> None:
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)
    terminal = pexpect.spawn(
        sys.executable, ["-m", "dapji", "tune", str(recipe)], env=environment, encoding="utf-8", timeout=60,
        dimensions=(24, 120),
    )  # fmt: skip
    terminal.expect("0/3")
    terminal.expect(r"\x1b\[32mstep +0  held-out loss")
    terminal.expect(r"\x1b\[32mstep +3  held-out loss")
    terminal.expect("/out\r\n")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
