"""Gemma, Phi and EXAONE 4 from a folder into a quantised GGUF file and back, compared with transformers."""

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
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 64, "sliding_window": 16}
TEXT = np.random.default_rng(1).integers(0, 288, 40).tolist()
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "rope_theta": 1e4}
CONFIGS = {
    "exaone-4": transformers.Exaone4Config(**SIZES, **HEADS),
    "gemma-2": transformers.Gemma2Config(**SIZES, **HEADS, query_pre_attn_scalar=64),
    "gemma-3": transformers.Gemma3TextConfig(**SIZES, **HEADS, query_pre_attn_scalar=64, sliding_window_pattern=2),
    "phi-3": transformers.Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_and_back_in_transformers(name: str, tmp_path: Path) -> None:
    """The quantised file on the reference, and in transformers the folder made of it, whose weights are the same
    numbers as float32."""
    folder, path, back = tmp_path / "model", tmp_path / "model.gguf", tmp_path / "back"
    hf_folder(folder, byte_level(QWEN2), CONFIGS[name], CHAT_TOKENS, noise=0.1)
    source = open_checkpoint(folder)
    seen: list[int] = []
    write_quantized(source, path, "Q4_K_M", advance=seen.append)
    assert sum(seen) == source.nbytes
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    # as llama-quantize: values get more bits, alone or with q and k; all vectors stay float32
    assert types["blk.3.attn_qkv.weight" if name == "phi-3" else "blk.3.attn_v.weight"] == "Q6_K"
    assert types["blk.1.ffn_up.weight"] == "Q4_K"
    assert {types[key] for key in types if "norm" in key or "rope" in key} == {"F32"}

    checkpoint = open_checkpoint(path)
    config, tensors = families.from_gguf(checkpoint.metadata, checkpoint.tensors)
    got = open_executor("reference", config, tensors, context=len(TEXT), kv="f32").step(Batch.single(TEXT))
    write_folder(checkpoint, back, "F32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, pad_token_id=0)  # Phi's default is beyond 512
    with torch.no_grad():
        want = loaded(torch.tensor([TEXT])).logits[0].numpy()
    # of logits up to 15; 5e-5 is what occurs
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)
