"""Facts of a machine, read from files that other machines have."""

from __future__ import annotations

import os
import sys

import pytest

from dapji.evaluation import machine as module
from dapji.evaluation.machine import describe_machine, measure_limits
from dapji.ops import native

LAPTOP = {
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni fma\n\n"
    "processor\t: 1\nmodel name\t: Other CPU\nflags\t\t: fpu\n",
    "/proc/meminfo": "MemTotal:       8000000 kB\nMemFree:  100 kB\nMemAvailable:   5000000 kB\n",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
}


def on(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> module.Machine:
    monkeypatch.setattr(module, "_read", lambda path: files.get(path, ""))
    return describe_machine()


def test_a_linux_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = on(LAPTOP, monkeypatch)
    assert machine.processor == "Some CPU"
    assert machine.features == ("avx2", "fma", "avx512_vnni")
    assert (machine.memory, machine.memory_available) == (8_192_000_000, 5_120_000_000)
    assert machine.huge_pages == "madvise"


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        ("max\n", "1", (8_192_000_000, 5_120_000_000)),
        ("3000000000\n", "1000000000\n", (3_000_000_000, 2_000_000_000)),
        ("3000000000\n", "4000000000\n", (3_000_000_000, 0)),
        ("7000000000\n", "0", (7_000_000_000, 5_120_000_000)),
    ],
)
def test_a_container(limit: str, used: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}
    machine = on(LAPTOP | group, monkeypatch)
    assert (machine.memory, machine.memory_available) == expected


def test_arm_and_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on({"/proc/cpuinfo": "Features\t: fp asimd asimddp i8mm\n"}, monkeypatch).features == ("asimddp", "i8mm")
    bare = on({}, monkeypatch)
    assert bare.features is bare.huge_pages is None


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_processors_are_those_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert describe_machine().processors == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_limits_are_plausible(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a slow phone and the fastest server: a unit confused would be off by a thousand."""
    if compiled and not native.available():
        pytest.skip("no native kernels here")
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    limits = measure_limits(1)
    assert 1e8 < limits.read_bandwidth < 1e12
    if compiled:
        assert limits.int8_peak is not None
        assert 1e9 < limits.int8_peak < 1e13
    else:
        assert limits.int8_peak is None
