"""`summarize`: what a model on disk is, from its header and its small files; no weight is read.

Works on models that we cannot run too, so it looks at the foreign keys itself instead of translating the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapji.errors import TokenizerError
from dapji.tokenizer import Tokenizer
from dapji.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Summary:
    """None: the files do not say."""

    name: str
    architecture: str | None
    parameters: int
    size: int
    """Bytes of all tensors."""
    formats: Mapping[str, int]
    """Bytes of tensors of each type, largest first."""
    sizes: Mapping[str, int]
    """Layers, dim, heads … as far as the files say, by our names."""
    context: int | None
    rope: Mapping[str, Any]
    """theta, and scaling where there is one, as the files write it."""
    tokenizer: str | None
    """Its kind; None: there is none."""
    tokenizer_problem: str | None
    """Why we cannot use it."""
    stop_tokens: Mapping[str, int]
    """Spelling -> id."""
    templates: Mapping[str, str]
    """Chat templates by name."""
    licence: str | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / self.parameters


_GGUF_SIZES = {
    "n_layers": "block_count",
    "dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "window": "attention.sliding_window",
    "n_experts": "expert_count",
    "n_experts_per_token": "expert_used_count",
}
_HF_SIZES = {
    "n_layers": "num_hidden_layers",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "sliding_window",
    "n_experts": "num_local_experts",
    "n_experts_per_token": "num_experts_per_tok",
}


def summarize(checkpoint: Checkpoint) -> Summary:
    """Raises nothing beyond what opening the checkpoint raised; a tokenizer that we cannot use is described as such."""
    metadata = checkpoint.metadata
    gguf = checkpoint.kind == "gguf"
    architecture = _string(metadata, "general.architecture" if gguf else "model_type")
    prefix, sizes = (f"{architecture}.", _GGUF_SIZES) if gguf else ("", _HF_SIZES)
    tokenizer, kind, problem = _tokenizer(checkpoint)
    context = metadata.get(prefix + ("context_length" if gguf else "max_position_embeddings"))
    return Summary(
        name=_string(metadata, "general.name") or checkpoint.path.resolve().name,
        architecture=architecture,
        parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.stored.values()),
        size=checkpoint.nbytes,
        formats=checkpoint.formats,
        sizes={ours: value for ours, key in sizes.items() if isinstance(value := metadata.get(prefix + key), int)}
        | ({} if tokenizer is None else {"vocab_size": tokenizer.vocab_size}),
        context=context if isinstance(context, int) else None,
        rope=_gguf_rope(checkpoint, prefix) if gguf else _hf_rope(metadata),
        tokenizer=kind,
        tokenizer_problem=problem,
        stop_tokens={}
        if tokenizer is None
        else {tokenizer.token_bytes(i).decode("utf-8", "replace"): i for i in sorted(tokenizer.stop_ids)},
        templates={} if tokenizer is None else tokenizer.chat_templates,
        licence=licence_of(checkpoint),
    )


def _string(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer | None, str | None, str | None]:
    """The tokenizer, its kind, and why there is none of ours."""
    try:
        if checkpoint.kind == "huggingface":
            if not (checkpoint.path / "tokenizer.json").exists():
                return None, None, None
            return Tokenizer.from_folder(checkpoint.path), "tokenizer.json", None
        keys = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
        names = [name for key in keys if (name := _string(checkpoint.metadata, key))]
        if not names:
            return None, None, None
        return Tokenizer.from_gguf(checkpoint.metadata), " / ".join(names), None
    except TokenizerError as error:
        return None, "unsupported", error.message


def _gguf_rope(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    metadata, rope = checkpoint.metadata, {}
    if (theta := metadata.get(f"{prefix}rope.freq_base")) is not None:
        rope["theta"] = theta
    start = f"{prefix}rope.scaling."
    if scaling := {key.removeprefix(start): metadata[key] for key in metadata if key.startswith(start)}:
        rope["scaling"] = scaling
    elif "rope_freqs.weight" in checkpoint.tensors:
        rope["scaling"] = {"type": "frequency factors (llama3 or longrope)"}
    return rope


def _hf_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = {key: value for key, value in written.items() if key != "rope_theta"} if isinstance(written, dict) else {}
    rope = {}
    theta = config.get("rope_theta", written.get("rope_theta") if isinstance(written, dict) else None)
    if theta is not None:
        rope["theta"] = theta
    if scaling and scaling != {"rope_type": "default"}:
        rope["scaling"] = scaling
    return rope


def licence_of(checkpoint: Checkpoint) -> str | None:
    """As a GGUF file's header or a folder's README.md names it."""
    if checkpoint.kind == "gguf":
        return _string(checkpoint.metadata, "general.license")
    return folder_licence(checkpoint.path)


def folder_licence(folder: Path) -> str | None:
    """The licence in the front matter of the folder's README.md, the form of the hub."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            front = re.match(r"---\n(.*?)\n---\n", file.read(1 << 16), re.DOTALL)
    except OSError:
        return None
    licence = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return licence[1] if licence else None
