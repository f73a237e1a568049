"""`write_new`: a model that has learned nothing yet, in a folder like any other, for `tune` to train from scratch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapji.errors import ConfigError
from dapji.files import Files, open_files
from dapji.models import families
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, weight_shapes
from dapji.ops.formats import FORMATS
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Bytes, Tensor
from dapji.proof.certificate import write_proof
from dapji.proof.lineage import Lineage, data_file, parent, versions
from dapji.tokenizer.train import train
from dapji.training.data.reading import texts_of
from dapji.weights.convert import MAX_SHARD_BYTES
from dapji.weights.files import TensorToWrite, new_folder
from dapji.weights.safetensors import write_shards
from dapji.weights.sources_base import sha256_file
from dapji.weights.vocabulary import gguf_metadata, huggingface_files

DEFAULT_VOCAB_SIZE = 4096
HEAD_DIM = 64
DEVIATION = 0.02
"""Of weights at the beginning."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a Llama (Touvron et al. 2023). The number of layers decides what is None."""

    layers: int
    dim: int | None = None
    """None: HEAD_DIM for each layer, so that width grows with depth."""
    heads: int | None = None
    """None: as many of HEAD_DIM as dim holds."""
    kv_heads: int | None = None
    """None: as many as heads."""
    hidden_dim: int | None = None
    """None: 8/3 of dim, up to a multiple of HEAD_DIM: about as many weights as 4 dim had without a gate."""
    context: int = 1024

    def config(self, vocab_size: int) -> ModelConfig:
        """Raises ConfigError where the sizes do not fit together."""
        dim = self.dim or HEAD_DIM * self.layers
        heads = self.heads or max(1, dim // HEAD_DIM)
        if dim % heads or dim // heads % 2:
            raise ConfigError(f"dim ({dim}) must be an even number for each of {heads} heads")
        head_dim = dim // heads
        attention = AttentionConfig(
            n_heads=heads,
            n_kv_heads=self.kv_heads or heads,
            head_dim=head_dim,
            rope=RopeConfig(dim=head_dim, theta=10000.0),
        )
        hidden = self.hidden_dim or HEAD_DIM * math.ceil(dim * 8 / 3 / HEAD_DIM)
        layer = LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=hidden))
        return ModelConfig(
            family="llama",
            dim=dim,
            vocab_size=vocab_size,
            max_context=self.context,
            norm_eps=1e-5,
            layers=(layer,) * self.layers,
            tied_head=True,
        )


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """By canonical name, each made when it is asked for, float32.

    As GPT-2 begins (Radford et al. 2019): normal with a standard deviation of DEVIATION; of what is added to the
    residual stream, twice a layer, 1 / sqrt(2 layers) of that, so that it does not grow with depth. Norms are 1.
    """
    residual = DEVIATION / math.sqrt(2 * config.n_layers)

    def made(name: str, number: int, shape: tuple[int, ...]) -> Tensor:
        deviation = residual if name.endswith((".o", ".down")) else DEVIATION

        def values() -> Bytes:
            if len(shape) == 1:
                return np.ones((1, *shape), dtype=np.float32).view(np.uint8)
            drawn = np.random.default_rng([seed, number]).standard_normal(shape, dtype=np.float32)
            return (drawn * np.float32(deviation)).view(np.uint8)

        return Tensor(name=name, format=FORMATS["F32"], shape=shape, source=values)

    return {name: made(name, number, shape) for number, (name, shape) in enumerate(weight_shapes(config).items())}


def write_new(
    folder: Path,
    sizes: Sizes,
    *,
    seed: int = 0,
    texts: Sequence[Path] = (),
    separator: str | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    tokenizer: str | None = None,
    bars: bool = False,
) -> ModelConfig:
    """Write a new folder in the layout that transformers loads, and the lineage; gives what the model is.

    The tokenizer is trained on `texts` (files as `data.reading.texts_of` takes them, with `separator`) and has
    `vocab_size` tokens; or it is that of the model `tokenizer`. bars: as `train`.
    Raises UsageError where there is such a folder or the texts are too short, ConfigError where sizes do not fit,
    TokenizerError where another model's tokenizer has no form in GGUF, and what reading raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as made:
        if tokenizer is None:
            config = sizes.config(vocab_size)
            metadata: Mapping[str, Any] = train(texts_of(texts, separator=separator), vocab_size, bars=bars)
        else:
            files = open_files(tokenizer)
            config, metadata = sizes.config(files.config.vocab_size), _tokenizer_metadata(files)
        config_json, tensors = families.to_hf(config, initial_weights(config, seed))
        written = [TensorToWrite.of(name, tensor) for name, tensor in tensors.items()]
        write_shards(made, written, max_bytes=MAX_SHARD_BYTES)
        ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        config_json |= {key: value for key, value in ids.items() if value is not None}
        contents = huggingface_files(metadata) | {"config.json": {**config_json, "dtype": "float32"}}
        for name, content in contents.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (made / name).write_text(text + "\n", encoding="utf-8")
        lineage = Lineage(
            kind="new",
            parents=() if tokenizer is None else (parent("tokenizer", tokenizer),),
            data=tuple(data_file("train", str(path), sha256_file(path)) for path in texts),
            settings={**asdict(sizes), "seed": seed, "separator": separator},
            versions=versions("numpy", "tokenizers"),
        )
        write_proof(made, lineage)
    return config


def _tokenizer_metadata(files: Files) -> Mapping[str, Any]:
    """As GGUF has it."""
    checkpoint = files.checkpoint
    if checkpoint.kind == "gguf":
        return checkpoint.metadata
    return gguf_metadata(checkpoint.path, n_tokens=files.config.vocab_size)
