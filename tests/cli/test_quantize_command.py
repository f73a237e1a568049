"""dapji quantize: sizes, messages, what it refuses. The weights themselves are tested in weights."""

import json
from pathlib import Path

import gguf
from in_process import Dapji

from dapji.proof.lineage import read_lineage
from dapji.weights.gguf import read_gguf
from tiny import ANSWER


def test_quantize_writes_a_model_that_still_answers(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "q8.gguf"
    result = dapji("quantize", tiny, "q8_0", out)
    assert result.code == 0
    size = sum(len(tensor.data) for tensor in read_gguf(out).tensors.stored.values())
    assert result.out.startswith(f"{out}: {size / 1000:.0f} kB, ")
    assert "bits per weight (Q8_0 " in result.out
    assert "before: " in result.err
    assert "32.00 bits per weight" in result.err
    answer = dapji("chat", "-m", out, "--executor", "reference", "--temperature", "0", "안녕")
    assert answer.out == ANSWER + "\n"


def test_a_summary_for_scripts_with_every_tensors_error(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "q4.gguf"
    summary = json.loads(dapji("quantize", tiny, "Q4_0", out, "--errors", "--json").out)
    reader = gguf.GGUFReader(out)
    assert summary["bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert summary["bits_per_weight"] == 8 * summary["bytes"] / summary["weights"]
    assert summary["path"] == str(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {tensor["name"]: tensor["format"] for tensor in summary["tensors"]} == types
    for tensor in summary["tensors"]:
        low, high = {"F32": (0, 0), "Q8_0": (0.001, 0.01), "Q4_0": (0.01, 0.1)}[tensor["format"]]
        zeros = tensor["name"].endswith(("attn_output.weight", "ffn_down.weight"))
        assert tensor["error"] == 0 if zeros else low <= tensor["error"] <= high
    text = dapji("quantize", tiny, "Q4_0", out, "--errors", "--force").out
    assert text.count("F32 -> Q4_0") == list(types.values()).count("Q4_0")


def test_an_existing_file_needs_force(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"precious")
    result = dapji("quantize", tiny, "Q8_0", out)
    assert (result.code, result.out) == (1, "")
    assert f"{out} exists already" in result.err
    assert "hint: --force replaces it" in result.err
    assert out.read_bytes() == b"precious"
    assert dapji("quantize", tiny, "Q8_0", out, "--force").code == 0
    assert read_gguf(out).metadata["general.file_type"] == 7
    assert dapji("quantize", out, "F32", out, "--force").code == 0  # even onto itself
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "m.gguf.dapji.json"]
    lineage = read_lineage(out)
    assert lineage is not None
    (source,) = lineage.parents
    assert source.lineage is not None
    assert (lineage.kind, source.lineage.kind) == ("convert", "quantize")  # of what was there before


def test_a_folder_and_back(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    assert dapji("quantize", tiny, "BF16", tmp_path / "folder").code == 0
    assert dapji("quantize", tmp_path / "folder", "F32", tmp_path / "back.gguf").code == 0
    answer = dapji("chat", "-m", tmp_path / "back.gguf", "--executor", "reference", "--temperature", "0", "안녕")
    assert answer.out == ANSWER + "\n"
    again = dapji("quantize", tiny, "BF16", tmp_path / "folder", "--force")
    assert again.code == 1
    assert "none is ever replaced" in again.err


def test_what_makes_no_sense_is_refused(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    assert "hint: one of F32, F16" in dapji("quantize", tiny, "Q3_K_M", tmp_path / "m.gguf").err
    assert "a folder holds weights as" in dapji("quantize", tiny, "Q4_K", tmp_path / "folder").err
    assert "Q4_0 already" not in dapji("quantize", tiny, "Q4_0", tmp_path / "q4.gguf").err
    twice = dapji("quantize", tmp_path / "q4.gguf", "Q8_0", tmp_path / "m.gguf")
    assert twice.code == 1
    assert "hint: start from F16, BF16 or F32 weights, or allow it with --allow-requantize" in twice.err
    assert not (tmp_path / "m.gguf").exists()
    assert dapji("quantize", tmp_path / "q4.gguf", "Q8_0", tmp_path / "m.gguf", "--allow-requantize").code == 0
    assert dapji("quantize", tiny, "Q4_0").code == 2
