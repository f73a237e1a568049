"""Tiny random models of every generation, made by transformers: the independent implementation of each mechanism.

Small in size alone: every mechanism of the published models is there, with thresholds low enough that a text of
TEXT tokens is far beyond them. Weights are drawn so that no part is neutral (transformers starts biases at zero, norms
at one).
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tiny_dense
import tiny_experts
import tiny_latent
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dapji.models import families
from dapji.models.config import ModelConfig
from dapji.models.executor import Executor, open_executor
from dapji.models.torch_executor import load_weights, sequence_logits
from dapji.ops.batch import Batch
from dapji.ops.tensor import Tensor
from dapji.ops.torch import TorchTables
from dapji.weights.checkpoint import open_checkpoint

transformers.utils.logging.disable_progress_bar()

TEXT = 256
"""Tokens of the common text; the scalings start at ORIGINAL."""
ORIGINAL = 32
WINDOW = 24
TOLERANCE = 1e-4
"""Absolute, on logits up to 5 (4e-5 is what occurs): the order of float32 sums, no more."""
VOCAB = 96

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
"""Where torch can compute."""
EXECUTORS = ["reference", "native", *(f"torch-{device}" for device in DEVICES)]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
_LLAMA, _MISTRAL, _QWEN2 = transformers.LlamaConfig, transformers.MistralConfig, transformers.Qwen2Config


def _rope(kind: str, theta: float = 10_000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


def _llama3(factor: float) -> dict[str, Any]:
    return _rope(
        "llama3",
        500_000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=ORIGINAL,
    )


def _yarn(**values: Any) -> dict[str, Any]:
    return _rope("yarn", **{"factor": 8.0, "original_max_position_embeddings": ORIGINAL, **values})


TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "llama-1": (_LLAMA, {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "llama-2": (_LLAMA, {}),
    "llama-3": (_LLAMA, _rope("default", 500_000.0)),
    "llama-3.1": (_LLAMA, _llama3(8.0)),
    "llama-3.2": (_LLAMA, {**_llama3(32.0), "tie_word_embeddings": True}),
    "smollm2": (
        _LLAMA,
        {
            **_rope("default", 100_000.0),
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_size": 72,
            "tie_word_embeddings": True,
        },
    ),
    "llama-head-dim": (_LLAMA, {"head_dim": 24}),
    "llama-bias": (_LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": (_LLAMA, {"hidden_act": "gelu"}),
    "llama-linear": (_LLAMA, _rope("linear", factor=4.0)),
    "llama-dynamic": (_LLAMA, {**_rope("dynamic", factor=8.0), "max_position_embeddings": ORIGINAL}),
    "llama-yarn": (_LLAMA, _yarn()),
    "llama-yarn-attention-factor": (_LLAMA, _yarn(attention_factor=0.7, beta_fast=16.0, beta_slow=2.0)),
    "llama-yarn-mscale": (_LLAMA, _yarn(mscale=1.0, mscale_all_dim=0.5, truncate=False)),
    "mistral": (_MISTRAL, {"sliding_window": WINDOW}),
    "mistral-nemo": (_MISTRAL, {**_rope("default", 1_000_000.0), "sliding_window": None, "head_dim": 24}),
    "qwen2": (_QWEN2, {**_rope("default", 1_000_000.0), "tie_word_embeddings": True}),
    "qwen2-window": (_QWEN2, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2-yarn": (_QWEN2, _yarn(factor=4.0)),
    "smollm3": (
        transformers.SmolLM3Config,
        {"num_hidden_layers": 5, "tie_word_embeddings": True, "pad_token_id": None},
    ),
    **tiny_experts.TINY,
    **tiny_latent.TINY,
    **tiny_dense.TINY,
}

CASES = [(name, kind) for name in TINY for kind in EXECUTORS]
"""Every model on every executor."""
_NAMES = (
    *("llama-3.1", "mistral", "qwen2-window", "qwen3", "qwen3-moe", "mixtral-window", "llama-4"),
    *("deepseek-v2", "deepseek-v3", "kimi-k2"),
    *("exaone4-hybrid", "gemma2", "gemma3", "phi3-longrope"),
)
DISTINCT = [case for case in CASES if case[0] in _NAMES]
"""Of CASES, a model of each mechanism that caches, batches or positions could disturb."""


@cache
def oracle(name: str) -> transformers.PreTrainedModel:
    config_class, values = TINY[name]
    config = config_class(**{**_SIZES, **values})
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    norm = 0.0 if "gemma" in config.model_type else 1.0  # what Gemma multiplies by is 1 + weight
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(norm if "norm" in parameter_name else 0.0, 0.15)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.15)
    return model


@cache
def saved(name: str) -> dict[str, NDArray[np.float32]]:
    """The tensors of the folder that transformers writes."""
    with TemporaryDirectory() as folder:
        oracle(name).save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


@cache
def translated(name: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same model as `families` reads it from the folder that transformers writes."""
    return read(oracle(name))


