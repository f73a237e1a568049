"""`dapji doctor` on machines and installations that this one is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import Dapji

from dapji.errors import UnavailableError
from dapji.evaluation.machine import Machine
from dapji.ops import native

HEALTHY = Machine(
    system="Linux 6.1 x86_64",
    processor="Some CPU",
    features=("avx2", "avx512_vnni"),
    processors=4,
    memory=16_000_000_000,
    memory_available=8_000_000_000,
    huge_pages="madvise",
)


class Installation:
    """What the checks see, to be changed by a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.machine()
        self.kernels(available=lambda: True, unavailable_reason=lambda: None, isa=lambda: "avx512vnni")
        self.kernels(isas=lambda: ["generic", "avx2", "avx512vnni"], default_threads=lambda: 2)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        monkeypatch.delenv("DAPJI_ISA", raising=False)

    def machine(self, **changes: Any) -> None:
        machine = replace(HEALTHY, **changes)
        self.monkeypatch.setattr("dapji.evaluation.machine.describe_machine", lambda: machine)

    def kernels(self, **functions: Any) -> None:
        for name, function in functions.items():
            self.monkeypatch.setattr(native, name, function, raising=False)

    def no_kernels(self, *, built: bool) -> None:
        self.kernels(available=lambda: False, unavailable_reason=lambda: "because")
        self.monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if built else None)


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch) -> Installation:
    return Installation(monkeypatch)


def test_nothing_is_wrong(installation: Installation, dapji: Dapji, home: Path) -> None:
    code, out, err = dapji("doctor")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line and not line.startswith("No problems"))
    assert lines["kernels"] == "avx512vnni: the best that this processor runs (it runs generic, avx2, avx512vnni)"
    assert lines["processors"] == "4 logical processors for this process, 2 threads by default"
    assert lines["memory"] == "8.0 GB available of 16.0 GB"
    assert lines["store"].startswith(f"{home}, ")
    assert "smollm2-135m fits" in lines["models"]
    assert out.endswith("\nNo problems found.\n")
    assert not home.exists(), "looking changes nothing"


def problems(dapji: Dapji) -> tuple[int, list[dict[str, Any]]]:
    code, out, _ = dapji("doctor", "--json")
    report = json.loads(out)
    assert set(report) == {
        "version", "python", "machine", "native", "compiler", "optional", "store", "problems",
    }  # fmt: skip
    return code, report["problems"]


def test_json_has_no_problems_either(installation: Installation, dapji: Dapji) -> None:
    assert problems(dapji) == (0, [])


@pytest.mark.parametrize("compiler", [None, "/usr/bin/c++"])
def test_reference_alone_is_a_choice(
    compiler: str | None, installation: Installation, dapji: Dapji, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation.no_kernels(built=False)
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    code, (problem,) = problems(dapji)
    assert code == 0
    assert not problem["serious"]
    assert problem["what"].endswith("slow reference: because")
    assert ("install a C++17 compiler" in problem["remedy"]) is (compiler is None)
    assert "kernels          none; the numpy reference computes" in dapji("doctor").out


def test_kernels_that_do_not_load(installation: Installation, dapji: Dapji) -> None:
    installation.no_kernels(built=True)
    code, (problem,) = problems(dapji)
    assert (code, problem["serious"]) == (1, True)
    assert "do not load: because" in problem["what"]


def test_an_instruction_set_that_is_not_there(
    installation: Installation, dapji: Dapji, monkeypatch: pytest.MonkeyPatch
) -> None:
    def isa() -> str:
        raise UnavailableError("DAPJI_ISA is avx9")

    installation.kernels(isa=isa)
    monkeypatch.setenv("DAPJI_ISA", "avx9")
    code, (problem,) = problems(dapji)
    assert (code, problem["remedy"]) == (1, "unset DAPJI_ISA")
    assert "DAPJI_ISA is avx9" in problem["what"]


def test_a_forced_instruction_set(installation: Installation, dapji: Dapji, monkeypatch: pytest.MonkeyPatch) -> None:
    installation.kernels(isa=lambda: "avx2")
    monkeypatch.setenv("DAPJI_ISA", "avx2")
    shown = dapji("doctor")
    assert shown.code == 0
    assert "avx2: DAPJI_ISA=avx2 (it runs generic, avx2, avx512vnni)" in shown.out


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        ({"memory_available": 200_000_000}, 1, "200.0 MB of memory are available"),
        ({"huge_pages": "never"}, 0, "transparent huge pages are off"),
        ({"memory": None, "memory_available": None, "huge_pages": None, "features": None, "processor": None}, 0, None),
    ],
)
def test_machines(
    change: dict[str, Any], code: int, what: str | None, installation: Installation, dapji: Dapji
) -> None:
    installation.machine(**change)
    found, listed = problems(dapji)
    assert found == code == dapji("doctor").code
    assert [what in problem["what"] for problem in listed if what] == [True] * (what is not None)
    if what is None:
        assert listed == []


def test_a_store_that_cannot_be_written(
    installation: Installation, dapji: Dapji, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    code, (problem,) = problems(dapji)
    assert code == 1
    assert "cannot be written" in problem["what"]
    assert "DAPJI_HOME" in problem["remedy"]


def test_a_broken_model(installation: Installation, dapji: Dapji, home: Path) -> None:
    folder = home / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "dapji.json").write_text("{")
    code, (problem,) = problems(dapji)
    assert code == 1
    assert "mine/dapji.json" in problem["what"]
    shown = dapji("doctor")
    assert "problem: the store cannot be read" in shown.out


def test_this_machine(dapji: Dapji) -> None:
    """Whatever it is: a report, no crash."""
    code, out, _ = dapji("doctor", "--json")
    report = json.loads(out)
    assert code == int(any(problem["serious"] for problem in report["problems"]))
