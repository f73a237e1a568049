"""llama.cpp, the peer that Dapji is measured beside: builds it from its own sources, finds its programs.

    python benchmarks/peer.py        builds once, into build/llama.cpp (10 to 25 minutes on two cores)

The sources are those in llama-cpp-python's archive, pinned by hash in tests/oracles.py. LLAMA_CPP names a folder with
these programs of another build.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from time import sleep

from dapji.evaluation.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import oracles  # noqa: E402

BUILD = ROOT / "build" / "llama.cpp"
WITHOUT_AMX = "-without-amx"
"""Variant for measuring the vector instructions alone on a processor with AMX."""
PROGRAMS = ("llama-bench", "llama-perplexity", "llama-quantize", "llama-server")
Flags = tuple[int, int, int]
"""Of a running server: weights repacked, tiled kernels, flash attention."""
FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_UI=OFF")


def compiler_flags(variant: str) -> str:
    """Beside llama.cpp's own.

    gcc 12 takes what the AMX kernels store in the tiles' configuration for unused and leaves it out, and they crash.
    """
    if variant == WITHOUT_AMX:
        return "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    return "-fno-tree-dse -fno-dse" if has_amx() else ""


def has_amx() -> bool:
    return "amx_int8" in (describe_machine().features or ())


def find(program: str, variant: str = "") -> Path | None:
    """The program's path; None where the peer has not been built."""
    folder = Path(f"{BUILD}{variant}/bin")
    if variant == "" and "LLAMA_CPP" in os.environ:
        folder = Path(os.environ["LLAMA_CPP"])
    path = folder / program
    return path if path.exists() else None


def require(program: str, variant: str = "") -> Path:
    """As `find`; ends the script where it is missing."""
    path = find(program, variant)
    if path is None:
        raise SystemExit(f"{program} is not built; `python benchmarks/peer.py` builds it, or set LLAMA_CPP")
    return path


def version() -> str:
    """What the peer says of itself."""
    command = [require("llama-bench"), "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in (output.stdout + output.stderr).splitlines() if "version" in line]
    return lines[0].strip() if lines else f"of {oracles.LLAMA_CPP.name} {oracles.LLAMA_CPP.version}"


@contextmanager
def server(
    path: Path, *, n: int, context: int, threads: int, flags: Flags, more: Sequence[str] = ()
) -> Iterator[tuple[int, int]]:
    """llama-server with n slots and `context` tokens for all of them together, and more options; its port and process,
    until the block ends."""
    repack, tiled, flash = flags
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(require("llama-server")), "-m", str(path), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", str(threads), "-tb", str(threads), "-np", str(n), "-c", str(context)]
    command += ["--cont-batching", "-fa", "on" if flash else "off", *([] if repack else ["--no-repack"]), *more]
    environment = os.environ | {"GGML_CPU_TILED_MM": str(tiled)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            while not _healthy(port):
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
                sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()


def _healthy(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def build(variant: str) -> None:
    source = BUILD / "source"
    if not source.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as name:
            with tarfile.open(oracles.download(oracles.LLAMA_CPP, Path(name))) as archive:
                archive.extractall(Path(name) / "source", filter="data")
            (Path(name) / "source").rename(source)
    (project,) = source.glob("*/vendor/llama.cpp")
    folder = f"{BUILD}{variant}"
    flags = [f"-DCMAKE_{language}_FLAGS={compiler_flags(variant)}" for language in ("C", "CXX")]
    subprocess.run(["cmake", "-S", project, "-B", folder, *FLAGS, *flags], check=True)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run(["cmake", "--build", folder, "--parallel", jobs, "--target", *PROGRAMS], check=True)


if __name__ == "__main__":
    for variant in ("", WITHOUT_AMX) if has_amx() else ("",):
        if all(find(program, variant) for program in PROGRAMS):
            print(f"built already: {version()}")
        else:
            build(variant)
