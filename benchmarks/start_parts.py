"""The parts of a start of `dapji chat`, one after the other in a fresh process; seconds of each, as JSON.

    python benchmarks/start_parts.py smollm2-135m "What is the capital of Korea?"

Imports nothing before the clock runs but what measuring needs.
"""

from __future__ import annotations

import gc
import sys
from time import perf_counter


def parts(model: str, question: str) -> dict[str, float]:
    gc.set_threshold(100_000)  # as the command line does
    seconds: dict[str, float] = {}
    last = perf_counter()

    def end(part: str) -> None:
        nonlocal last
        now = perf_counter()
        seconds[part] = now - last
        last = now

    import dapji.cli.chat
    import dapji.cli.main

    end("importing click and the command line")
    import numpy  # noqa: F401

    end("importing numpy")
    import dapji.cli.conversation
    from dapji import model as loading
    from dapji.models import native_executor  # noqa: F401
    from dapji.ops import native

    end("importing the rest of Dapji")
    import dapji.chat  # noqa: F401

    end("importing jinja2")
    files = loading.open_files(model)
    end("reading the file's header")
    tokenizer = files.tokenizer()
    end("making the tokenizer")
    cache = loading.PanelCache.of(files.checkpoint, native.panels_version())
    context = loading.default_context(files.config)
    executor = loading.open_executor("native", files.config, files.tensors, context=context, cache=cache)
    end("mapping the weights, recording the decoder")
    engine = loading.Engine(executor, end_tokens=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)
    with loading.Model(files, tokenizer, engine, executor=executor, memory=0) as opened:
        opened.template.prompt([{"role": "user", "content": question}])
        end("template and prompt")
        next(opened.chat([{"role": "user", "content": question}], max_tokens=1, temperature=0))
        end("first token")
    return seconds


if __name__ == "__main__":
    found = parts(*sys.argv[1:])
    import json

    print(json.dumps(found))
