"""dapji show on both layouts, on models that we cannot run, and on what is no model."""

import json
from pathlib import Path

import numpy as np
import pytest
from in_process import Dapji

from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from tiny import CHATML


def test_show_says_what_the_model_is(dapji: Dapji, tiny: Path) -> None:
    result = dapji("show", tiny)
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines() if not line.startswith(("stop", "rope ")))
    assert result.code == 0
    assert lines["name"] == "tiny"
    assert lines["architecture"] == "llama"
    assert "n_layers 1, dim 64, hidden_dim 32, n_heads 2, n_kv_heads 1, head_dim 32" in lines["sizes"]
    assert lines["quantisation"] == "32.00 bits per weight: F32 100.0 %"
    assert lines["context"] == "4096 tokens, rope theta 10000"
    assert "smollm" in lines["tokenizer"]
    assert lines["template"] == "yes"
    assert lines["path"] == str(tiny)
    assert "stop tokens   <|endoftext|> (0), <|im_end|> (2)" in result.out
    assert "rope scaling  none" in result.out


def test_show_as_json_of_an_installed_model(dapji: Dapji, tiny: Path, home: Path) -> None:
    dapji("pull", f"file:{tiny}")
    shown = json.loads(dapji("show", "tiny", "--json", "--tensors", "--metadata").out)
    tensors = shown["tensors"]
    assert shown["parameters"] == sum(np.prod(tensor["shape"]) for tensor in tensors)
    assert shown["size"] == sum(tensor["bytes"] for tensor in tensors) == 4 * shown["parameters"]
    assert shown["source"] == f"file:{tiny}"
    assert shown["path"] == str(home / "models" / "tiny" / "tiny.gguf")
    assert shown["stop_tokens"] == {"<|endoftext|>": 0, "<|im_end|>": 2}
    assert shown["templates"] == {"default": CHATML}
    assert shown["sizes"]["vocab_size"] == shown["metadata"]["llama.vocab_size"]
    assert shown["metadata"]["tokenizer.ggml.tokens"][-1].endswith("in all")


def test_show_parts(dapji: Dapji, tiny: Path) -> None:
    assert dapji("show", tiny, "--template").out == CHATML + "\n"
    listed = dapji("show", tiny, "--tensors").out.splitlines()
    assert listed[0].split()[0] == "F32"
    assert listed[0].split()[-1] == "token_embd.weight"
    assert json.loads(dapji("show", tiny, "--metadata").out)["general.architecture"] == "llama"
    assert dapji("show", tiny, "--template", "--json").code == 1


def test_show_of_a_folder(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Folder"
    assert dapji("quantize", tiny, "F16", folder).code == 0
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Folder\n")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    out = dapji("show", folder).out
    for line in (
        "name          Folder",
        "quantisation  16.00 bits per weight: F16 100.0 %",
        "context       4096 tokens, rope theta 10000",
        "rope scaling  rope_type linear, factor 2.0",
        "stop tokens   <|endoftext|> (0), <|im_end|> (2)",
        "template      yes",
        "licence       apache-2.0",
    ):
        assert line in out.splitlines()
    assert json.loads(dapji("show", folder, "--metadata").out) == config


def test_a_model_that_we_cannot_run_is_shown_too(dapji: Dapji, tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "mamba9", "mamba9.context_length": 77, "tokenizer.ggml.model": "wordpiece",
        "general.license": "mit", "mamba9.rope.scaling.type": "yarn", "mamba9.rope.scaling.factor": 4.0,
    }  # fmt: skip
    tensor = Tensor.from_float32("w", np.zeros((2, 32), dtype=np.float32))
    write_gguf(tmp_path / "m.gguf", metadata, [TensorToWrite.of("w", tensor)])
    out = dapji("show", tmp_path / "m.gguf").out
    for line in (
        "architecture  mamba9",
        "context       77 tokens",
        "rope scaling  type yarn, factor 4.0",
        "stop tokens   unknown",
        "template      no",
        "licence       mit",
    ):
        assert line in out.splitlines()
    assert "unsupported: tokenizer.ggml.model is 'wordpiece'" in out
    result = dapji("show", tmp_path / "m.gguf", "--template")
    assert result.code == 1
    assert "wordpiece" in result.err


@pytest.mark.parametrize(("content", "message"), [(b"GGUF", "needs 4 bytes"), (b"PK\3\4zip", "starts with b'PK")])
def test_what_is_no_model_is_refused(dapji: Dapji, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    result = dapji("show", tmp_path / "m.gguf")
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert dapji("show", "never-heard-of").code == 1
    assert "hint: dapji pull small" in dapji("show", "small").err


def test_show_plans_a_model_by_its_config_json_alone(dapji: Dapji) -> None:
    config = Path(__file__).parent.parent / "models" / "published" / "deepseek-v3.json"
    out = dapji("show", "--config", config).out.splitlines()
    latent = "latent attention 128 heads (latent 512, rope 64)"
    for line in (
        "family        deepseek_v3",
        f"layers        3 layers: {latent}, feed-forward 18432",
        f"              58 layers: {latent}, 256 experts of 2048, 8 per token + shared 2048",
        "parameters    671,026,419,200 and 13,463,426,304 of predictors",
        "per token     36,625,618,432 parameters",
        "context       163840 tokens",
        "cache f16     70,272 bytes per token, 11.5 GB at full length",
    ):
        assert line in out
    planned = json.loads(dapji("show", "--config", config, "--json").out)
    assert planned["cache"]["f16"] == {"per_token": 70_272, "whole_context": 70_272 * 163_840}
    assert planned["weights"].keys() == {"BF16", "Q8_0", "Q4_K_M"}


def test_a_plan_needs_a_config_json_and_nothing_else(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((), "neither a MODEL nor --config"),
        ((tiny, "--config", tiny), "--config plans a model without weights"),
        (("--config", tiny, "--tensors"), "--config plans a model without weights"),
        (("--config", tmp_path / "none.json"), "no such file"),
        (("--config", tiny), "not the JSON that is expected here"),
    ):
        result = dapji("show", *arguments)
        assert result.code == 1
        assert message in result.err
