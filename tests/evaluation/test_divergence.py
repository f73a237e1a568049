"""Divergence against torch's own, of logits that PEFT and transformers compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from dapji.errors import ConfigError
from dapji.evaluation.divergence import Text, divergence
from dapji.files import open_files
from vllm_cases import CONTEXT, write_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's own affairs with transformers

LENGTHS = (150, 2, 64, 65)
"""More than one step, and both sides of its end."""


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    random = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        judged = random.random(length) < 0.5
        judged[:2] = False, True
        made.append(Text(ids=random.integers(3, 259, length).astype(np.int32), judged=judged))
    return made


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_divergence_and_losses_are_torchs(kind: str, texts: list[Text], tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    # the result: the base itself, of which some weights have become others
    other = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 0.05
    other.save_pretrained(tmp_path / "other")

    files = open_files(base)
    found = divergence(
        files,
        files.adapter(tmp_path / "adapter"),
        open_files(tmp_path / "other"),
        texts,
        executor=kind,  # type: ignore[arg-type]
    )
    losses, kls, same = [], [], []
    for text in texts:
        ids = torch.tensor(text.ids[None].astype(np.int64))
        places = np.flatnonzero(text.judged) - 1
        with torch.no_grad():
            outputs = [adapted(ids).logits, other(ids).logits]
            with adapted.disable_adapter():
                outputs.insert(0, adapted(ids).logits)
        plain, p, q = (torch.log_softmax(logits[0].double(), dim=1)[places] for logits in outputs)
        labels = torch.tensor(text.ids[places + 1].astype(np.int64))
        losses += [[-logs[i, label].item() for logs in (plain, p, q)] for i, label in enumerate(labels)]
        kls += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=1).tolist()
        same += (p.argmax(dim=1) == q.argmax(dim=1)).tolist()
    assert found.tokens == len(kls) == sum(int(text.judged.sum()) for text in texts)
    # float32 logits that were summed in another order
    assert [found.base_loss, found.source_loss, found.loss] == pytest.approx(np.mean(losses, axis=0), abs=1e-5)
    assert found.kl == pytest.approx(np.mean(kls), abs=1e-5)
    assert found.kl > 0.01
    assert found.kl_error == pytest.approx(np.std(kls) / np.sqrt(len(kls)), abs=1e-5)
    assert found.same_top == np.mean(same)
    assert found.same_top < 1


def test_a_text_beyond_the_context_is_refused(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base")
    matrices = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight": np.ones(shape, dtype=np.float32)
        for letter, shape in (("A", (2, 128)), ("B", (128, 2)))
    }
    (tmp_path / "adapter").mkdir()
    save_file(matrices, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    files = open_files(base)
    text = Text(ids=np.zeros(CONTEXT + 1, dtype=np.int32), judged=np.arange(CONTEXT + 1) > 0)
    with pytest.raises(ConfigError, match="513 tokens"):
        divergence(files, files.adapter(tmp_path / "adapter"), files, [text])
