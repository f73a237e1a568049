"""Perplexity beside llama.cpp: same file, same text, same chunks. The two must agree within 0.3 %.

    python benchmarks/perplexity.py                      everything below, as a table for docs/performance.md
    python benchmarks/perplexity.py smollm2-135m         one model
    python benchmarks/perplexity.py --record             also keep what llama.cpp says, for the tests
    python benchmarks/perplexity.py --cache              what a q8 cache changes, as a table for docs/engine.md
    python benchmarks/perplexity.py --max-chunks 16      of the first chunks alone

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
from collections.abc import Mapping
from pathlib import Path

import peer
from dapji.evaluation.speed import Work
from dapji.files import open_files
from dapji.ops.reference import KvFormat
from dapji.weights import store

SMALL, DEFAULT = "smollm2-135m", "qwen2.5-coder-0.5b"
TYPES = ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"]
TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
RECORD = TEXT.with_name("perplexities.json")
CHUNK = 512


def run_peer(path: Path, threads: int, chunks: int, *flags: str) -> list[float]:
    """The perplexity after each chunk. Its batch holds one chunk, so that the work is cut as ours is."""
    command = [str(peer.require("llama-perplexity")), "-m", str(path), "-f", str(TEXT), "-c", str(CHUNK)]
    command += ["-b", str(CHUNK), "-t", str(threads), "--chunks", str(chunks), *flags]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(value) for value in re.findall(r"\[\d+\]([\d.]+)", output.stdout + output.stderr)]


def run_dapji(path: Path, threads: int, max_chunks: int | None, kv: KvFormat = "f16") -> dict[str, float]:
    command = [sys.executable, "-m", "dapji", "perplexity", str(path), str(TEXT), "--chunk", str(CHUNK), "--json"]
    command += ["--threads", str(threads), "--kv", kv]
    command += [] if max_chunks is None else ["--max-chunks", str(max_chunks)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def compare(files: Mapping[str, Path], threads: int, max_chunks: int | None, *, record: bool) -> None:
    """The table of docs/performance.md."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    print("| model | scored tokens | Dapji | llama.cpp | difference |\n|---|---|---|---|---|")
    for name, path in files.items():
        ours = run_dapji(path, threads, max_chunks)
        theirs = run_peer(path, threads, int(ours["chunks"]))
        recorded[name] = theirs
        assert len(theirs) == ours["chunks"], (len(theirs), ours)
        difference = ours["perplexity"] / theirs[-1] - 1
        print(
            f"| {name} | {ours['scored_tokens']:,} | {ours['perplexity']:.4f} | {theirs[-1]:.4f} | {difference:+.3%} |",
            flush=True,
        )
    if record:
        RECORD.write_text(json.dumps(recorded, indent=1) + "\n")


def compare_caches(files: Mapping[str, Path], threads: int, max_chunks: int | None) -> None:
    """The table of docs/engine.md."""
    print(f"| model | bytes per token | f16 → q8 | llama.cpp, f16 → q8_0 |\n{'|---' * 4}|")
    for name, path in files.items():
        opened = open_files(path)
        sizes = [Work.of(opened.config, opened.tensors, kv).cache_bytes for kv in ("f16", "q8")]
        runs = [run_dapji(path, threads, max_chunks, kv) for kv in ("f16", "q8")]
        ours = [run["perplexity"] for run in runs]
        chunks = int(runs[0]["chunks"])
        # It quantises values only where its flash attention is on.
        theirs = [run_peer(path, threads, chunks, "-fa", "on", "-ctk", kv, "-ctv", kv)[-1] for kv in ("f16", "q8_0")]
        changes = " | ".join(f"{a:.4f} → {b:.4f} ({b / a - 1:+.3%})" for a, b in (ours, theirs))
        print(f"| {name} | {sizes[0]:,.0f} → {sizes[1]:,.0f} | {changes} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of `dapji list`, or GGUF files")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--cache", action="store_true", help="compare formats of the cache")
    parser.add_argument("--max-chunks", type=int, help="of the text; default: all")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        files = {model: store.resolve(model) for model in arguments.models or [SMALL, DEFAULT]}
        if not arguments.models:
            for type in TYPES:
                files[f"{SMALL} {type}"] = path = Path(folder) / f"{SMALL}-{type}.gguf"
                command = [sys.executable, "-m", "dapji", "quantize", "--allow-requantize", SMALL, type, str(path)]
                subprocess.run(command, check=True, stdout=sys.stderr)
        if arguments.cache:
            compare_caches(files, arguments.threads, arguments.max_chunks)
        else:
            compare(files, arguments.threads, arguments.max_chunks, record=arguments.record)


if __name__ == "__main__":
    main()
