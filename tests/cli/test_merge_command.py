"""dapji merge and dapji export: answers, reports, warnings, what is refused. Weights are tested in models, figures in
models and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import Dapji

from dapji.proof.lineage import read_lineage
from dapji.weights.gguf import read_gguf
from tiny import write_adapter

BACKWARDS = {"하나 ": "셋 ", "셋 ": "둘 ", "둘 ": "하나 "}
RUN = ("--max-tokens", "4", "--temperature", "0", "--context", "512", "--executor", "reference")


@pytest.fixture(scope="module")
def backwards(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "backwards", endless, BACKWARDS)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text(json.dumps({"prompt": "x\n\n", "completion": "하나 셋 둘 하나 셋 둘 "}) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("out", ["merged.gguf", "merged"])
def test_the_result_answers_as_base_and_adapter(
    dapji: Dapji, endless: Path, backwards: Path, held_out: Path, tmp_path: Path, out: str
) -> None:
    arguments = ("merge", endless, "F32", tmp_path / out, "--adapter", backwards, "--evaluate", held_out)
    result = dapji(*arguments, "--executor", "reference")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith(f"{tmp_path / out}: ")
    assert lines[1] == "survives: all of the change, none of it was rounded"
    assert lines[2].startswith("held out, 31 tokens: loss of the base ")  # bytes, and the end
    assert lines[3].endswith("the same likeliest token in 100.0% of places")
    assert "warning" not in result.err
    assert dapji("run", tmp_path / out, *RUN, stdin="x\n\n").out == "하나 셋 둘 하나 \n"


def test_a_report_for_scripts(dapji: Dapji, endless: Path, backwards: Path, held_out: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", endless, {"하나 ": "둘 "})
    out = tmp_path / "merged.gguf"
    arguments = ("--adapter", f"{backwards}=0.5", "--adapter", other, "--evaluate", held_out, "--json")
    told = json.loads(dapji("merge", endless, "q8_0", out, *arguments, "--executor", "reference").out)
    assert told["path"] == str(out)
    assert told["adapters"] == [{"path": str(backwards), "factor": 0.5}, {"path": str(other), "factor": 1.0}]
    (head,) = told["survival"]["tensors"]
    assert head["name"] == "head"
    assert 0.9 < head["share"] < 1.1
    assert {key: told["survival"][key] for key in ("share", "bits")} == {key: head[key] for key in ("share", "bits")}
    lineage = read_lineage(out)
    assert lineage is not None
    assert [(each.role, each.model) for each in lineage.parents] == [
        ("base", str(endless)),
        ("adapter", str(backwards)),
        ("adapter", str(other)),
    ]
    assert lineage.settings == {"type": "Q8_0", "factors": [0.5, 1.0]}
    assert lineage.outcome["survival"] == {"share": head["share"], "bits": head["bits"]}
    measured = told["evaluation"]
    assert lineage.outcome["evaluation"] == measured
    assert dapji("verify", out, "--executor", "reference").code == 0
    assert 0 < measured["kl"] < 0.01
    assert measured["same_top"] == 1
    assert abs(measured["loss"] - measured["source_loss"]) < 0.05


def test_what_rounding_buries_is_told(dapji: Dapji, endless: Path, backwards: Path, tmp_path: Path) -> None:
    """A thousandth of the change is less than 4 bits can show."""
    result = dapji("merge", endless, "Q4_0", tmp_path / "m.gguf", "--adapter", f"{backwards}=0.001")
    assert result.code == 0
    assert "survives: " in result.out
    assert "warning: of the change " in result.err
    assert "hint: use an adapter as it is" in result.err
    nothing = dapji("merge", endless, "Q4_0", tmp_path / "n.gguf", "--adapter", f"{backwards}=0")
    assert "survives: there is no change" in nothing.out


def test_a_quantised_base_is_dequantised(dapji: Dapji, endless: Path, backwards: Path, tmp_path: Path) -> None:
    assert dapji("quantize", endless, "Q8_0", tmp_path / "q8.gguf").code == 0
    result = dapji("merge", tmp_path / "q8.gguf", "BF16", tmp_path / "merged", "--adapter", backwards)
    assert "the base is quantised (Q8_0): its values are dequantised for the sum" in result.err
    assert dapji("run", tmp_path / "merged", *RUN, stdin="x\n\n").out == "하나 셋 둘 하나 \n"


def test_what_makes_no_sense_is_refused(
    dapji: Dapji, endless: Path, tiny: Path, backwards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for arguments, message in (
        ((endless, "Q8_0", out), "Missing option '--adapter'"),
        ((endless, "Q8_0", out, "--adapter", f"{backwards}=half"), "'half' is no number"),
        ((endless, "Q8_0", out, "--adapter", f"{backwards}=inf"), "'inf' is no number"),
        ((endless, "Q8_0", out, "--adapter", backwards, "--executor", "torch"), "for --evaluate, which is not given"),
        ((endless, "Q8_0", out, "--adapter", tmp_path / "nothing"), "no such file or folder"),
        ((endless, "Q9", out, "--adapter", backwards), "unknown type 'Q9'"),
        ((tiny, "Q8_0", out, "--adapter", backwards), "in this model, but the adapter's matrices"),
        ((endless, "Q8_0", out, "--adapter", backwards, "--evaluate", pairs), "pairs.jsonl:1: a preference has no one"),
    ):
        result = dapji("merge", *arguments)
        assert result.code in (1, 2)
        assert message in result.err
        assert not out.exists()
    out.write_bytes(b"precious")
    assert "hint: --force replaces it" in dapji("merge", endless, "Q8_0", out, "--adapter", backwards).err
    assert dapji("merge", endless, "Q8_0", out, "--adapter", backwards, "--force").code == 0


def test_what_a_tuned_model_loses_when_it_is_quantised(
    dapji: Dapji, endless: Path, tiny: Path, backwards: Path, tmp_path: Path
) -> None:
    """The same report, of a whole model beside its base: here one that was merged exactly."""
    assert dapji("merge", endless, "F32", tmp_path / "tuned.gguf", "--adapter", backwards).code == 0
    by_merge = json.loads(dapji("merge", endless, "Q4_0", tmp_path / "a.gguf", "--adapter", backwards, "--json").out)
    arguments = ("quantize", tmp_path / "tuned.gguf", "Q4_0", tmp_path / "b.gguf", "--base", endless, "--json")
    assert json.loads(dapji(*arguments).out)["survival"] == by_merge["survival"]
    lineage = read_lineage(tmp_path / "b.gguf")
    assert lineage is not None
    assert (lineage.kind, lineage.outcome["survival"]["bits"]) == ("quantize", by_merge["survival"]["bits"])
    (source,) = lineage.parents
    assert source.lineage is not None
    assert source.lineage.kind == "merge"
    result = dapji(*arguments[:-2], tiny, "--force")
    assert result.code == 1
    assert "is not what" in result.err


def test_how_far_a_quantised_model_is_from_its_source(
    dapji: Dapji, endless: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q4.gguf"
    arguments = ("quantize", endless, "Q4_0", out, "--evaluate", held_out, "--executor", "reference")
    told = json.loads(dapji(*arguments, "--json").out)["evaluation"]
    assert told["base_loss"] is None
    assert 0 < told["kl"] < 1
    assert told["loss"] != told["source_loss"]
    text = dapji(*arguments, "--force").out
    assert f"held out, 31 tokens: loss {told['source_loss']:.4f} before, of the result {told['loss']:.4f}" in text


def test_an_adapter_goes_to_gguf_and_back(dapji: Dapji, endless: Path, backwards: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "a.gguf", tmp_path / "back"
    nameless = dapji("export", backwards, out)
    assert (nameless.code, nameless.out) == (1, "")
    assert "hint: name it with --base" in nameless.err
    assert dapji("export", backwards, out, "--base", endless).out == f"{out}\n"
    assert dapji("verify", out).code == 0  # it knows its base from its lineage
    assert read_gguf(out).metadata["general.type"] == "adapter"
    assert dapji("run", endless, "--adapter", out, *RUN, stdin="x\n\n").out == "하나 셋 둘 하나 \n"
    assert dapji("export", out, back, "--base", endless).code == 0
    files = [folder / "adapter_model.safetensors" for folder in (backwards, back)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((back / "adapter_config.json").read_text())["base_model_name_or_path"] == str(endless)
    assert dapji("export", back, tmp_path / "again.gguf").code == 0  # which says what it is for
    assert (tmp_path / "again.gguf").stat().st_size == out.stat().st_size
    again = dapji("export", backwards, out, "--base", endless)
    assert "hint: --force replaces it" in again.err
    assert "none is ever replaced" in dapji("export", out, back, "--base", endless, "--force").err
