"""Adapters that PEFT writes, on the tiny models that transformers makes: the independent implementation of LoRA."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from tiny_models import oracle, text

RANK = 3


def make(name: str, seed: int = 0, **options: Any) -> peft.PeftModel:
    """An adapter with random A and B for the linears of the tiny model `name`: all that PEFT takes for such, but for
    DeepSeek's kv_b_proj, which we refuse, and its feed-forwards, where PEFT would change the routed experts too."""
    model = deepcopy(oracle(name))
    linears = [key for key, module in model.named_modules() if type(module) is torch.nn.Linear]
    tied = ("lm_head",) if model.config.tie_word_embeddings else ()
    left_out = ("kv_b_proj", ".mlp.") if model.config.model_type.startswith("deepseek") else ()
    targets = [key for key in linears if not any(part in key for part in (*left_out, *tied))]
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": 5, "target_modules": targets, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own affairs: names in transformers, patterns that it adds itself
        adapted = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "magnitude" in key:  # of the base's rows at first
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "lora_" in key:
                parameter.normal_(0.0, 0.15)
    return adapted.eval()


def written(model: peft.PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        model.save_pretrained(folder, save_embedding_layers=False)  # a copy of the base's head
    return folder


def loaded(name: str, folder: Path) -> peft.PeftModel:
    """An adapter of a folder on the tiny model `name`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        return peft.PeftModel.from_pretrained(deepcopy(oracle(name)), folder).eval()


def logits(model: torch.nn.Module, tokens: list[int] | None = None) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor([text() if tokens is None else tokens]), use_cache=False).logits[0].numpy()
