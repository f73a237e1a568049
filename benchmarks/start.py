"""How long after a program's start the first piece of its answer is there, beside llama-server.

    python benchmarks/start.py                          the two small models of the catalogue
    python benchmarks/start.py smollm2-135m --rounds 5  one of them
    python benchmarks/start.py --draw                   measures nothing: the tables from the results

Every start is a fresh process with the model's file in the page cache. Of `dapji chat QUESTION` the time is that until
its first byte on stdout: without a cache of packed weights, at the first start with one, and at later starts. Of
llama-server it is that until the first piece of the same answer arrives over HTTP, from a client that asks again and
again from the start on. It first tries its flags (weights repacked or not, a warming-up run or none), and takes part
with the best. Neither a shell nor compiling our Python files counts: a start that does not count writes their bytecode.

The parts of a later start are those of benchmarks/start_parts.py, which takes the same steps one by one.

Programs take turns; medians of the rounds are compared. Results are kept in benchmarks/data/start.json, and written
into docs/performance.md from there. Wants the peer: benchmarks/peer.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import peer
import report

MODELS = ["smollm2-135m", "qwen2.5-coder-0.5b"]
QUESTION = "What is the capital of Korea?"
DATA = report.ROOT / "benchmarks" / "data" / "start.json"
DAPJI = Path(sys.executable).with_name("dapji")

Results = dict[str, Any]
Flags = tuple[int, int]


def environment(cache: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"DAPJI_CACHE": cache}


def dapji(model: str, cache: str) -> float:
    """Seconds from the start of the process to the first byte of its answer."""
    command = [DAPJI, "chat", "-m", model, "--max-tokens", "1", "--temperature", "0", QUESTION]
    start = perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(cache), bufsize=0
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = perf_counter() - start
        _, said = process.communicate()
    if not first.strip() or process.returncode:
        raise SystemExit(f"dapji chat failed: {said.decode()}")
    return seconds


def first_start(model: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        return dapji(model, cache)


def server(path: Path, flags: Flags) -> float:
    """Seconds from the start of llama-server to the first piece of its answer; infinite where it ends before that.

    flags: repack, warm-up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [peer.require("llama-server"), "-m", path, "--port", str(port), "-np", "1", "-c", "8192"]
    command += ["-t", str(len(os.sched_getaffinity(0)))]
    command += [option for option, on in zip(("--no-repack", "--no-warmup"), flags, strict=True) if not on]
    body = json.dumps(
        {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1, "temperature": 0, "stream": True}
    )
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                with suppress(OSError, HTTPException):
                    connection = HTTPConnection("127.0.0.1", port, timeout=60)
                    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    if response.status == 200:
                        while line := response.readline():
                            if line.startswith(b"data: {"):
                                choices = json.loads(line[6:])["choices"]
                                if choices and choices[0]["delta"].get("content"):
                                    return perf_counter() - start
                        raise SystemExit("llama-server gave no answer")
                sleep(0.002)
            return math.inf  # it died of these flags
        finally:
            process.kill()


def bare_python() -> float:
    """Seconds from the start of an interpreter that does nothing else to its first byte."""
    start = perf_counter()
    with subprocess.Popen([sys.executable, "-c", "print()"], stdout=subprocess.PIPE, env=environment("")) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return perf_counter() - start


def run_parts(model: str, cache: str) -> dict[str, float]:
    command = [sys.executable, Path(__file__).with_name("start_parts.py"), model, QUESTION]
    result: dict[str, float] = json.loads(subprocess.check_output(command, env=environment(cache)))
    return result


def measure(name: str, rounds: int) -> Results:
    from dapji.weights import store

    path = store.resolve(name)
    tried = {flags: server(path, flags) for flags in product((1, 0), repeat=2)}
    flags = min(tried, key=lambda flags: tried[flags])
    if math.isinf(tried[flags]):
        raise SystemExit("llama-server does not run")
    with tempfile.TemporaryDirectory() as cache:
        programs: dict[str, Callable[[], float]] = {
            "python": bare_python,
            "off": lambda: dapji(name, "off"),
            "first": lambda: first_start(name),
            "later": lambda: dapji(name, cache),
            "peer": lambda: server(path, flags),
        }
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        split: list[dict[str, float]] = []
        for run in programs.values():
            run()  # does not count
        for round in range(rounds):
            print(f"{name}: round {round + 1} of {rounds}", file=sys.stderr)
            for program, run in programs.items():
                seconds[program].append(run())
            split.append(run_parts(name, cache))
    medians = {part: median(row[part] for row in split) for part in split[0]}
    return {"seconds": seconds, "parts": medians, "flags": "repack {}, warm-up {}".format(*flags)}


def measure_models(arguments: argparse.Namespace, results: Results) -> Iterator[None]:
    for name in arguments.models:
        results[name] = measure(name, arguments.rounds)
        yield


def draw(results: Results) -> None:
    """The tables of docs/performance.md."""
    header = ["model", "no cache", "first start", "later starts", "llama-server at its best", "ratio", "flags"]
    rows = []
    for name, row in results.items():
        off, first, later, other = (median(row["seconds"][key]) for key in ("off", "first", "later", "peer"))
        times = [f"{seconds:.2f}" for seconds in (off, first, later, other)]
        rows.append((name, *times, f"{other / later:.2f}", row["flags"]))
    python = median(seconds for row in results.values() for seconds in row["seconds"]["python"])
    parts = {"starting Python": dict.fromkeys(results, python)}
    for name, row in results.items():
        for part, seconds in row["parts"].items():
            parts.setdefault(part, {})[name] = seconds
    split = [(part, *(f"{1e3 * of[name]:.0f}" for name in results)) for part, of in parts.items()]
    text = [
        report.table(header, rows),
        "Seconds from the start of the process to the first piece of the answer. The parts of a later start, in ms:",
        report.table(["part", *results], split),
    ]
    report.replace_section(report.DOCUMENT, "start", "\n\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="installed models; default: those two")
    parser.add_argument("--rounds", type=int, default=9)
    report.run(parser, DATA, measure_models, draw)


if __name__ == "__main__":
    main()
