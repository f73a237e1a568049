"""Texts embedded per second of one core, beside llama-server: both by /v1/embeddings, the same ids, pooled by the mean.

    python benchmarks/embeddings.py                          the small model of the catalogue
    python benchmarks/embeddings.py "smollm2-135m Q8_0"      a model as benchmarks/cpu.py names it; adds to it
    python benchmarks/embeddings.py --draw                   measures nothing: the table from the results

Texts of equal length, TOKENS tokens together, are asked for by CLIENTS clients, a request each. Each server has one
thread, and counted is its own processor time, so that what else the machine does counts little. The peer first tries
its flags as in benchmarks/streams.py; both servers then run, and answer in turn; medians of the rounds are compared,
and the vectors too. Results are kept in benchmarks/data/embeddings.json and written into docs/performance.md. Wants
the peer: benchmarks/peer.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import peer
import report
from cpu import find_model, named
from dapji.files import open_files
from load import dapji
from streams import TEXT

LENGTHS = [16, 64, 256]
TOKENS, CLIENTS, SLOTS = 1024, 4, 16
"""Of all texts together; clients that ask at once; texts that the peer computes side by side."""
DATA = report.ROOT / "benchmarks" / "data" / "embeddings.json"

Results = dict[str, Any]


def texts(path: Path, length: int) -> list[list[int]]:
    tokens = open_files(path).tokenizer().encode(TEXT.read_text())
    return [tokens[i * length : (i + 1) * length] for i in range(TOKENS // length)]


def ask(port: int, ids: list[list[int]]) -> list[list[float]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/embeddings", json.dumps({"input": ids}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {json.dumps(answer)[:500]}")
    return [each["embedding"] for each in sorted(answer["data"], key=lambda each: each["index"])]


def run(port: int, process: int, ids: list[list[int]]) -> tuple[float, np.ndarray[Any, Any]]:
    """Texts per second of the server's processor time, and their vectors."""
    share = len(ids) // CLIENTS
    before = processor_seconds(process)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda i: ask(port, ids[i * share : (i + 1) * share]), range(CLIENTS)))
    return len(ids) / (processor_seconds(process) - before), np.concatenate(answers)


def processor_seconds(process: int) -> float:
    """Of all of its threads, in user and system mode."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def llama_server(path: Path, length: int, flags: peer.Flags) -> AbstractContextManager[tuple[int, int]]:
    options = ["--embeddings", "--pooling", "mean", "-b", "2048", "-ub", "2048"]
    return peer.server(path, n=SLOTS, context=SLOTS * (length + 16), threads=1, flags=flags, more=options)


def best_flags(path: Path) -> peer.Flags:
    tried: dict[peer.Flags, float] = {}
    for repack, tiled, flash in product((1, 0), repeat=3):
        with llama_server(path, LENGTHS[1], (repack, tiled, flash)) as other:
            run(*other, texts(path, LENGTHS[1])[:4])  # a turn that does not count
            tried[repack, tiled, flash], _ = run(*other, texts(path, LENGTHS[1]))
    return max(tried, key=lambda flags: tried[flags])


def measure(name: str, path: Path, rounds: int) -> Iterator[tuple[int, Results]]:
    """For each length: texts per second of all rounds."""
    flags = best_flags(path)
    for length in LENGTHS:
        ids = texts(path, length)
        rates: dict[str, list[float]] = {"dapji": [], "peer": []}
        with dapji(path, 1, 64) as mine, llama_server(path, length, flags) as other:
            _, ours = run(mine.port, mine.process, ids)  # turns that do not count
            _, theirs = run(*other, ids)
            for round in range(rounds):
                print(f"{name}: {length} tokens, round {round + 1} of {rounds}", file=sys.stderr)
                rates["dapji"].append(run(mine.port, mine.process, ids)[0])
                rates["peer"].append(run(*other, ids)[0])
        cosine = float((ours * theirs).sum(axis=1).min())
        yield length, {**rates, "flags": named(flags), "least_cosine": cosine}


def measure_models(arguments: argparse.Namespace, results: Results) -> Iterator[None]:
    for model in arguments.models:
        for length, row in measure(model, find_model(model), arguments.rounds):
            results.setdefault(model, {})[str(length)] = row
            yield


def draw(results: Results) -> None:
    """The table of docs/performance.md."""
    rows = []
    for name, by_length in results.items():
        for length, row in by_length.items():
            ours, theirs = median(row["dapji"]), median(row["peer"])
            rates = f"{ours:.1f}", f"{theirs:.1f}", f"{ours * int(length):.0f}", f"{ours / theirs:.2f}"
            rows.append((name, length, *rates, f"{row['least_cosine']:.4f}", row["flags"]))
    header = ["model", "tokens", "Dapji, texts/s", "llama-server at its best", "Dapji, tok/s", "ratio", "least cosine"]
    report.replace_section(report.DOCUMENT, "embeddings", report.table([*header, "flags"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m"], help="default: that one")
    parser.add_argument("--rounds", type=int, default=5)
    report.run(parser, DATA, measure_models, draw)


if __name__ == "__main__":
    main()
