"""Speed on this processor beside llama.cpp: equal weights, equal threads, the peer at its best flags for each file.

    python benchmarks/cpu.py                                   everything below; on two cores about an hour
    python benchmarks/cpu.py --only speed smollm2-135m         a part, a model: adds to the results so far
    python benchmarks/cpu.py --only lengths --lengths 512 4096
    python benchmarks/cpu.py --draw                            measures nothing: tables and plots from the results

speed: prompts of 512 tokens and answers of 64, beside what the machine allows. vectors: the same on a processor with
AMX, without it, as on one that has AVX-512 VNNI alone. lengths: prompts of 128 to 8,192 tokens, the answer behind each,
and the most memory that either program held. A model is a name of `dapji list`, such a name and a format
("smollm2-135m Q8_0": made by `dapji quantize`), "llama-3.1-8b" (random weights in its shape, 4.9 GB), or a GGUF file.
Models of experts are random too, and cut to a few layers and 4,096 tokens: "qwen3-30b-a3b" (1.5 GB), "mixtral-8x7b"
(1.8) and "llama-4-scout" (5.3). What is made lies in build/models and may be deleted.

The two run in turn, each in a process of its own, so that whatever else the machine does hits both; medians are
compared. Results are kept in benchmarks/data/cpu.json, and written into docs/performance.md from there. Without the
peer (benchmarks/peer.py) nothing is measured: `dapji bench` says how fast Dapji is alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import cpu_figures
import peer
from dapji.evaluation.machine import describe_machine
from dapji.evaluation.speed import Work
from dapji.files import open_files
from dapji.weights import store
from random_model import cut, llama_8b, write_random

FORMATS = ["Q4_0", "Q8_0", "Q4_K_M", "Q6_K"]
RANDOM = "llama-3.1-8b"
PUBLISHED = peer.ROOT / "tests" / "models" / "published"
EXPERTS = {
    "qwen3-30b-a3b": (PUBLISHED / "qwen3-30b-a3b.json", 4),
    "mixtral-8x7b": (PUBLISHED / "mixtral-8x7b-v0.1.json", 2),
    "llama-4-scout": (PUBLISHED / "llama-4-scout-text.json", 4),
}
"""config.json, and how many of its layers."""
SPEED = [
    "smollm2-135m", *(f"smollm2-135m {f}" for f in FORMATS), "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", RANDOM,
    *EXPERTS,
]  # fmt: skip
LENGTHS_OF = ["smollm2-135m", "qwen2.5-coder-0.5b"]
LENGTHS = [128, 512, 2048, 4096, 8192]
PROMPT, DECODE = 512, 64
BEHIND = 32
"""Tokens of the answers behind long prompts."""
LARGE = 2 << 30
"""Bytes of a file whose every run takes so long that few must do."""
SEARCHED = 4096
"""The peer's flash attention is tried on and off up to this length; beyond, the better one here is taken."""
MODELS = peer.ROOT / "build" / "models"

Results = dict[str, Any]


def find_model(name: str) -> Path:
    """Its GGUF file, made where it can be. Raises ModelNotFound."""
    base, _, format = name.partition(" ")
    if name != RANDOM and name not in EXPERTS and format not in FORMATS:
        return store.resolve(name)
    path = MODELS / f"{name.replace(' ', '-')}.gguf"
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == RANDOM:
            write_random(path, llama_8b())
        elif name in EXPERTS:
            config, n_layers = EXPERTS[name]
            write_random(path, cut(config, n_layers, 4096))
        else:
            command = [sys.executable, "-m", "dapji", "quantize", "--allow-requantize", base, format, str(path)]
            subprocess.run(command, check=True, stdout=sys.stderr)
    return path


