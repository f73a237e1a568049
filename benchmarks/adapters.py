"""What adapters cost, beside llama-server --lora: tokens per second with none, with one, and with several at once.

    python benchmarks/adapters.py                           smollm2-135m and qwen2.5-coder-0.5b
    python benchmarks/adapters.py smollm2-135m --rank 64    a model as benchmarks/cpu.py names it
    python benchmarks/adapters.py --draw                    measures nothing: the table from the results

Adapters of that rank on every linear, random, in GGUF files that both programs read (float16). Streams are those of
benchmarks/streams.py: short prompts of their own, greedy answers of one length; prompts count in the time. The server
takes part with the flags that are best without adapters. The rounds of the two and of the cases alternate; medians are
compared. Results are kept in benchmarks/data/adapters.json, and written into docs/adapters.md from there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import peer
import report
from cpu import find_model, named
from dapji import load
from dapji.engine import Engine, Request, Sampling
from dapji.model import Model
from dapji.models.adapter import Adapter, adaptable
from dapji.models.families.translate import family_of
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.weights.adapter_file import open_adapter
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from streams import ANSWER, DEFAULT, PROMPT, SEARCHED_ANSWER, Results, Server, best_flags, prompts

DATA = report.ROOT / "benchmarks" / "data" / "adapters.json"
DOCUMENT = report.ROOT / "docs" / "adapters.md"
CASES = {
    "1 stream, base": [0],
    "1 stream, an adapter": [1],
    "8 streams, base": [0] * 8,
    "8 streams, one adapter": [1] * 8,
    "8 streams, 4 adapters": [1, 2, 3, 4] * 2,
    "8 streams, base and 4 adapters": [0, 1, 2, 3, 0, 4, 1, 2],
}
"""The adapter of each stream; 0: none."""
N_ADAPTERS = 4


def write_adapter(model: Model, path: Path, rank: int, seed: int) -> Path:
    """Small random matrices for every linear."""
    random, layout = np.random.default_rng(seed), family_of(model.config).gguf
    tensors = []
    for name, (rows, cols) in adaptable(model.config).items():
        if name == "head":
            continue
        for letter, shape in (("a", (rank, cols)), ("b", (rows, rank))):
            values = (random.standard_normal(shape) * 0.02).astype(np.float16)
            stored = values.view(np.uint8).reshape(shape[0], -1)
            tensors.append(
                Tensor(name=f"{layout.name(name)}.lora_{letter}", format=FORMATS["F16"], shape=shape, source=stored)
            )
    metadata = {
        "general.type": "adapter",
        "general.architecture": family_of(model.config).gguf_architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(rank),
    }
    write_gguf(path, metadata, [TensorToWrite.of(tensor.name, tensor) for tensor in tensors])
    return path


def run_dapji(model: Model, adapters: Sequence[Adapter], chosen: Sequence[int]) -> float:
    """Tokens of all answers per second, on an engine of its own, which finds nothing in its cache."""
    assert model.executor is not None
    with Engine(model.executor, vocab_size=model.tokenizer.vocab_size, speculate=False) as engine:
        numbers = [0, *map(engine.add_adapter, adapters)]
        start = perf_counter()
        streams = [
            engine.generate(
                Request(
                    prompt=prompt,
                    max_tokens=ANSWER,
                    sampling=Sampling(temperature=0),
                    ignore_eos=True,
                    adapter=numbers[number],
                )
            )
            for prompt, number in zip(prompts(model, len(chosen)), chosen, strict=True)
        ]
        n_tokens = sum(len(list(stream)) for stream in streams)
        seconds = perf_counter() - start
        for number in numbers[1:]:
            engine.remove_adapter(number)
    return n_tokens / seconds


def run_peer(server: Server, texts: list[list[int]], chosen: Sequence[int], n_tokens: int) -> float:
    """The same, of the server: by the clock of its clients, since it computes one adapter's streams after another's."""

    def post(text: list[int], number: int) -> None:
        scales = [{"id": i, "scale": float(i + 1 == number)} for i in range(N_ADAPTERS)]
        server.post(text, n_tokens, lora=scales)

    start = perf_counter()
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(post, texts, chosen))
    return len(texts) * n_tokens / (perf_counter() - start)


def measure(name: str, path: Path, threads: int, rank: int, rounds: int) -> Results:
    n_most = max(map(len, CASES.values()))
    rates: dict[str, dict[str, list[float]]] = {case: {"dapji": [], "peer": []} for case in CASES}
    with (
        tempfile.TemporaryDirectory() as folder,
        load(path, context=n_most * (PROMPT + ANSWER), threads=threads) as model,
    ):
        model.engine.close()
        files = [write_adapter(model, Path(folder) / f"{i}.gguf", rank, i) for i in range(N_ADAPTERS)]
        adapters = [open_adapter(file, model.config) for file in files]
        flags = best_flags(model, path, threads)
        more = [word for file in files for word in ("--lora", str(file))]
        context = n_most * 2 * (PROMPT + ANSWER)
        with peer.server(path, n=n_most, context=context, threads=threads, flags=flags, more=more) as (port, _):
            server = Server(port)
            for chosen in CASES.values():  # a turn that does not count
                run_dapji(model, adapters, chosen)
                run_peer(server, prompts(model, len(chosen)), chosen, SEARCHED_ANSWER)
            for round in range(rounds):
                print(f"{name}: round {round + 1} of {rounds}", file=sys.stderr)
                for case, chosen in CASES.items():
                    rates[case]["dapji"].append(run_dapji(model, adapters, chosen))
                    rates[case]["peer"].append(run_peer(server, prompts(model, len(chosen)), chosen, ANSWER))
        share = adapters[0].nbytes / model.files.checkpoint.nbytes
    return {"threads": threads, "rank": rank, "flags": named(flags), "share": share, "rates": rates}


def measure_models(arguments: argparse.Namespace, results: Results) -> Iterator[None]:
    for model in arguments.models:
        path = find_model(model)
        results[model] = measure(model, path, arguments.threads, arguments.rank, arguments.rounds)
        yield


def draw(results: Results) -> None:
    """The table of docs/adapters.md."""
    rows = []
    for name, row in results.items():
        for case, rates in row["rates"].items():
            base = row["rates"][f"{case.partition(',')[0]}, base"]
            cells = []
            for program in ("dapji", "peer"):
                rate = median(rates[program])
                cells.append(f"{rate:.0f} ({rate / median(base[program]):.0%})")
            rows.append((name, case, *cells))
    header = ["model", "", "Dapji", "llama-server"]
    report.replace_section(DOCUMENT, "adapters", report.table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT, help="default: those two")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    report.run(parser, DATA, measure_models, draw)


if __name__ == "__main__":
    main()
