"""llama.cpp, the peer that Dapji is measured beside: builds it from its own sources, finds its programs.

    python benchmarks/peer.py        builds once, into build/llama.cpp (some 25 minutes on two cores)

The sources are those in llama-cpp-python's archive, pinned by hash in tests/oracles.py. LLAMA_CPP names a folder with
these programs of another build.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import oracles  # noqa: E402

BUILD = ROOT / "build" / "llama.cpp"
PROGRAMS = ("llama-bench", "llama-perplexity", "llama-quantize", "llama-server")
FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_UI=OFF")


def find(program: str) -> Path | None:
    """The program's path; None where the peer has not been built."""
    path = Path(os.environ.get("LLAMA_CPP", BUILD / "bin")) / program
    return path if path.exists() else None


def require(program: str) -> Path:
    """As `find`; ends the script where it is missing."""
    path = find(program)
    if path is None:
        raise SystemExit(f"{program} is not built; `python benchmarks/peer.py` builds it, or set LLAMA_CPP")
    return path


def version() -> str:
    """What the peer says of itself."""
    command = [require("llama-bench"), "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in (output.stdout + output.stderr).splitlines() if "version" in line]
    return lines[0].strip() if lines else f"of {oracles.PACKAGE} {oracles.VERSION}"


def build() -> None:
    source = BUILD / "source"
    if not source.exists():
        source.mkdir(parents=True)
        with tarfile.open(oracles.download(BUILD)) as archive:
            archive.extractall(source, filter="data")
    (project,) = source.glob("*/vendor/llama.cpp")
    subprocess.run(["cmake", "-S", project, "-B", BUILD, *FLAGS], check=True)
    subprocess.run(["cmake", "--build", BUILD, "--parallel", "--target", *PROGRAMS], check=True)


if __name__ == "__main__":
    if all(find(program) for program in PROGRAMS):
        print(f"built already: {version()}")
    else:
        build()
