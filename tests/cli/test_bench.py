"""`dapji bench`: what it prints of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import Dapji

from dapji.evaluation.machine import Limits
from dapji.evaluation.speed import Work
from dapji.files import open_files

SMALL = ["--prompt", "20", "--decode", "4", "--repeats", "3", "--executor", "reference"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GB/s and 200 Gop/s, without the second that measuring takes."""
    limits = Limits(read_bandwidth=1e10, int8_peak=2e11)
    monkeypatch.setattr("dapji.evaluation.speed.measure_limits", lambda threads: limits)


def test_json(tiny: Path, dapji: Dapji) -> None:
    code, out, err = dapji("bench", tiny, *SMALL, "--depth", "10", "--json", "--kv", "q8")
    assert (code, err) == (0, "")
    result = json.loads(out)
    files = open_files(tiny)
    work = Work.of(files.config, files.tensors, "q8")
    assert result["executor"] == "reference"
    assert result["machine"] == {"read_bandwidth": 1e10, "int8_peak": 2e11}
    decode, prompt = result["decode"], result["prompt"]
    assert (decode["tokens"], decode["depth"], prompt["tokens"]) == (4, 10, 20)
    for part in (decode, prompt):
        assert len(part["runs"]) == 3
        assert sorted(part["runs"])[1] == part["median"]
    assert decode["bytes_per_token"] == work.weight_bytes + work.cache_bytes * 12.5
    assert decode["limit"] == pytest.approx(1e10 / decode["bytes_per_token"])
    assert prompt["limit"] == pytest.approx(2e11 / prompt["operations_per_token"])


def test_table(tiny: Path, dapji: Dapji) -> None:
    code, out, _ = dapji("bench", tiny, *SMALL)
    assert code == 0
    about, machine, _, prompt, decode = out.splitlines()
    assert about.startswith("tiny.gguf: ")
    assert "reference" in about
    assert machine == "this machine: 10.0 GB/s read, 200 Gop/s in 8-bit dot products"
    for line, name in ((prompt, "prompt 20"), (decode, "decode 4")):
        assert line.startswith(name)
        median, slowest, fastest, limit = map(float, line.removeprefix(name).split()[:4])
        assert slowest <= median <= fastest
        assert line.split()[6] == f"{median / limit:.0%}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "5000"], 1, "a context of 5001 tokens was asked for, but the model has 4096"),
        (["--executor", "torch", "--device", "cuda"], 2, "--device must be cpu, got cuda"),
        (["--repeats", "0"], 2, "0 is not in the range x>=1"),
    ],
)
def test_mistakes(arguments: list[str], code: int, message: str, tiny: Path, dapji: Dapji) -> None:
    result = dapji("bench", tiny, *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_an_installed_model_is_wanted(dapji: Dapji) -> None:
    result = dapji("bench")
    assert result.code == 1
    assert "hint: dapji pull qwen2.5-coder-0.5b" in result.err
