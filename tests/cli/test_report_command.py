"""`dapji report`: where it writes, and what it refuses. The page itself is in tests/training/test_report.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import Dapji


@pytest.fixture
def run(tmp_path: Path, tiny: Path, dapji: Dapji) -> Path:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1", "completion": " and 2"}\n')
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{tiny}"\noutput = "{tmp_path}/run"\n[data]\ntrain = ["{tmp_path}/train.jsonl"]\nwindow = 64'
    )
    assert dapji("tune", recipe).code == 0
    return tmp_path / "run"


def test_pages_of_one_run_and_of_two(run: Path, tmp_path: Path, dapji: Dapji, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "report.html").unlink()
    monkeypatch.setenv("LC_ALL", "ko_KR.UTF-8")
    done = dapji("report", run)
    assert (done.code, done.out) == (0, f"{run}/report.html\n")
    assert '<html lang="ko">' in (run / "report.html").read_text()
    done = dapji("report", run, run, "-o", tmp_path / "both.html", "--lang", "en")
    assert (done.code, done.out) == (0, f"{tmp_path}/both.html\n")
    assert "<h1 data-t" in (tmp_path / "both.html").read_text()


def test_mistakes(run: Path, tmp_path: Path, dapji: Dapji) -> None:
    assert dapji("report", run, run).code == 2
    assert dapji("report", tmp_path / "none").code == 2
    done = dapji("report", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert "no run that has begun" in done.err
    (tmp_path / "result.json").write_text("[]")
    done = dapji("report", run, "--evaluation", tmp_path / "result.json")
    assert done.code == 1
    assert "result.json: no result of an evaluation" in done.err
