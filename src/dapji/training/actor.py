"""`Actor`: the model as it is being trained, on an engine of ours, which writes and scores answers.

An adapter is given to the engine as it is, beside the base; a whole model's weights are packed anew, in float32 on a
CPU. On a base without blocks, what it says of an answer is what training computes, up to the order of sums. Knows
neither rewards nor losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dapji.engine import Engine, Request, Sampling
from dapji.models.adapter import Adapter
from dapji.models.config import ModelConfig
from dapji.models.executor import Executor, default_kind, open_executor
from dapji.ops.batch import KV_BLOCK
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor
from dapji.tokenizer import Tokenizer
from dapji.training.network import MAGNITUDE, A, B
from dapji.training.settings import LoraSettings

_PARALLEL = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    tokens: Sequence[int]
    """Its end token included."""
    log_probs: NDArray[np.float32]
    """Of each of them, by the model that wrote it."""
    ended: bool
    """By itself, and not because it had become too long."""

    def text(self, tokenizer: Tokenizer, *, continuation: bool = False) -> str:
        """Without the token that ended it; continuation as `Tokenizer.decode` takes it."""
        return tokenizer.decode(
            [token for token in self.tokens if token not in tokenizer.stop_ids], continuation=continuation
        )


class Actor:
    """Each has the whole model. To be closed."""

    def __init__(
        self,
        config: ModelConfig,
        base: Mapping[str, Tensor],
        tokenizer: Tokenizer,
        *,
        lora: LoraSettings | None,
        context: int,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        parallel: int = _PARALLEL,
    ) -> None:
        """base: the weights that training begins from; products with blocks round what training computes with whole
        (`Tensor.without_blocks`). context: tokens of a prompt and its answer, at most. parallel: answers that are
        written at a time."""
        self._config = config
        self._tokenizer = tokenizer
        self._lora = lora
        self._context = context
        self._device = device
        self._dtype = dtype
        self._parallel = parallel
        self._base_weights = base
        self._base: tuple[Executor, Engine] | None = None
        self._own: tuple[Executor, Engine] | None = None
        self._adapter = 0

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Answer by these from now on: what is trained, by the names of the network's parameters."""
        if self._lora is None:
            self._close_own()
            self._own = self._open(weights)
            return
        engine = self._base_engine()
        if self._adapter:
            engine.remove_adapter(self._adapter)
        pairs = lora_pairs(self._config, self._lora, weights)
        self._adapter = engine.add_adapter(Adapter(pairs=pairs))

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        seeds: Sequence[int] | None,
    ) -> list[Answer]:
        """An answer to each prompt, drawn from the model's own distribution by its seed; without seeds, the likeliest
        token in each place."""
        engine, adapter = self._current()
        drawn = [Sampling(temperature=0.0)] * len(prompts) if seeds is None else [Sampling(seed=seed) for seed in seeds]
        streams = [
            engine.generate(
                Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling, logprobs=0, adapter=adapter)
            )
            for prompt, sampling in zip(prompts, drawn, strict=True)
        ]
        answers = []
        for stream in streams:
            outputs = list(stream)
            log_probs = [output.logprobs.chosen for output in outputs if output.logprobs is not None]
            finish = outputs[-1].finish
            answers.append(
                Answer(
                    tokens=[output.token for output in outputs],
                    log_probs=np.array(log_probs, dtype=np.float32),
                    ended=finish is not None and finish.reason == "stop",
                )
            )
        return answers

    def score_by_base(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[NDArray[np.float32]]:
        """log p of the tokens of each sequence from its start on, by the model that training begins from."""
        engine = self._base_engine()

        def score(sequence: Sequence[int], start: int) -> NDArray[np.float32]:
            return engine.score(sequence, start=start).chosen.astype(np.float32)

        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(score, sequences, starts))

    def close(self) -> None:
        self._close_own()
        if self._base is not None:
            _close(self._base)
            self._base = None

    def _current(self) -> tuple[Engine, int]:
        if self._lora is not None:
            return self._base_engine(), self._adapter
        assert self._own is not None, "load() comes first"
        return self._own[1], 0

    def _base_engine(self) -> Engine:
        if self._base is None:
            self._base = self._open(self._base_weights)
        return self._base[1]

    def _open(self, weights: Mapping[str, Tensor]) -> tuple[Executor, Engine]:
        on_cpu = self._device == "cpu"
        executor = open_executor(
            default_kind() if on_cpu else "torch",
            self._config,
            weights,
            context=self._context,
            n_blocks=self._parallel * -(-self._context // KV_BLOCK),
            kv="f32",
            device=self._device,
            dtype="float32" if on_cpu else self._dtype,
        )
        tokenizer = self._tokenizer
        return executor, Engine(
            executor, end_tokens=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size, max_running=self._parallel
        )

    def _close_own(self) -> None:
        if self._own is not None:
            _close(self._own)
            self._own = None


def lora_pairs(config: ModelConfig, lora: LoraSettings, weights: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """By the name of the weight that they change. weights: by the names of the network's parameters."""
    return {
        name: LowRank(
            a=weights[name + A],
            b=weights[name + B],
            scale=lora.scale,
            magnitude=weights[name + MAGNITUDE].float32() if lora.dora else None,
        )
        for name in lora.chosen(config)
    }


def _close(opened: tuple[Executor, Engine]) -> None:
    executor, engine = opened
    engine.close()
    executor.close()
