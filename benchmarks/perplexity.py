"""Perplexity beside llama.cpp: same file, same text, same chunks. The two must agree within 0.3 %.

    python benchmarks/perplexity.py                      everything below, as a table for docs/performance.md
    python benchmarks/perplexity.py smollm2-135m         one model
    python benchmarks/perplexity.py --record             also keep what llama.cpp says, for the tests

Measured are the two small models of the catalogue as they were published, and SmolLM2 quantised anew by
`dapji quantize` to the formats that it writes. Text: data/shakespeare.txt. Wants the peer: benchmarks/peer.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import peer

SMALL, DEFAULT = "smollm2-135m", "qwen2.5-coder-0.5b"
TYPES = ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"]
TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
RECORD = TEXT.with_name("perplexities.json")
CHUNK = 512


def run_peer(path: Path, threads: int) -> list[float]:
    """The perplexity after each chunk. Its batch holds one chunk, so that the work is cut as ours is."""
    command = [str(peer.require("llama-perplexity")), "-m", str(path), "-f", str(TEXT), "-c", str(CHUNK)]
    command += ["-b", str(CHUNK), "-t", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(value) for value in re.findall(r"\[\d+\]([\d.]+)", output.stdout + output.stderr)]


def run_dapji(path: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "dapji", "perplexity", str(path), str(TEXT), "--chunk", str(CHUNK), "--json"]
    output = subprocess.run([*command, "--threads", str(threads)], check=True, stdout=subprocess.PIPE).stdout
    result: dict[str, float] = json.loads(output)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of `dapji list`, or GGUF files")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    arguments = parser.parse_args()

    from dapji.weights import store

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    print("| model | scored tokens | Dapji | llama.cpp | difference |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = {model: store.resolve(model) for model in arguments.models or [SMALL, DEFAULT]}
        if not arguments.models:
            for type in TYPES:
                files[f"{SMALL} {type}"] = path = Path(folder) / f"{SMALL}-{type}.gguf"
                command = [sys.executable, "-m", "dapji", "quantize", "--allow-requantize", SMALL, type, str(path)]
                subprocess.run(command, check=True, stdout=sys.stderr)
        for name, path in files.items():
            ours, theirs = run_dapji(path, arguments.threads), run_peer(path, arguments.threads)
            record[name] = theirs
            assert len(theirs) == ours["chunks"], (len(theirs), ours)
            difference = ours["perplexity"] / theirs[-1] - 1
            print(
                f"| {name} | {ours['scored_tokens']:,} | {ours['perplexity']:.4f} | {theirs[-1]:.4f} "
                f"| {difference:+.3%} |",
                flush=True,
            )
    if arguments.record:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
