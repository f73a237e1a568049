"""The C++ core without Python: kernels_test.cpp compares every instruction set's kernels with plain C++, bit for bit.

It runs on this machine, and on emulated ARM processors; setup-arm.sh installs what those need.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dapji.ops import native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "src" / "native"
BUILD = ROOT / "build"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {CROSS_COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
"""Debian's and Ubuntu's packages, by command."""


class Output(NamedTuple):
    isas: list[str]
    hashes: dict[str, str]
    """Of the results of each case, but of those that libm, of which there are many, had a part in."""


def compile_program(compiler: str, library: Path, program: Path, *options: str) -> None:
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *options, f"-I{SOURCES}"]
    command += [str(HERE / "kernels_test.cpp"), str(library), "-pthread", "-o", str(program)]
    subprocess.run(command, check=True)


def run_program(*command: str | Path) -> Output:
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    isas, *cases = done.stdout.splitlines()
    hashes = dict(reversed(case.split(" ", 1)) for case in cases)
    assert len(hashes) > 25
    return Output(isas.split(), {name: value for name, value in hashes.items() if "libm" not in name})


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """On this machine, with the library that this Python's extension was made of."""
    library = next(BUILD.glob(f"cp{sys.version_info.major}{sys.version_info.minor}-*/src/native/libcore.a"), None)
    shared = [path for path in SOURCES.glob("*.h") if not path.name.startswith("simd_")]  # by it and the program
    if library is None or library.stat().st_mtime < max(path.stat().st_mtime for path in shared):
        pytest.fail(f"the native core's library ({library}) is missing or older than its headers: run `make native`")
    program = tmp_path_factory.mktemp("native") / "kernels_test"
    compile_program(os.environ.get("CXX", "c++"), library, program)
    return run_program(program)


def test_every_instruction_set_gives_the_same_bits(here: Output) -> None:
    assert here.isas == native.isas()


@pytest.mark.slow
@pytest.mark.timeout(900)  # compiles for some two minutes, the first time
@pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="the test above runs them without an emulator")
def test_arm_gives_the_same_bits(here: Output, tmp_path: Path) -> None:
    """Compiled as for users, for ARM; a processor without dot products runs the plain code."""
    missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
    if missing:
        pytest.fail(f"missing: {' '.join(missing)}; tests/native/setup-arm.sh installs them on Debian and Ubuntu")
    folder = BUILD / "aarch64"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}"]
    configure = ["cmake", "-G", "Ninja", "-S", SOURCES, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *target]
    for command in (configure, ["cmake", "--build", folder]):
        subprocess.run(command, check=True, env=environment)
    program = tmp_path / "kernels_test"
    compile_program(CROSS_COMPILER, folder / "libcore.a", program, "-static")
    for processor, isas in {"cortex-a72": ["generic"], "neoverse-n1": ["generic", "neon"]}.items():
        assert run_program(EMULATOR, "-cpu", processor, program) == Output(isas, here.hashes)
