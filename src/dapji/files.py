"""`open_files()` and `Files`: what a model's files say, translated; everything but an executor.

Sits above what reads files and below what runs them. Maps weights and reads none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapji.engine import Sampling
from dapji.errors import ConfigError, RequestError, TokenizerError
from dapji.models import families
from dapji.models.adapter import Adapter
from dapji.models.config import ModelConfig
from dapji.ops.tensor import Tensor
from dapji.tokenizer import Tokenizer
from dapji.weights import store
from dapji.weights.checkpoint import Checkpoint, open_checkpoint
from dapji.weights.embedding import EmbeddingConfig, RankHead, embedding_config, rank_head

DEFAULT_CONTEXT = 8192
"""Tokens, or the model's own limit where that is shorter: keeps the cache of a small model in tens of MB."""

CHAT_SAMPLING: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.9}
"""For models whose files do not say how to draw."""

_PENALTY = "repetition_penalty"
_GENERATION_KEYS = ("temperature", "top_k", "top_p", "min_p", "typical_p", _PENALTY)
"""Of generation_config.json."""
_GGUF_KEYS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": _PENALTY}
"""Of GGUF's general.sampling.*."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Files:
    """A model's files, translated: everything but an executor."""

    checkpoint: Checkpoint
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """By canonical name."""

    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError, also where it has more tokens than the weights."""
        if self.checkpoint.kind == "gguf":
            tokenizer = Tokenizer.from_gguf(self.checkpoint.metadata)
        else:
            tokenizer = Tokenizer.from_folder(self.checkpoint.path)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's weights only {self.config.vocab_size}"
            )
        return tokenizer

    def embedding(self) -> EmbeddingConfig:
        """How a text becomes one vector. Raises ConfigError where that is not supported, FormatError, ModelNotFound."""
        return embedding_config(self.checkpoint, self.config.dim)

    def rank_head(self) -> RankHead | None:
        """What makes a score of a query and a document; None where the model was not made for that. Raises
        ConfigError."""
        return rank_head(self.checkpoint)

    def sampling(self) -> dict[str, Any]:
        """Fields of `Sampling` that the model's makers recommend, else CHAT_SAMPLING. Raises ConfigError."""
        generation = self.checkpoint.generation
        found = {key: generation[key] for key in _GENERATION_KEYS if generation.get(key) is not None}
        for key, name in _GGUF_KEYS.items():
            value = self.checkpoint.metadata.get(f"general.sampling.{key}")
            if value is not None:
                found[name] = round(value, 6) if isinstance(value, float) else value  # a float32 is not quite 0.7
        if isinstance(found.get("top_k"), int):
            found["top_k"] = max(0, found["top_k"])  # some write -1 for all
        if generation.get("do_sample") is False:
            found = {name: value for name, value in found.items() if name == _PENALTY} | {"temperature": 0.0}
        elif found.keys() <= {_PENALTY}:
            found |= CHAT_SAMPLING
        try:
            Sampling(**found)
        except RequestError as error:
            raise ConfigError(f"{self.checkpoint.path}: default sampling: {error.message}") from error
        return found

    def adapter(self, path: Path) -> Adapter:
        """PEFT's folder or a GGUF file. Raises ModelNotFound, FormatError, and ConfigError where it does not fit."""
        from dapji.weights.adapter_file import open_adapter  # few models have one

        config_json = self.checkpoint.metadata if self.checkpoint.kind == "huggingface" else None
        return open_adapter(path, self.config, config_json)


def open_files(name_or_path: str | Path) -> Files:
    """Open a model of the store, a GGUF file or a folder. Maps the weights, reads none of them.

    Raises ModelNotFound, FormatError or ConfigError.
    """
    checkpoint = open_checkpoint(store.resolve(name_or_path))
    translate = families.from_gguf if checkpoint.kind == "gguf" else families.from_hf
    config, tensors = translate(checkpoint.metadata, checkpoint.tensors)
    return Files(checkpoint=checkpoint, config=config, tensors=tensors)


def default_context(config: ModelConfig) -> int:
    """Tokens of the longest conversation, where nobody says how long."""
    return min(config.max_context, DEFAULT_CONTEXT)
