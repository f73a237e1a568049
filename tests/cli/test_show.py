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
    shown = json.loads(dapji("show", "tiny", "--json", "--tensors", "--config").out)
    tensors = shown["tensors"]
    assert shown["parameters"] == sum(np.prod(tensor["shape"]) for tensor in tensors)
    assert shown["size"] == sum(tensor["bytes"] for tensor in tensors) == 4 * shown["parameters"]
    assert shown["source"] == f"file:{tiny}"
    assert shown["path"] == str(home / "models" / "tiny" / "tiny.gguf")
    assert shown["stop_tokens"] == {"<|endoftext|>": 0, "<|im_end|>": 2}
    assert shown["templates"] == {"default": CHATML}
    assert shown["sizes"]["vocab_size"] == shown["config"]["llama.vocab_size"]
    assert shown["config"]["tokenizer.ggml.tokens"][-1].endswith("in all")


def test_show_parts(dapji: Dapji, tiny: Path) -> None:
    assert dapji("show", tiny, "--template").out == CHATML + "\n"
    listed = dapji("show", tiny, "--tensors").out.splitlines()
    assert listed[0].split()[0] == "F32"
    assert listed[0].split()[-1] == "token_embd.weight"
    assert json.loads(dapji("show", tiny, "--config").out)["general.architecture"] == "llama"
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
    assert json.loads(dapji("show", folder, "--config").out) == config


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
