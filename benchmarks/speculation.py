"""What speculation gains where a text repeats itself, and what it costs where it does not.

    python benchmarks/speculation.py                    the two small models of the catalogue, as tables
    python benchmarks/speculation.py model-Q8_0.gguf    any model of `dapji list`, or a path

Each answer is written with and without it in turn, so that whatever else the machine does hits both; medians of the
rounds are compared. Both must be the same tokens, or the script fails. The second table is what the rule in
src/dapji/engine/speculation.py assumes: the time of a step of 1 to 8 tokens, in steps of one.

On a machine that is busy with other things, --threads 1 --processor-time counts the time that the processor gave to
the script, instead of the time that went by.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np

from dapji import load
from dapji.engine import Engine, Request, Sampling, Usage
from dapji.engine.speculation import MAX_STEP_TOKENS, step_cost
from dapji.model import Model
from dapji.ops.batch import Batch

DEFAULT = ["smollm2-135m", "qwen2.5-coder-0.5b"]
ROOT = Path(__file__).resolve().parent.parent
CODE = (ROOT / "src/dapji/engine/stop.py").read_text()
VERSE = (ROOT / "benchmarks/data/shakespeare.txt").read_text()[3000:4200]
TASKS = {
    "repeat verse": f"Repeat this text word for word:\n\n{VERSE}",
    "edit code": f"Rename the class StopStrings to Stops in this file. Print the whole file:\n\n```python\n{CODE}```",
    "write JSON": "Write a JSON array of 12 planets and moons with name, radius_km, mass_kg and has_atmosphere.",
    "tell a story": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "explain": "Explain how a hash table works and when it is slow.",
}
DEPTH = 256  # tokens before the steps that are timed


Clock = Callable[[], float]


def answer(model: Model, request: Request, clock: Clock, *, speculate: bool) -> tuple[list[int], Usage, float]:
    """Tokens, usage, tokens per second after the first; by an engine of its own, which finds nothing in its cache."""
    tokenizer = model.tokenizer
    with Engine(
        model.executor, end_tokens=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size, speculate=speculate
    ) as engine:
        stream = engine.generate(request)
        outputs = [next(stream)]
        start = clock()
        outputs.extend(stream)
        seconds = clock() - start
    finish = outputs[-1].finish
    assert finish is not None
    return [output.token for output in outputs], finish.usage, (len(outputs) - 1) / seconds


def compare(model: Model, task: str, sampling: Sampling, n_tokens: int, rounds: int, clock: Clock) -> str:
    """One line of the table."""
    prompt = model.template.prompt([{"role": "user", "content": TASKS[task]}])
    request = Request(prompt=prompt, max_tokens=n_tokens, sampling=sampling)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        expected, _, rate = answer(model, request, clock, speculate=False)
        rates[False].append(rate)
        tokens, usage, rate = answer(model, request, clock, speculate=True)
        rates[True].append(rate)
        if tokens != expected:
            raise SystemExit(f"{model.name}, {task}: the answers differ")
    without, with_it = median(rates[False]), median(rates[True])
    how = "greedy" if sampling.temperature == 0 else "sampled"
    return (
        f"| {model.name} | {task}, {how} | {usage.generated} | {usage.accepted} of {usage.proposed} "
        f"| {without:.1f} | {with_it:.1f} | {with_it / without:.2f} |"
    )


def step_times(model: Model, rounds: int, clock: Clock) -> str:
    """One line of the second table."""
    random = np.random.default_rng(0)
    tokens = random.integers(model.tokenizer.vocab_size, size=DEPTH + MAX_STEP_TOKENS)
    model.executor.step(Batch.single(tokens[:DEPTH], all_rows=False))
    seconds: dict[int, list[float]] = {n: [] for n in range(1, MAX_STEP_TOKENS + 1)}
    for _ in range(5 * rounds):
        for n, times in seconds.items():
            batch = Batch.single(tokens[DEPTH : DEPTH + n], past=DEPTH)
            start = clock()
            model.executor.step(batch)
            times.append(clock() - start)
    one = median(seconds[1])
    return (
        f"| {model.name}, {one * 1e3:.1f} ms | " + " | ".join(f"{median(s) / one:.2f}" for s in seconds.values()) + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT, help="names of `dapji list`, or paths")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=200, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="see above")
    arguments = parser.parse_args()
    clock = process_time if arguments.processor_time else perf_counter

    lines, steps = [], []
    for name in arguments.models:
        with load(name, threads=arguments.threads) as model:
            model.engine.close()
            own = {key: value for key, value in model.options().items() if key in Sampling.__dataclass_fields__}
            for sampling in (Sampling(temperature=0), Sampling(**own | {"seed": 1})):
                for task in TASKS:
                    lines.append(compare(model, task, sampling, arguments.tokens, arguments.rounds, clock))
                    print(lines[-1], file=sys.stderr)
            steps.append(step_times(model, arguments.rounds, clock))
    print(f"| model | task | tokens | proposals accepted | without | with | ratio |\n{'|---' * 7}|")
    print("\n".join(lines))
    unit = "of the processor" if arguments.processor_time else "by the clock"
    print(f"\nTokens per second {unit}; threads: {arguments.threads}.\n")
    sizes = range(1, MAX_STEP_TOKENS + 1)
    print(f"| step of one token | {' | '.join(map(str, sizes))} |\n{'|---' * (MAX_STEP_TOKENS + 1)}|")
    print("\n".join(steps))
    print(f"| assumed | {' | '.join(f'{step_cost(n):.2f}' for n in sizes)} |")


if __name__ == "__main__":
    main()
