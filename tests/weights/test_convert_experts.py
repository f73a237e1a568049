"""Models of experts from a folder into a quantised GGUF file and back, compared with transformers."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from test_convert import CHAT_TOKENS, QWEN2, byte_level, hf_folder

from dapji.models import families
from dapji.models.executor import open_executor
from dapji.ops.batch import Batch
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_folder, write_quantized

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
}
TEXT = np.random.default_rng(1).integers(0, 288, 40).tolist()
CONFIGS = {
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
    ),
    "mixtral": transformers.MixtralConfig(**SIZES),
    "llama-4": transformers.Llama4TextConfig(
        **SIZES, num_local_experts=4, interleave_moe_layer_step=2, intermediate_size_mlp=256
    ),
}


def logits(model: transformers.PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_and_back_in_transformers(name: str, tmp_path: Path) -> None:
    """The quantised file on the reference, and in transformers the folder made of it, whose weights are the same
    numbers as float32."""
    folder, path, back = tmp_path / "model", tmp_path / "model.gguf", tmp_path / "back"
    hf_folder(folder, byte_level(QWEN2), CONFIGS[name], CHAT_TOKENS, noise=0.1)
    source = open_checkpoint(folder)
    seen: list[int] = []
    report = write_quantized(source, path, "Q4_K_M", measure=True, advance=seen.append)
    assert sum(seen) == source.nbytes
    errors = {tensor.name: tensor.error for tensor in report.tensors}
    assert all(0 < errors[f"blk.1.ffn_{part}_exps.weight"] < 0.08 for part in ("gate", "up", "down"))  # ggml's: 0.0715

    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert {types[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q4_K"}
    assert types["blk.3.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.1.attn_k.weight"] == ("Q8_0" if name == "mixtral" else "Q4_K")
    assert len(types) == len(report.tensors)

    checkpoint = open_checkpoint(path)
    config, tensors = families.from_gguf(checkpoint.metadata, checkpoint.tensors)
    got = open_executor("reference", config, tensors, context=len(TEXT), kv="f32").step(Batch.single(TEXT))
    write_folder(checkpoint, back, "F32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back)
    # of logits up to 7; 5e-5 is what occurs
    np.testing.assert_allclose(got, logits(loaded), rtol=0, atol=2e-4)
