"""The formats that llama.cpp's llama-quantize chose, by its own output (ggml 0.25.3): for SmolLM2-135M, and for models
of 10 layers with 8 and with 16 experts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.weights.schemes import SCHEMES, choose_formats


def tensor(rows: int, cols: int) -> Tensor:
    """Rows that all are the same byte of memory, so that even a 70B costs nothing."""
    data = np.broadcast_to(np.zeros(1, dtype=np.uint8), (rows, 2 * cols))
    return Tensor(name="w", format=FORMATS["F16"], shape=(rows, cols), source=data)


def model(
    n_layers: int, dim: int, hidden_dim: int, kv_dim: int, vocab_size: int, *, tied: bool = True
) -> dict[str, Tensor]:
    tensors = {"token_embd.weight": tensor(vocab_size, dim), "output_norm.weight": tensor(1, dim)}
    if not tied:
        tensors["output.weight"] = tensor(vocab_size, dim)
    for i in range(n_layers):
        shapes = {
            "attn_q": (dim, dim), "attn_k": (kv_dim, dim), "attn_v": (kv_dim, dim), "attn_output": (dim, dim),
            "ffn_gate": (hidden_dim, dim), "ffn_up": (hidden_dim, dim), "ffn_down": (dim, hidden_dim),
        }  # fmt: skip
        tensors |= {f"blk.{i}.{name}.weight": tensor(*shape) for name, shape in shapes.items()}
    return tensors


SMOLLM2 = model(30, 576, 1536, 192, 49152)
SPREAD = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}
EVERY_LAYER = set(range(30))


@pytest.mark.parametrize(
    ("scheme", "plain", "values", "down"),
    [  # rows of 576 are no multiple of 256, so only ffn_down has K-quants
        ("Q8_0", "Q8_0", ("Q8_0", EVERY_LAYER, "Q8_0"), ("Q8_0", EVERY_LAYER, "Q8_0")),
        ("Q6_K", "Q8_0", ("Q8_0", EVERY_LAYER, "Q8_0"), ("Q6_K", EVERY_LAYER, "Q6_K")),
        ("Q5_K_M", "Q5_1", ("Q8_0", SPREAD, "Q5_1"), ("Q6_K", SPREAD, "Q5_K")),
        ("Q4_K_M", "Q5_0", ("Q8_0", SPREAD, "Q5_0"), ("Q6_K", SPREAD, "Q4_K")),
        ("Q4_K_S", "Q5_0", ("Q5_1", {0, 1, 2, 3}, "Q5_0"), ("Q5_K", {0, 1, 2}, "Q4_K")),
        ("Q4_0", "Q4_0", ("Q4_0", EVERY_LAYER, "Q4_0"), ("Q4_0", EVERY_LAYER, "Q4_0")),
    ],
)
def test_the_mixes_are_llama_cpps(
    scheme: str, plain: str, values: tuple[str, set[int], str], down: tuple[str, set[int], str]
) -> None:
    chosen = {name: format.name for name, format in choose_formats(SMOLLM2, SCHEMES[scheme]).items()}
    assert chosen["token_embd.weight"] == "Q8_0"
    for i in range(30):
        for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
            assert chosen[f"blk.{i}.{part}.weight"] == plain
        for part, (better, layers, default) in (("attn_v", values), ("ffn_down", down)):
            assert chosen[f"blk.{i}.{part}.weight"] == (better if i in layers else default), (part, i)


def with_experts(n_layers: int, n_experts: int) -> dict[str, Tensor]:
    tensors = model(n_layers, 256, 256, 128, 1000, tied=False)
    for i in range(n_layers):
        for part in ("gate", "up", "down"):
            del tensors[f"blk.{i}.ffn_{part}.weight"]
            stack = tensor(n_experts * 256, 256)
            tensors[f"blk.{i}.ffn_{part}_exps.weight"] = replace(stack, shape=(n_experts, 256, 256))
            tensors[f"blk.{i}.ffn_{part}_shexp.weight"] = tensor(256, 256)
        tensors[f"blk.{i}.ffn_gate_inp.weight"] = tensor(n_experts, 256)
    return tensors


@pytest.mark.parametrize(
    ("scheme", "n_experts", "plain", "k", "v", "o", "down"),
    [  # formats of most tensors, of attn_k, of attn_output; of attn_v and ffn_down in the layers chosen
        ("Q4_K_M", 16, "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q6_K"),
        ("Q4_K_M", 8, "Q4_K", "Q8_0", "Q8_0", "Q5_K", "Q6_K"),
        ("Q5_K_M", 16, "Q5_K", "Q5_K", "Q6_K", "Q5_K", "Q6_K"),
        ("Q5_K_M", 8, "Q5_K", "Q8_0", "Q8_0", "Q5_K", "Q6_K"),
        ("Q6_K", 8, "Q6_K", "Q8_0", "Q8_0", "Q6_K", "Q6_K"),
        ("Q4_0", 16, "Q4_0", "Q4_0", "Q4_0", "Q4_0", "Q4_0"),
        ("Q4_0", 8, "Q4_0", "Q8_0", "Q8_0", "Q4_0", "Q4_0"),
        ("BF16", 8, "BF16", "BF16", "BF16", "BF16", "BF16"),
    ],
)
def test_experts(scheme: str, n_experts: int, plain: str, k: str, v: str, o: str, down: str) -> None:
    tensors = with_experts(10, n_experts)
    chosen = {name: format.name for name, format in choose_formats(tensors, SCHEMES[scheme]).items()}
    better = {0, 3, 6, 8, 9}
    for i in range(10):
        assert chosen[f"blk.{i}.attn_q.weight"] == plain
        assert chosen[f"blk.{i}.attn_k.weight"] == k
        assert chosen[f"blk.{i}.attn_output.weight"] == o
        assert chosen[f"blk.{i}.attn_v.weight"] == (v if i in better or n_experts == 8 else plain)
        assert chosen[f"blk.{i}.ffn_gate_inp.weight"] == "F32"
        for stack in ("exps", "shexp"):
            assert chosen[f"blk.{i}.ffn_gate_{stack}.weight"] == chosen[f"blk.{i}.ffn_up_{stack}.weight"] == plain
            assert chosen[f"blk.{i}.ffn_down_{stack}.weight"] == (down if i in better else plain)


def test_a_head_of_its_own_leaves_the_embedding_at_the_default() -> None:
    chosen = choose_formats(model(8, 2048, 8192, 512, 1000, tied=False), SCHEMES["Q4_K_M"])
    assert chosen["output.weight"].name == "Q6_K"
    assert chosen["token_embd.weight"].name == "Q4_K"
    assert choose_formats(model(8, 2048, 8192, 512, 1000), SCHEMES["Q4_0"])["token_embd.weight"].name == "Q6_K"


def test_a_70b_has_more_bits_for_its_few_attention_values() -> None:
    chosen = choose_formats(model(80, 8192, 28672, 1024, 1000, tied=False), SCHEMES["Q4_K_M"])
    assert {chosen[f"blk.{i}.attn_v.weight"].name for i in range(80)} == {"Q5_K", "Q6_K"}
    assert {chosen[f"blk.{i}.ffn_down.weight"].name for i in range(80)} == {"Q4_K", "Q6_K"}
    ungrouped = choose_formats(model(80, 8192, 22016, 8192, 1000, tied=False), SCHEMES["Q4_K_M"])
    assert {ungrouped[f"blk.{i}.attn_v.weight"].name for i in range(80)} == {"Q4_K", "Q6_K"}


def test_vectors_norms_and_odd_rows() -> None:
    odd = {
        "blk.0.attn_q.bias": Tensor.from_float32("b", np.zeros(64, dtype=np.float32)),
        "blk.0.attn_norm.weight": Tensor.from_float32("n", np.zeros(64, dtype=np.float32)),
        "blk.0.ffn_gate_inp.weight": Tensor.from_float32("r", np.zeros((8, 64), dtype=np.float32)),
        "blk.0.attn_q.weight": tensor(4, 100),
    }
    assert [format.name for format in choose_formats(odd, SCHEMES["Q4_K_M"]).values()] == ["F32", "F32", "F32", "F16"]
    assert choose_formats(odd, SCHEMES["BF16"])["blk.0.attn_q.weight"].name == "BF16"


def test_the_documentation_names_every_type() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [name for name in (*SCHEMES, *FORMATS) if name not in text] == []
