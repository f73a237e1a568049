"""A tiny model that learns, with a tokenizer and a chat template, and examples for it; quick on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from dapji.files import open_files
from dapji.models import families
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, weight_shapes
from dapji.models.torch_executor import load_weights
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Tensor
from dapji.training.data.stream import Window
from dapji.training.network import Network
from dapji.training.settings import LoraSettings
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from tiny import CHATML, CONTROL, alphabet


def config(*, tied_head: bool = True, window: int | None = None) -> ModelConfig:
    attention = AttentionConfig(
        n_heads=4, n_kv_heads=2, head_dim=8, rope=RopeConfig(dim=8, theta=10000.0), window=window
    )
    layer = LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=48))
    return ModelConfig(
        family="llama", dim=32, vocab_size=len(CONTROL) + 256, max_context=512, norm_eps=1e-5, layers=(layer, layer),
        tied_head=tied_head,
    )  # fmt: skip


def weights(of: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: (1 if name.endswith("norm") else 0) + random.standard_normal(shape, dtype=np.float32) / 6
        for name, shape in weight_shapes(of).items()
    }


def network(of: ModelConfig, *, lora: LoraSettings | None = None, recompute: bool = False, seed: int = 0) -> Network:
    values = {name: torch.tensor(value) for name, value in weights(of, seed).items()}
    return Network(of, values, context=512, lora=lora, recompute=recompute)


def write_model(path: Path, *, seed: int = 0) -> Path:
    of = config()
    tensors = {name: Tensor.from_float32(name, value) for name, value in weights(of, seed).items()}
    metadata, named = families.to_gguf(of, tensors)
    metadata |= {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*CONTROL, *alphabet()],
        "tokenizer.ggml.token_type": np.array([3] * len(CONTROL) + [1] * 256, dtype=np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    write_gguf(path, metadata, [TensorToWrite.of(name, tensor) for name, tensor in named.items()])
    return path


def opened(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    files = open_files(str(path))
    return files.config, load_weights(files.tensors, device=torch.device("cpu"), dtype=torch.float32)


def write_examples(path: Path, n: int = 24, *, first: int = 0) -> Path:
    """Sums, one digit each."""
    rows = [
        {"instruction": f"{i % 10}+{i // 10 % 10}?", "input": "", "output": str(i % 10 + i // 10 % 10) * (1 + i % 3)}
        for i in range(first, first + n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path, n: int = 16, *, first: int = 0) -> Path:
    """Small letters are better than large ones."""
    words = [(i, "abcdefgh"[i % 8] * 3) for i in range(first, first + n)]
    rows = [{"prompt": f"{i}?", "chosen": word, "rejected": word.upper()} for i, word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rated(path: Path, n: int = 16, *, first: int = 0) -> Path:
    """Small letters are good and large ones are not."""
    words = [(i, "abcdefgh"[i % 8] * 3) for i in range(first, first + n)]
    rows = [
        {"prompt": f"{i}?", "completion": word if i % 2 else word.upper(), "label": bool(i % 2)} for i, word in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, *tables: str, name: str = "run", window: int = 128) -> Path:
    """A recipe for these; its output is folder / name."""
    if not (folder / "tiny.gguf").exists():
        write_model(folder / "tiny.gguf")
        write_examples(folder / "train.jsonl")
        write_examples(folder / "held-out.jsonl", 8, first=40)
    path = folder / f"{name}.toml"
    path.write_text(
        f'model = "{folder}/tiny.gguf"\noutput = "{folder}/{name}"\n[data]\ntrain = ["{folder}/train.jsonl"]\n'
        f'evaluate = ["{folder}/held-out.jsonl"]\nwindow = {window}\n' + "\n".join(tables)
    )
    return path


def window(lengths: list[int], *, seed: int = 0, prompt: int = 3) -> Window:
    """Sequences of random tokens, the first few of each not learned."""
    random = np.random.default_rng(seed)
    tokens = random.integers(len(CONTROL), len(CONTROL) + 256, sum(lengths))
    prompts = [min(prompt, length - 1) for length in lengths]
    return packed([part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])], prompts)


def packed(sequences: list[list[int]], prompts: list[int]) -> Window:
    """Sequences, of each the first so many tokens not learned."""
    learned = [np.arange(len(sequence)) >= n for sequence, n in zip(sequences, prompts, strict=True)]
    return Window(
        tokens=np.concatenate(sequences).astype(np.int32),
        learned=np.concatenate(learned),
        starts=np.cumsum([0, *map(len, sequences)], dtype=np.int32),
        samples=np.arange(len(sequences)),
        good=np.full(len(sequences), -1, dtype=np.int8),
    )


def alone(window: Window) -> list[Window]:
    """Each sequence in a window of its own."""
    return [
        Window(
            tokens=window.tokens[a:b],
            learned=window.learned[a:b],
            starts=np.array([0, b - a], dtype=np.int32),
            samples=window.samples[i : i + 1],
            good=window.good[i : i + 1],
        )
        for i, (a, b) in enumerate(zip(window.starts[:-1], window.starts[1:], strict=True))
    ]
