"""Speed on this processor beside llama.cpp: reading a prompt of 512 tokens and decoding, equal weights, equal threads.

    python benchmarks/cpu.py                               the two small models of the catalogue
    python benchmarks/cpu.py model-Q8_0.gguf --threads 2   any GGUF file

The two run in turn, each in a process of its own, so that whatever else the machine does hits both; medians of the
rounds are compared. The peer first tries its flags for each file (weights repacked or not, its tiled kernels or not),
then takes part with the best for prompts and the best for decoding. Without the peer (benchmarks/peer.py), Dapji alone
is measured, beside the limits of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import peer

DEFAULT = ["smollm2-135m", "qwen2.5-coder-0.5b"]
PROMPT, DECODE = 512, 64
VARIANTS = [(repack, tiled) for repack in (1, 0) for tiled in (1, 0)]


@dataclass(frozen=True)
class Rates:
    """Tokens per second, medians over rounds."""

    prompt: float
    decode: float


def run_dapji(model: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "dapji", "bench", model, "--json", "--repeats", "3", "--threads", str(threads)]
    command += ["--prompt", str(PROMPT), "--decode", str(DECODE)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def run_peer(path: Path, threads: int, variant: tuple[int, int], *, prompt: bool, decode: bool) -> Rates:
    repack, tiled = variant
    command = [str(peer.require("llama-bench")), "-m", str(path), "-t", str(threads), "-r", "3", "-o", "json"]
    command += ["-p", str(PROMPT if prompt else 0), "-n", str(DECODE if decode else 0), "--repack", str(repack)]
    environment = os.environ | {"GGML_CPU_TILED_MM": str(tiled)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    rates = {bool(row["n_prompt"]): median(row["samples_ts"]) for row in json.loads(output.stdout)}
    return Rates(prompt=rates.get(True, 0.0), decode=rates.get(False, 0.0))


def named(variant: tuple[int, int]) -> str:
    return f"repack {variant[0]}, tiled {variant[1]}"


def measure(model: str, path: Path, threads: int, rounds: int) -> dict[str, Any]:
    has_peer = peer.find("llama-bench") is not None
    best_prompt = best_decode = VARIANTS[0]
    if has_peer:
        tried = {variant: run_peer(path, threads, variant, prompt=True, decode=True) for variant in VARIANTS}
        best_prompt = max(VARIANTS, key=lambda variant: tried[variant].prompt)
        best_decode = max(VARIANTS, key=lambda variant: tried[variant].decode)
    ours, theirs = [], []
    for round in range(rounds):
        print(f"{path.name}: round {round + 1} of {rounds}", file=sys.stderr)
        ours.append(run_dapji(model, threads))
        if has_peer:
            prompt = run_peer(path, threads, best_prompt, prompt=True, decode=False).prompt
            theirs.append(Rates(prompt, run_peer(path, threads, best_decode, prompt=False, decode=True).decode))
    row: dict[str, Any] = {"model": path.name, "threads": threads}
    for what, variant in (("prompt", best_prompt), ("decode", best_decode)):
        rate = median(run[what]["median"] for run in ours)
        row[what] = {"dapji": rate, "share_of_limit": median(run[what]["median"] / run[what]["limit"] for run in ours)}
        if has_peer:
            other = median(getattr(rates, what) for rates in theirs)
            row[what] |= {"llama.cpp": other, "flags": named(variant), "ratio": rate / other}
    row["machine"] = {key: median(run["machine"][key] for run in ours) for key in ("read_bandwidth", "int8_peak")}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| model | | Dapji | llama.cpp at its best | ratio | share of the machine's limit |\n{'|---' * 6}|",
    ]
    for row in rows:
        for what, count in (("prompt", PROMPT), ("decode", DECODE)):
            part = row[what]
            other = f"{part['llama.cpp']:.1f} ({part['flags']})" if "ratio" in part else "not built"
            ratio = f"{part['ratio']:.2f}" if "ratio" in part else ""
            lines.append(
                f"| {row['model']} | {what} {count} | {part['dapji']:.1f} | {other} | {ratio} "
                f"| {part['share_of_limit']:.0%} |"
            )
    limits = [row["machine"] for row in rows]
    lines.append(
        f"\nTokens per second, {rows[0]['threads']} threads. Measured beside them: "
        f"{median(m['read_bandwidth'] for m in limits) / 1e9:.1f} GB/s read, "
        f"{median(m['int8_peak'] for m in limits) / 1e9:.0f} Gop/s in 8-bit dot products."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT, help="names of `dapji list`, or GGUF files")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    arguments = parser.parse_args()

    from dapji.weights import store

    rows = [measure(m, store.resolve(m), arguments.threads, arguments.rounds) for m in arguments.models]
    if peer.find("llama-bench") is None:
        print("llama.cpp is not built, so it is not compared: python benchmarks/peer.py", file=sys.stderr)
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))


if __name__ == "__main__":
    main()
