"""Random weights in a model's true shape: as fast, or as slow, as the model itself, and made without it.

    python benchmarks/random_model.py build/llama-3.1-8b-random.gguf      4.9 GB, quantised as Q4_K_M
    python benchmarks/random_model.py build/experts.gguf --config config.json --layers 4 --vocabulary 4096

Models larger than the machine may be cut: a few of their layers tell what all of them take, since layers are alike. Of
each format one sample of normal numbers is quantised; the matrices are random picks of its blocks. So codes and scales
are those of a real matrix, and no more memory is needed than for one matrix.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dapji.models import families
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, weight_shapes
from dapji.ops.formats import FORMATS, Bytes, Format
from dapji.ops.rope import RopeConfig, RopeScaling
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from dapji.weights.quantize import quantize
from dapji.weights.schemes import SCHEMES, choose_formats

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from tiny import alphabet  # noqa: E402

SAMPLE = 1 << 20
"""Values quantised of each format."""
PIECE = 1 << 14
"""Blocks picked at a time."""


def llama_8b(n_layers: int = 32, vocab_size: int = 128256) -> ModelConfig:
    """The shape of Llama 3.1 8B."""
    scaling = RopeScaling(
        kind="llama3", factor=8.0, original_context=8192, low_frequency_factor=1.0, high_frequency_factor=4.0
    )
    layer = LayerConfig(
        attention=AttentionConfig(
            n_heads=32, n_kv_heads=8, head_dim=128, rope=RopeConfig(dim=128, theta=500000.0, scaling=scaling)
        ),
        feed_forward=FeedForwardConfig(hidden_dim=14336),
    )
    return ModelConfig(
        family="llama",
        dim=4096,
        vocab_size=vocab_size,
        max_context=131072,
        norm_eps=1e-5,
        layers=(layer,) * n_layers,
        tied_head=False,
    )


def cut(config_json: Path, n_layers: int | None, vocab_size: int | None) -> ModelConfig:
    """The first layers of a model of Hugging Face, with a smaller vocabulary; None: all."""
    config = families.config_from_hf(json.loads(config_json.read_text()))
    return replace(config, layers=config.layers[:n_layers], vocab_size=vocab_size or config.vocab_size, predictors=())


def write_random(path: Path, config: ModelConfig, scheme: str = "Q4_K_M", seed: int = 0) -> None:
    """Write the model as GGUF, with a vocabulary of single bytes and unused tokens. No BOS, no end."""
    empty = {name: _unfilled(name, shape) for name, shape in weight_shapes(config).items()}
    metadata, named = families.to_gguf(config, empty)
    formats = choose_formats(named, SCHEMES[scheme])
    rng = np.random.default_rng(seed)
    samples: dict[tuple[Format, int], Bytes] = {}

    def sample(format: Format, cols: int) -> Bytes:
        """Blocks [n, block_bytes] of values with the deviation that keeps a product's size."""
        if (format, cols) not in samples:
            values = rng.standard_normal((SAMPLE // format.block, format.block), dtype=np.float32) / np.sqrt(cols)
            samples[format, cols] = quantize(values, format)
        return samples[format, cols]

    def write(name: str) -> TensorToWrite:
        tensor, format = named[name], formats[name]
        if len(tensor.shape) == 1 or name.endswith("ffn_gate_inp.weight"):
            if name.endswith("norm.weight"):
                values = np.ones(tensor.shape, dtype=np.float32)
            elif len(tensor.shape) > 1:  # of a router: logits that tell experts apart
                values = rng.standard_normal(tensor.shape, dtype=np.float32) / np.float32(np.sqrt(tensor.cols))
            else:  # the factors of the rope
                values = tensor.float32()
            return TensorToWrite.of(name, Tensor.from_float32(name, values))

        def chunks() -> Iterator[Bytes]:
            blocks, count = sample(format, tensor.cols), tensor.rows * tensor.cols // format.block
            for start in range(0, count, PIECE):
                yield blocks[rng.integers(len(blocks), size=min(PIECE, count - start))]

        return TensorToWrite(name=name, format=format, shape=tensor.shape, chunks=chunks)

    tokens = [*alphabet(), *(f"<|unused_{i}|>" for i in range(config.vocab_size - 256))]
    metadata |= {
        "general.name": "random",
        "general.file_type": SCHEMES[scheme].file_type,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * 256 + [5] * (len(tokens) - 256), dtype=np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.add_bos_token": False,
    }
    write_gguf(path, metadata, [write(name) for name in named])


def _unfilled(name: str, shape: tuple[int, ...]) -> Tensor:
    """A shape without memory: one zero, repeated."""
    format = FORMATS["F32" if len(shape) == 1 or name.endswith("router") else "Q4_0"]  # any format
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    data = np.broadcast_to(np.zeros(1, dtype=np.uint8), (rows, format.row_bytes(shape[-1])))
    return Tensor(name=name, format=format, shape=shape, source=data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--config", type=Path, help="config.json of another model than Llama 3.1 8B")
    parser.add_argument("--layers", type=int, help="the first layers alone")
    parser.add_argument("--vocabulary", type=int, help="so many tokens")
    parser.add_argument("--type", choices=SCHEMES, default="Q4_K_M", help="of the weights")
    arguments = parser.parse_args()
    config = arguments.config
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    shape = llama_8b() if config is None else cut(config, arguments.layers, arguments.vocabulary)
    write_random(arguments.path, shape, arguments.type)


if __name__ == "__main__":
    main()
