"""A prompt and an answer in a process of their own, as JSON: their speed, and the most memory the process ever held.

    python benchmarks/one_request.py smollm2-135m --prompt 4096 --decode 32

As `llama-bench -p`, `-n` and `-d` do it for the peer: token ids are random, and the answer begins behind the prompt.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys

import numpy as np

import dapji
from dapji.engine import Finish, Request, Sampling

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

        def answer(n_prompt: int, n_tokens: int) -> Finish:
            prompt = random.integers(model.tokenizer.vocab_size, size=n_prompt).tolist()
            sampling = Sampling(temperature=0)
            request = Request(
                prompt=prompt, max_tokens=n_tokens, min_tokens=n_tokens, sampling=sampling, ignore_eos=True
            )
            *_, last = model.engine.generate(request)
            assert last.finish is not None
            return last.finish

        answer(WARM_UP, 1)
        finish = answer(n_prompt, n_decode + 1)
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "prompt": n_prompt / finish.timings.first_token,
        "decode": finish.tokens_per_second if n_decode else None,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
