"""Which of two answers a model prefers, before and after: python runs/preference/compare.py PAIRS --adapter FOLDER

Two accuracies, as our engine computes them on the base as its file has it. `likelihood`: the chosen answer is the
likelier one, by the mean log-probability of its tokens; before and after are compared pair by pair. `reward`: the
chosen answer is the one that training has raised by more, by the sum of its tokens (the implicit reward of Rafailov et
al. 2023); by chance that is a half of the pairs.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

import dapji
from dapji.evaluation.bootstrap import paired_difference, proportion
from dapji.training.data.encoding import Encoder
from dapji.training.data.encoding import Sequence as Answer
from dapji.training.data.reading import Reader

PARALLEL = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="leave out pairs with a longer answer")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with dapji.load(arguments.model, threads=arguments.threads, kv_memory=1 << 30) as model:
        model.load_adapter("tuned", arguments.adapter)
        tuned = model.adapter_number("tuned")
        encoder = Encoder(model.tokenizer, max_length=arguments.max_length or model.engine.context)
        entries = list(Reader(arguments.pairs, encoder))
        samples = [entry.samples[0].sequences for entry in entries if entry.error is None]

        def log_probs(answer: Answer, adapter: int) -> tuple[float, float]:
            """Of all learned tokens together, and of one in the mean."""
            start = int(answer.learned.argmax())
            chosen = model.engine.score(answer.ids, start=start, adapter=adapter).chosen[answer.learned[start:]]
            return float(chosen.sum()), float(chosen.mean())

        jobs = [(answer, adapter) for pair in samples for adapter in (0, tuned) for answer in pair]
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = list(pool.map(lambda job: log_probs(*job), jobs))
    before, after, rewarded = [], [], []
    for i in range(0, len(found), 4):
        chosen, rejected, tuned_chosen, tuned_rejected = found[i : i + 4]
        before.append(float(chosen[1] > rejected[1]))
        after.append(float(tuned_chosen[1] > tuned_rejected[1]))
        rewarded.append(float(tuned_chosen[0] - chosen[0] > tuned_rejected[0] - rejected[0]))
    difference = paired_difference(after, before)
    result = {
        "pairs": len(samples),
        "left_out": len(entries) - len(samples),
        "likelihood": {name: proportion(values) for name, values in (("before", before), ("after", after))},
        "difference": difference,
        "reward": proportion(rewarded),
    }
    text = json.dumps(msgspec.to_builtins(result), indent=1)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
