"""Many streams at once beside llama-server: tokens per second that they are written with together.

    python benchmarks/streams.py                                the two small models of the catalogue
    python benchmarks/streams.py "smollm2-135m Q8_0" --streams 8    a model as benchmarks/cpu.py names it; adds to them
    python benchmarks/streams.py --draw                         measures nothing: table and plot from the results

Every stream reads a prompt of its own and writes an answer of the same length, greedily, without end tokens: the same
ids for both programs, neither with speculation nor with anything in its cache. A stream's rate is that of its answer,
from first token to last, by the program's own clock; the total is the median stream's times their number. So neither
reading prompts nor HTTP counts in it. Dapji is called as a library, llama-server over HTTP, one response for each
answer; what that costs is measured too: the time of a request at its client, less that of prompt and answer.

The server first tries its flags (weights repacked or not, its tiled kernels or not, flash attention or not) with eight
streams, and takes part with the best. The two then run in turn; medians of the rounds are compared. Results are kept in
benchmarks/data/streams.json, and written into docs/performance.md from there. Wants the peer: benchmarks/peer.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import peer
import report
from cpu import find_model, named
from dapji import load
from dapji.engine import Engine, Request, Sampling
from dapji.model import Model

DEFAULT = ["smollm2-135m", "qwen2.5-coder-0.5b"]
STREAMS = [1, 2, 4, 8, 16, 32]
SEARCHED = 8
SEARCHED_ANSWER = 24
"""Streams and tokens with which the server's flags are tried."""
PROMPT, ANSWER = 32, 64
TEXT = report.ROOT / "benchmarks" / "data" / "shakespeare.txt"
DATA = report.ROOT / "benchmarks" / "data" / "streams.json"
PLOT = report.ROOT / "docs" / "streams.svg"

Results = dict[str, Any]


def prompts(model: Model, n: int) -> list[list[int]]:
    """n stretches of the text, PROMPT tokens each."""
    tokens = model.tokenizer.encode(TEXT.read_text())
    return [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(n)]


def total(rates: list[float]) -> float:
    return median(rates) * len(rates)


def run_dapji(model: Model, n: int) -> float:
    """Tokens per second of n streams, on an engine of its own, which finds nothing in its cache."""
    sampling = Sampling(temperature=0)
    with Engine(model.executor, vocab_size=model.tokenizer.vocab_size, speculate=False) as engine:
        streams = [
            engine.generate(Request(prompt=prompt, max_tokens=ANSWER, sampling=sampling, ignore_eos=True))
            for prompt in prompts(model, n)
        ]
        ends = [list(stream)[-1].finish for stream in streams]
    return total([end.tokens_per_second or 0.0 for end in ends if end is not None])


class Server:
    """A running llama-server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def post(self, prompt: list[int], n_tokens: int, **more: Any) -> tuple[float, float]:
        """One answer: its tokens per second, and seconds at the client beyond those of prompt and answer."""
        body = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        body |= more
        start = perf_counter()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        seconds = perf_counter() - start
        if response.status != 200 or answer["timings"]["predicted_n"] != n_tokens:
            raise SystemExit(f"llama-server answered {response.status}: {json.dumps(answer)[:500]}")
        timings = answer["timings"]
        # As ours: the first token belongs to the prompt.
        rate = (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1e3
        return rate, seconds - (timings["prompt_ms"] + timings["predicted_ms"]) / 1e3

    def run(self, texts: list[list[int]], n_tokens: int) -> tuple[float, float]:
        """Tokens per second of a stream for each text; the least time that a request took beyond its tokens."""
        with ThreadPoolExecutor(len(texts)) as pool:
            answers = list(pool.map(lambda text: self.post(text, n_tokens), texts))
        return total([rate for rate, _ in answers]), min(beyond for _, beyond in answers)


@contextmanager
def server(path: Path, n: int, threads: int, flags: peer.Flags) -> Iterator[Server]:
    """llama-server with n slots for a prompt and an answer each, until the block ends."""
    with peer.server(path, n=n, context=n * 2 * (PROMPT + ANSWER), threads=threads, flags=flags) as (port, _):
        yield Server(port)


def best_flags(model: Model, path: Path, threads: int) -> peer.Flags:
    """Of the server."""
    tried: dict[peer.Flags, float] = {}
    for repack, tiled, flash in product((1, 0), repeat=3):
        with server(path, SEARCHED, threads, (repack, tiled, flash)) as other:
            tried[repack, tiled, flash] = other.run(prompts(model, SEARCHED), SEARCHED_ANSWER)[0]
    return max(tried, key=lambda flags: tried[flags])


def measure(name: str, path: Path, threads: int, numbers: list[int], rounds: int) -> Iterator[tuple[int, Results]]:
    """For each number of streams: the rates of all rounds."""
    with load(path, context=max(*numbers, SEARCHED) * (PROMPT + ANSWER), threads=threads) as model:
        model.engine.close()
        best = best_flags(model, path, threads)
        for n in numbers:
            texts = prompts(model, n)
            ours, theirs, beyond = [], [], []
            with server(path, n, threads, best) as other:
                run_dapji(model, n)  # a turn that does not count: memory is touched for the first time
                other.run(texts, SEARCHED_ANSWER)
                for round in range(rounds):
                    print(f"{name}: {n} streams, round {round + 1} of {rounds}", file=sys.stderr)
                    ours.append(run_dapji(model, n))
                    rate, http = other.run(texts, ANSWER)
                    theirs.append(rate)
                    beyond.append(http)
            yield n, {"threads": threads, "dapji": ours, "peer": theirs, "flags": named(best), "http_seconds": beyond}


def measure_models(arguments: argparse.Namespace, results: Results) -> Iterator[None]:
    for model in arguments.models:
        for n, row in measure(model, find_model(model), arguments.threads, arguments.streams, arguments.rounds):
            known = results.get(model, {}) | {str(n): row}
            results[model] = dict(sorted(known.items(), key=lambda item: int(item[0])))
            yield


def draw(results: Results) -> None:
    """The table and the plot of docs/performance.md."""
    rows, series = [], {}
    for name, by_number in results.items():
        for n, row in by_number.items():
            ours, theirs = median(row["dapji"]), median(row["peer"])
            rows.append((name, n, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", row["flags"]))
            for program, rate in (("Dapji", ours), ("llama-server", theirs)):
                series.setdefault(f"{name}, {program}", {})[int(n)] = rate
    header = ["model", "streams", "Dapji", "llama-server at its best", "ratio", "flags"]
    text = f"{report.table(header, rows)}\n\n![Tokens per second over streams]({PLOT.name})"
    report.replace_section(report.DOCUMENT, "streams", text)
    report.lines(PLOT, title="Many streams", x="streams at once", y="tokens per second, all together", series=series)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT, help="default: those two")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--rounds", type=int, default=3)
    report.run(parser, DATA, measure_models, draw)


if __name__ == "__main__":
    main()
