"""Which families of models there are and how near each executor comes to transformers: the tables of docs/families.md.

    python benchmarks/families.py           measures the tiny models of tests/models, writes the tables
    python benchmarks/families.py --draw    the tables from the figures so far

Mechanisms are read off the configurations of a family's tiny models. Figures are the largest absolute difference from
transformers (for EXAONE 3 from vLLM) in float32: of any logit at any of 256 positions on our executors, of any token's
log probability after 22 prefixes in llama.cpp, which reads what we write; of the gradient, that of any weight in torch.
Wants the test dependencies.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import report
from dapji.models import families
from dapji.models.config import (
    AttentionConfig,
    ExpertsConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
)
from dapji.models.families import FAMILIES
from dapji.models.families.family import Family
from dapji.ops.batch import Batch
from dapji.ops.tensor import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "models")]
DATA = ROOT / "benchmarks" / "data" / "families.json"
DOCUMENT = ROOT / "docs" / "families.md"
HEADER = (
    "family",
    "models",
    "mechanisms beyond a plain decoder",
    "`config.json`",
    "GGUF",
    "reference",
    "torch",
    "native",
    "llama.cpp",
    "licence of the weights",
)
TINY_HEADER = ("model", "mechanisms", "reference", "torch", "native", "llama.cpp", "gradient (torch)")
KINDS = ("reference", "torch", "native")
Floats = NDArray[np.float64]


def measure(arguments: argparse.Namespace, results: dict[str, Any]) -> Iterator[None]:
    import tiny_exaone
    import torch
    from test_exaone import renamed
    from test_llama_cpp import LACKING, PREFIXES, UNSAYABLE, write
    from tiny_models import TINY, gradients, opened, oracle_gradients, oracle_logits, text, translated

    from llama_cpp import LlamaCpp

    results.clear()
    llama_cpp = LlamaCpp()

    def llama_cpp_reads(config: ModelConfig, tensors: dict[str, Tensor], prompts: list[list[int]]) -> Floats:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "model.gguf", config, tensors)
            return llama_cpp.log_probabilities(Path(folder) / "model.gguf", prompts, config.vocab_size)

    def keep(name: str, config: ModelConfig, differences: dict[str, float]) -> None:
        print(f"{name:32} {differences}", file=sys.stderr)
        rounded = {kind: float(f"{difference:.1e}") for kind, difference in differences.items()}
        results.setdefault(config.family, {})[name] = {"mechanisms": mechanisms(config), "difference": rounded}

    for name in TINY:
        config, tensors = translated(name)
        config = replace(config, family=family_of(name, config))
        theirs = oracle_logits(name).astype(np.float64)
        differences = {}
        for kind in KINDS:
            executor = opened(kind, config, tensors, context=len(text()), kv="f32")
            differences[kind] = float(np.abs(executor.step(Batch.single(text())) - theirs).max())
            executor.close()
        if name not in UNSAYABLE and name not in LACKING:
            read = llama_cpp_reads(config, tensors, [text()[:n] for n in PREFIXES])
            differences["llama.cpp"] = float(np.abs(read - log_softmax(theirs[[n - 1 for n in PREFIXES]])).max())
        own, wanted = gradients(name, torch.device("cpu"))[1], oracle_gradients(name)[1]
        differences["gradient"] = max(float(np.abs(own[key] - wanted[key].float32()).max()) for key in own)
        keep(name, config, differences)
        yield

    # transformers has no EXAONE 3, but a Llama that can take its names; vLLM has
    named = {name: Tensor.from_float32(name, values) for name, values in tiny_exaone.weights().items()}
    config, tensors = families.from_hf(tiny_exaone.CONFIG, named)
    theirs, tokens = np.load(tiny_exaone.LOG_PROBABILITIES), tiny_exaone.text()
    differences = {}
    for kind in KINDS:
        executor = opened(kind, config, tensors, context=len(tokens), kv="f32")
        rows = executor.step(Batch.single(tokens))[tiny_exaone.ROWS].astype(np.float64)
        differences[kind] = float(np.abs(log_softmax(rows) - theirs).max())
        executor.close()
    read = llama_cpp_reads(*families.from_hf(*renamed("llama-3.1")), [text()[:n] for n in PREFIXES])
    theirs = oracle_logits("llama-3.1")[[n - 1 for n in PREFIXES]].astype(np.float64)
    differences["llama.cpp"] = float(np.abs(read - log_softmax(theirs)).max())
    keep("exaone-3.5", config, differences)
    llama_cpp.close()
    yield


def family_of(name: str, config: ModelConfig) -> str:
    """Of a tiny model. transformers makes Kimi K2's by the class of DeepSeek V3."""
    return "kimi_k2" if name.startswith("kimi") else config.family


def log_softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    normalised: Floats = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normalised