def run(command: list[str], environment: dict[str, str]) -> tuple[Any, int]:
    """What a program prints as JSON, and the most memory it held, in bytes."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return json.loads(output), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_dapji(module: str, *arguments: object, isa: str | None = None) -> tuple[Any, int]:
    environment = dict(os.environ) | ({} if isa is None else {"DAPJI_ISA": isa})
    return run([sys.executable, *module.split(), *map(str, arguments)], environment)


class Peer:
    """llama-bench on one file."""

    def __init__(self, path: Path, threads: int, variant: str = "") -> None:
        self.command = [str(peer.require("llama-bench", variant)), "-m", str(path), "-t", str(threads), "-o", "json"]

    def rate(
        self, *, prompt: int = 0, decode: int = 0, depth: int = 0, flags: tuple[int, int, int], repeats: int = 1
    ) -> tuple[float, int]:
        """Tokens per second, the median of the repeats, and the most memory held. flags: repack, tiled, flash."""
        repack, tiled, flash = flags
        command = [*self.command, "-p", str(prompt), "-n", str(decode), "-d", str(depth), "-r", str(repeats)]
        command += ["--repack", str(repack), "-fa", str(flash)] + ["--no-warmup"] * (repeats == 1)
        (row,), memory = run(command, os.environ | {"GGML_CPU_TILED_MM": str(tiled)})
        return median(row["samples_ts"]), memory

    def best(self, **tokens: int) -> tuple[int, int, int]:
        """The flags with the highest rate."""
        variants: list[tuple[int, int, int]] = list(product((1, 0), repeat=3))
        return max(variants, key=lambda flags: self.rate(flags=flags, **tokens)[0])


def named(flags: tuple[int, int, int]) -> str:
    return "repack {}, tiled {}, flash {}".format(*flags)


def measure_speed(name: str, path: Path, threads: int, *, amx: bool = True) -> Results:
    large = path.stat().st_size > LARGE
    rounds, repeats, decode = (2, 1, 16) if large else (3, 3, DECODE)
    other = Peer(path, threads, "" if amx else peer.WITHOUT_AMX)
    best_prompt, best_decode = other.best(prompt=128), other.best(decode=8 if large else 32)
    bench = ["-m dapji bench", path, "--json", "--prompt", PROMPT, "--decode", decode]
    ours, prompts, decodes = [], [], []
    for round in range(rounds):
        print(f"speed: {name}: round {round + 1} of {rounds}", file=sys.stderr)
        isa = None if amx else "avx512vnni"
        ours.append(run_dapji(*bench, "--threads", threads, "--repeats", repeats, isa=isa)[0])
        prompts.append(other.rate(prompt=PROMPT, flags=best_prompt, repeats=repeats)[0])
        decodes.append(other.rate(decode=decode, flags=best_decode, repeats=repeats)[0])
    files = open_files(path)
    work = Work.of(files.config, files.tensors, "f16")
    return {
        "threads": threads,
        **{key: median(run["machine"][key] for run in ours) for key in ("read_bandwidth", "int8_peak")},
        "work": asdict(work),
        **{
            what: {
                "tokens": tokens,
                cost: ours[0][what][f"{cost}_per_token"],
                "dapji": [run[what]["median"] for run in ours],
                "peer": rates,
                "flags": named(flags),
            }
            for what, tokens, cost, rates, flags in (
                ("prompt", PROMPT, "operations", prompts, best_prompt),
                ("decode", decode, "bytes", decodes, best_decode),
            )
        },
    }


def measure_lengths(name: str, path: Path, threads: int, lengths: list[int], done: Results) -> Results:
    """done: what is known of this model already, where the better flash attention of shorter prompts is looked up."""
    other = Peer(path, threads)
    best_prompt, best_decode = other.best(prompt=128), other.best(decode=32)
    limit = open_files(path).config.max_context - BEHIND - 1
    results = dict(done)
    for length in sorted({min(length, limit) for length in lengths}):
        rounds = 3 if length <= 2048 else 1
        shorter = results.get(str(SEARCHED)) if length > SEARCHED else None
        ours: list[tuple[Results, int]] = []
        prompts: dict[int, list[tuple[float, int]]] = {}
        decodes: dict[int, list[float]] = {}
        for round in range(rounds):
            print(f"lengths: {name}: {length:,} tokens, round {round + 1} of {rounds}", file=sys.stderr)
            request = ["--prompt", length, "--decode", BEHIND, "--threads", threads]
            ours.append(run_dapji(str(Path(__file__).with_name("one_request.py")), path, *request))
            for flash in (1, 0) if shorter is None else (shorter["prompt"]["flash"],):
                rate = other.rate(prompt=length, flags=(*best_prompt[:2], flash))
                prompts.setdefault(flash, []).append(rate)
            for flash in (1, 0) if shorter is None else (shorter["decode"]["flash"],):
                rate = other.rate(decode=BEHIND, depth=length, flags=(*best_decode[:2], flash))
                decodes.setdefault(flash, []).append(rate[0])
        prompt = max(prompts, key=lambda flash: median(rate for rate, _ in prompts[flash]))
        decode = max(decodes, key=lambda flash: median(decodes[flash]))
        results[str(length)] = {
            "threads": threads,
            "prompt": {
                "dapji": [rates["prompt"] for rates, _ in ours],
                "peer": [rate for rate, _ in prompts[prompt]],
                "flags": named((*best_prompt[:2], prompt)),
                "flash": prompt,
            },
            "decode": {
                "dapji": [rates["decode"] for rates, _ in ours],
                "peer": decodes[decode],
                "flags": named((*best_decode[:2], decode)),
                "flash": decode,
            },
            "memory": {
                "dapji": [memory for _, memory in ours],
                "peer": [memory for _, memory in prompts[prompt]],
            },
        }
    return dict(sorted(results.items(), key=lambda item: int(item[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default: those of the document")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=["speed", "vectors", "lengths"], help="one of the parts")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts")
    parser.add_argument("--draw", action="store_true", help="tables and plots from the results so far")
    arguments = parser.parse_args()

    data = cpu_figures.DATA
    results: Results = json.loads(data.read_text()) if data.exists() else {"speed": {}, "vectors": {}, "lengths": {}}

    def measure(part: str, name: str, measured: Callable[[Path], Results]) -> None:
        results[part][name] = measured(find_model(name))
        results["machine"] = asdict(describe_machine()) | {"memory_available": None}
        results["peer"] = peer.version()
        data.write_text(json.dumps(results, indent=1) + "\n")

    if not arguments.draw:
        threads = arguments.threads
        if arguments.only in (None, "speed"):
            for name in arguments.models or SPEED:
                measure("speed", name, lambda path, name=name: measure_speed(name, path, threads))
        if arguments.only == "vectors" or (arguments.only is None and peer.has_amx()):
            for name in arguments.models or SPEED:
                measure("vectors", name, lambda path, name=name: measure_speed(name, path, threads, amx=False))
        if arguments.only in (None, "lengths"):
            for name in arguments.models or LENGTHS_OF:
                done = results["lengths"].get(name, {})
                measure(
                    "lengths",
                    name,
                    lambda path, name=name, done=done: measure_lengths(name, path, threads, arguments.lengths, done),
                )
    cpu_figures.draw(results)


if __name__ == "__main__":
    main()
