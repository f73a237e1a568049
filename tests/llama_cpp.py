"""llama.cpp as an oracle: a process that loads GGUF files and says how likely it holds each next token, which vector a
text is, and how well documents fit a query.

The library is that of PyPI's xllamacpp, in a process of its own, because it ends a process with whose file it
disagrees. As a program this reads requests, a line of JSON each, and answers each with a line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MARK = "answer: "


class RefusedError(Exception):
    """llama.cpp does not load the file; what it said."""


class LlamaCpp:
    """Everything in float32. A context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._talk = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close()

    def log_probabilities(
        self, path: Path, prompts: Sequence[Sequence[int]], vocab_size: int, *, adapter: Path | None = None
    ) -> NDArray[np.float64]:
        """[prompts, V] of the token after each prompt. Raises RefusedError."""
        adapters = [] if adapter is None else [str(adapter)]
        return np.array(
            self._ask("log_probabilities", path, vocab_size, [list(prompt) for prompt in prompts], adapters)
        )

    def embeddings(self, path: Path, texts: Sequence[str], *, mean: bool = False) -> NDArray[np.float64]:
        """[texts, D], of length 1, pooled as the file says, or by the mean. Raises RefusedError."""
        return np.array(self._ask("embeddings", path, texts, mean))

    def ranking(self, path: Path, query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        """[documents], by the file's own head. Raises RefusedError."""
        return np.array(self._ask("ranking", path, query, documents))

    def _ask(self, question: str, path: Path, *arguments: Any) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._talk,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        begin = self._talk.seek(0, 2)
        self._process.stdin.write(json.dumps([question, str(path), *arguments]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        self._end()
        self._talk.seek(begin)
        lines = [line for line in self._talk.read().splitlines() if "error" in line.lower() or "fail" in line.lower()]
        raise RefusedError("\n".join(lines[-8:]))

    def close(self) -> None:
        self._end()
        self._talk.close()

    def _end(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


def log_probabilities(
    path: str, vocab_size: int, prompts: Sequence[Sequence[int]], adapters: Sequence[str]
) -> list[list[float]]:
    server = serve(path, n_ctx=max(map(len, prompts)) + 16, lora_adapters=[_adapter(path) for path in adapters])
    answers = []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocab_size}
        (choice,) = server.handle_completions(asked)["choices"]
        row = [float("nan")] * vocab_size
        for token in choice["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        answers.append(row)
    return answers


def embeddings(path: str, texts: Sequence[str], mean: bool) -> list[list[float]]:
    import xllamacpp

    kinds = xllamacpp.llama_pooling_type
    pooling = kinds.LLAMA_POOLING_TYPE_MEAN if mean else kinds.LLAMA_POOLING_TYPE_UNSPECIFIED
    server = serve(path, n_ctx=4096, embedding=True, n_batch=4096, n_ubatch=4096, pooling_type=pooling)
    return [server.handle_embeddings({"input": text})["data"][0]["embedding"] for text in texts]


def ranking(path: str, query: str, documents: Sequence[str]) -> list[float]:
    import xllamacpp

    rank = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    server = serve(path, n_ctx=4096, embedding=True, n_batch=4096, n_ubatch=4096, pooling_type=rank)
    results = server.handle_rerank({"query": query, "documents": documents})["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    return [scores[i] for i in range(len(documents))]


def _adapter(path: str) -> Any:
    import xllamacpp

    info = xllamacpp.CommonAdapterLoraInfo()
    info.path, info.scale = path, 1.0
    return info


def serve(path: str, **values: Any) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    for name, value in values.items():
        setattr(parameters, name, value)
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = 1  # more only wait for each other on so little
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


if __name__ == "__main__":
    for request in sys.stdin:
        question, *arguments = json.loads(request)
        print("\n" + _MARK + json.dumps(globals()[question](*arguments)), flush=True)
