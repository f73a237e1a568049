"""The speed of a prompt and an answer in a process of their own, as JSON; its memory is measured from outside.

    python benchmarks/one_request.py smollm2-135m --prompt 4096 --decode 32

As `llama-bench -p`, `-n` and `-d` do it for the peer: token ids are random, and the answer begins behind the prompt.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

import dapji
from dapji.evaluation.speed import answer_random

WARM_UP = 256
"""Tokens of a prompt that does not count: threads have started and buffers exist."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=0)
    arguments = parser.parse_args()
    n_prompt, n_decode = arguments.prompt, arguments.decode
    random = np.random.default_rng(0)

    context = max(n_prompt + n_decode, WARM_UP) + 1
    with dapji.load(arguments.model, context=context, threads=arguments.threads, speculate=False) as model:
        for n_before, n_tokens in ((WARM_UP, 1), (n_prompt, n_decode + 1)):
            finish = answer_random(
                model.engine, random, vocab_size=model.tokenizer.vocab_size, n_before=n_before, n_tokens=n_tokens
            )
    result = {
        "prompt": n_prompt / finish.timings.first_token,
        "decode": finish.tokens_per_second if n_decode else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
