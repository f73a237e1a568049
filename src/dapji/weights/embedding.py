"""How a model's files say that a text becomes one vector, or a query and a document one score.

A folder says it in the files of sentence-transformers (modules.json, the Pooling module's config.json), a GGUF file by
`{architecture}.pooling_type` (gguf-py's PoolingType) and, where it ranks, by a head of its own, `cls.output`. What they
name and we do not have is a ConfigError: another vector would be of no use, and look like one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError
from dapji.models.config import Pooling
from dapji.models.families import RANK_HEAD
from dapji.weights.checkpoint import Checkpoint, read_json
from dapji.weights.files import map_file
from dapji.weights.safetensors import decode_json

_GGUF_POOLINGS = ("none", "mean", "cls", "last", "rank")
"""By number. `none` says nothing of how several vectors become one."""
_POOLINGS: Mapping[str, Pooling] = {"mean": "mean", "last": "last", "lasttoken": "last"}
_MODES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Of a Pooling module's config.json, where each is true or false; newer ones name theirs as `pooling_mode`."""
MATRYOSHKA = ("is_matryoshka", "matryoshka_dimensions")
"""Keys of config.json, in the words that vLLM reads."""
_PLACE = re.compile(r"\w*", re.ASCII)
_LABELS = ("yes", "no")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    pooling: Pooling
    declared: bool
    """Whether the files say so. Models made to answer say nothing; of them it is the mean."""
    dimensions: Sequence[int]
    """To which vectors may be cut, since they were trained for it (Kusupati et al. 2022, Matryoshka); often none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankHead:
    """What makes a score of the last hidden state: the probability of the first of two labels, yes and no."""

    weight: NDArray[np.float32]
    """[2, D]"""


def gguf_metadata(checkpoint: Checkpoint, architecture: str) -> dict[str, int]:
    """Of a folder, what a GGUF file says of it; GGUF has no word for Matryoshka. Raises ConfigError."""
    pooling = _of_folder(checkpoint.path)
    return {} if pooling is None else {f"{architecture}.pooling_type": _GGUF_POOLINGS.index(pooling)}


def folder_files(checkpoint: Checkpoint, *, dim: int) -> dict[str, object]:
    """Of a GGUF file, what a folder says of it: JSON by name. Raises ConfigError."""
    if _gguf_pooling(checkpoint) == "rank":
        raise ConfigError(f"{checkpoint.path}: a folder has no form for a head that ranks documents")
    pooling = _of_gguf(checkpoint)
    if pooling is None:
        return {}
    mode = next(key for key, name in _MODES.items() if _POOLINGS.get(name) == pooling)
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules.items())
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": dim, mode: True},
    }


class _Module(msgspec.Struct):
    type: str
    path: str = ""


def embedding_config(checkpoint: Checkpoint, dim: int) -> EmbeddingConfig:
    """Of a model whose hidden states have `dim` values. Raises ConfigError, FormatError."""
    declared = _of_gguf(checkpoint) if checkpoint.kind == "gguf" else _of_folder(checkpoint.path)
    return EmbeddingConfig(
        pooling="mean" if declared is None else declared,
        declared=declared is not None,
        dimensions=_dimensions(checkpoint, dim),
    )


def rank_head(checkpoint: Checkpoint) -> RankHead | None:
    """None where the model has none. Raises ConfigError."""
    if checkpoint.kind != "gguf" or _gguf_pooling(checkpoint) != "rank":
        return None
    labels = checkpoint.metadata.get(f"{checkpoint.metadata['general.architecture']}.classifier.output_labels")
    if not isinstance(labels, list) or labels != list(_LABELS):
        raise ConfigError(f"{checkpoint.path}: a head that ranks by the labels {labels!r}; known is {list(_LABELS)}")
    if RANK_HEAD not in checkpoint.tensors:
        raise ConfigError(f"{checkpoint.path}: pooling_type is rank, but there is no {RANK_HEAD}")
    weight = checkpoint.tensors[RANK_HEAD]
    if len(weight.shape) != 2 or weight.shape[0] != len(_LABELS):
        raise ConfigError(f"{checkpoint.path}: {RANK_HEAD} is {list(weight.shape)} for {len(_LABELS)} labels")
    return RankHead(weight=weight.float32())


def _gguf_pooling(checkpoint: Checkpoint) -> str:
    key = f"{checkpoint.metadata['general.architecture']}.pooling_type"
    value = checkpoint.metadata.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(_GGUF_POOLINGS):
        raise ConfigError(f"{checkpoint.path}: {key} must be 0 to {len(_GGUF_POOLINGS) - 1}, not {value!r}")
    return _GGUF_POOLINGS[value]


def _of_gguf(checkpoint: Checkpoint) -> Pooling | None:
    name = _gguf_pooling(checkpoint)
    if name == "rank":
        raise ConfigError(f"{checkpoint.path}: the model ranks documents and gives no embeddings", hint="use rerank")
    return None if name == "none" else _known(name, checkpoint.path)


def _of_folder(path: Path) -> Pooling | None:
    listed = path / "modules.json"
    if not listed.exists():
        return None
    pooling: Pooling | None = None
    for module in decode_json(map_file(listed), list[_Module], str(listed)):
        kind = module.type.rpartition(".")[2]
        if not _PLACE.fullmatch(module.path):
            raise ConfigError(f"{listed}: the path {module.path!r} is none of a module's folder")
        if kind == "Pooling":
            pooling = _of_module(path / module.path / "config.json")
        elif kind not in ("Transformer", "Normalize"):  # every vector is made of length 1
            raise ConfigError(f"{listed}: the module {kind} is not supported")
    if pooling is None:
        raise ConfigError(f"{listed}: no module Pooling")
    _check_texts(path)
    return pooling


def _of_module(path: Path) -> Pooling:
    config = read_json(path)
    if not config.get("include_prompt", True):
        raise ConfigError(f"{path}: include_prompt = False is not supported")
    modes = [name for key, name in _MODES.items() if config.get(key)]
    if named := config.get("pooling_mode"):
        modes = named if isinstance(named, list) else [named]
    if len(modes) != 1:
        raise ConfigError(f"{path}: one way of pooling is supported, not {', '.join(map(str, modes)) or 'none'}")
    return _known(modes[0], path)


def _known(name: Any, path: Path) -> Pooling:
    if not isinstance(name, str) or name not in _POOLINGS:
        hint = "a model that reads from left to right knows nothing yet at its first token" if name == "cls" else None
        raise ConfigError(f"{path}: pooling by {name!r} is not supported, only by mean and last token", hint=hint)
    return _POOLINGS[name]


def _check_texts(path: Path) -> None:
    """What sentence-transformers would do with a text before it reads it."""
    for name, key in (
        ("config_sentence_transformers.json", "default_prompt_name"),
        ("sentence_bert_config.json", "do_lower_case"),
    ):
        if (path / name).exists() and (value := read_json(path / name).get(key)):
            raise ConfigError(f"{path / name}: {key} = {value!r} is not supported")


def _dimensions(checkpoint: Checkpoint, dim: int) -> Sequence[int]:
    listed = checkpoint.metadata.get(MATRYOSHKA[1]) if checkpoint.kind == "huggingface" else None
    if listed is None:
        matryoshka = checkpoint.kind == "huggingface" and checkpoint.metadata.get(MATRYOSHKA[0]) is True
        return range(1, dim + 1) if matryoshka else ()
    if not isinstance(listed, list) or not all(isinstance(n, int) and 1 <= n <= dim for n in listed):
        raise ConfigError(f"{checkpoint.path}: matryoshka_dimensions must hold numbers from 1 to {dim}, not {listed!r}")
    return sorted(listed)