@cache
def oracle_gradients(name: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of LOSS_TEXTS and its gradients, which transformers writes and `families` reads as if they were the
    weights: no layout changes a value."""
    model = deepcopy(oracle(name))
    model.get_input_embeddings().padding_idx = None  # no token here is padding, whose row would get no gradient
    tokens = torch.tensor(LOSS_TEXTS)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    for parameter in model.parameters():  # an expert that no token went to has none
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return loss.item(), read(model)[1]


def gradients(name: str, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Ours of the same; a weight through which none flows has none."""
    config, tensors = translated(name)
    weights = load_weights(tensors, device=device, dtype=torch.float32)
    for weight in weights.values():
        weight.requires_grad_()
    tokens = torch.tensor(LOSS_TEXTS)
    got = sequence_logits(config, weights, tokens.to(device), TorchTables(tokens.shape[1], device)).cpu()
    loss = torch.nn.functional.cross_entropy(got[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    loss.backward()
    return loss.item(), {key: weight.grad.cpu() for key, weight in weights.items() if weight.grad is not None}


def read(model: transformers.PreTrainedModel) -> tuple[ModelConfig, dict[str, Tensor]]:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = open_checkpoint(Path(folder))
        config, tensors = families.from_hf(checkpoint.metadata, checkpoint.tensors)
        # copied: the folder goes away
        copies = {key: Tensor.from_float32(tensor.name, tensor.float32().copy()) for key, tensor in tensors.items()}
    return config, copies


def opened(name: str, config: ModelConfig, tensors: dict[str, Tensor], **options: Any) -> Executor:
    """One of EXECUTORS."""
    kind, _, device = name.partition("-")
    return open_executor(kind, config, tensors, device=device or "cpu", **options)  # type: ignore[arg-type]


def logits(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    length: int = TEXT,
    *,
    kind: str = "reference",
    context: int | None = None,
) -> NDArray[np.float32]:
    """[length, VOCAB] of `text(length)` in one step of one of EXECUTORS."""
    executor = opened(kind, config, tensors, context=context or length, kv="f32")
    return executor.step(Batch.single(text(length)))


def text(length: int = TEXT, seed: int = 5) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
    return ids


LOSS_TEXTS = [text(128), text(128, seed=6)]


@cache
def oracle_logits(name: str, length: int = TEXT, dtype: torch.dtype = torch.float32) -> NDArray[np.float32]:
    """[length, VOCAB] of `text(length)` in one pass, with parameters of `dtype`."""
    model = deepcopy(oracle(name))  # dynamic scaling there remembers the longest text so far
    model.config._experts_implementation = "eager"  # others want rows of whole 16 bytes
    for parameter in model.parameters():  # not buffers, which stay float32 in published models too
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([text(length)]), use_cache=False).logits[0].float().numpy()
    return logits