def draw(results: dict[str, Any]) -> None:
    report.replace_section(DOCUMENT, "support", report.table(HEADER, rows(results)))
    report.replace_section(DOCUMENT, "tiny", report.table(TINY_HEADER, tiny_rows(results)))


def rows(results: dict[str, Any]) -> list[Sequence[str]]:
    lines = []
    for family in _by_name():
        models = results[family.name].values()
        differences = _differences(worst(models), (*KINDS, "llama.cpp"))
        mechanisms = _listed(word for model in models for word in model["mechanisms"])
        types = f"`{family.name}`" + (f", `{family.wrapper.model_type}`" if family.wrapper else "")
        gguf = f"`{family.gguf_architecture}`"
        lines.append(
            (types, family.models, mechanisms, "read, written", f"{gguf}: read, written", *differences, family.licence)
        )
    return lines


def tiny_rows(results: dict[str, Any]) -> list[Sequence[str]]:
    return [
        (
            f"`{name}`",
            _listed(model["mechanisms"]),
            *_differences(model["difference"], (*KINDS, "llama.cpp", "gradient")),
        )
        for family in _by_name()
        for name, model in results[family.name].items()
    ]


def worst(models: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The largest difference of each kind."""
    found: dict[str, float] = {}
    for model in models:
        found |= {kind: max(value, found.get(kind, 0.0)) for kind, value in model["difference"].items()}
    return found


def _by_name() -> list[Family]:
    return sorted(FAMILIES, key=lambda family: family.name)


def _differences(measured: Mapping[str, float], kinds: Iterable[str]) -> list[str]:
    return [f"{measured[kind]:.1e}" if kind in measured else "-" for kind in kinds]


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "none"


def mechanisms(config: ModelConfig) -> list[str]:
    """What a model has beyond a plain decoder, in words."""
    words = [word for layer in config.layers for word in _of_layer(layer)]
    attentions = [layer.attention for layer in config.layers]
    ropes = {attention.rope for attention in attentions}
    if None in ropes and len(ropes) > 1:
        words.append("layers without rope")
    if len(ropes - {None}) > 1:
        words.append("two ropes")
    if len({isinstance(layer.feed_forward, ExpertsConfig) for layer in config.layers}) > 1:
        words.append("dense layers among those of experts")
    for word, there in (
        ("norms by 1 + weight", config.norm_offset == 1),
        ("scaled embeddings", config.embed_scale != 1),
        ("capped logits", config.logit_softcap is not None),
        ("tied head", config.tied_head),
        ("layers that predict further tokens (kept)", bool(config.predictors)),
    ):
        if there:
            words.append(word)
    return list(dict.fromkeys(words))


def _of_layer(layer: LayerConfig) -> Iterator[str]:
    attention = layer.attention
    if isinstance(attention, LatentAttentionConfig):
        yield "latent attention"
        if attention.query_dim is not None:
            yield "queries from a latent"
    else:
        yield from _of_attention(attention)
    if attention.rope is not None and attention.rope.scaling is not None:
        yield f"{attention.rope.scaling.kind} rope scaling"
    if layer.norms != "before":
        yield {"after": "norms after", "both": "norms before and after"}[layer.norms]
    if isinstance(layer.feed_forward, ExpertsConfig):
        yield from _of_experts(layer.feed_forward)
    elif layer.feed_forward.bias:
        yield "feed-forward biases"
    if layer.feed_forward.activation != "silu":
        yield layer.feed_forward.activation.replace("_", " by ").replace("gelu", "GELU")


def _of_attention(attention: AttentionConfig) -> Iterator[str]:
    for word, there in (
        ("grouped queries", attention.n_kv_heads < attention.n_heads),
        ("q, k, v biases", attention.qkv_bias),
        ("output bias", attention.out_bias),
        ("norms of q and k", attention.qk_norm == "weighted"),
        ("norms of q and k without weights", attention.qk_norm == "plain"),
        ("windows", attention.window is not None),
        ("chunks", attention.chunk is not None),
        ("capped scores", attention.softcap is not None),
        ("temperature by position", attention.temperature is not None),
        ("own score scale", attention.scale is not None),
        ("partial rotation", attention.rope is not None and attention.rope.dim < attention.head_dim),
    ):
        if there:
            yield word


def _of_experts(experts: ExpertsConfig) -> Iterator[str]:
    routing = experts.routing
    yield f"experts by {routing.score}"
    for word, there in (
        ("selection bias", experts.selection_bias),
        ("expert groups", routing.n_groups > 1),
        ("normalised weights", routing.normalized),
        ("weights on the experts' input", routing.weighs == "input"),
        ("shared expert", experts.shared_hidden_dim > 0),
    ):
        if there:
            yield word


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.run(parser, DATA, measure, draw)
