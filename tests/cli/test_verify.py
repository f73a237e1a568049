"""dapji verify, and what dapji show says of where a model came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from in_process import Dapji

from dapji.proof.certificate import read_certificate
from dapji.proof.lineage import DataFile, Lineage, parent, write_lineage
from tiny import ANSWER, write_adapter


def test_a_model_is_certified_and_verified(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    shutil.copyfile(tiny, model)
    refused = dapji("verify", model)
    assert refused.code == 1
    assert "has no certificate" in refused.err
    assert "--certify" in refused.err
    certified = dapji("verify", model, "--certify")
    assert (certified.code, certified.out) == (0, f"{model}.dapji.json\n")
    assert dapji("verify", model, "--certify").code == 1
    assert dapji("verify", model, "--certify", "--force", "--json").code == 0
    passed = dapji("verify", model, "--executor", "reference")
    assert passed.code == 0
    assert passed.out.splitlines()[:2] == ["✓ record: m.gguf.dapji.json", "✓ files: m.gguf"]
    assert "✗" not in passed.out
    assert dapji("run", model, "hello\n").out == ANSWER + "\n"
    model.write_bytes(model.read_bytes()[:-1] + b"@")
    failed = dapji("verify", model)
    assert failed.code == 1
    assert "✗ files: m.gguf: sha256 was " in failed.out
    assert f"error: {model} is not what its certificate says: files: m.gguf" in failed.err
    told = json.loads(dapji("verify", model, "--json").out)
    assert told["failed"] == len([check for check in told["checks"] if check["passed"] is False]) >= 1
    assert told["not_checked"] == 0


def test_what_is_written_in_fewer_bits_is_certified(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "q8.gguf"
    assert dapji("quantize", tiny, "Q8_0", out).code == 0
    certificate = read_certificate(out)
    assert certificate is not None
    assert certificate.divergence is not None
    assert certificate.divergence.source == str(tiny)
    assert 0 < certificate.divergence.kl < 1e-3
    assert dapji("verify", out).code == 0
    assert dapji("quantize", out, "F32", out, "--force").code == 0  # in the place of its source
    assert dapji("verify", out, "--executor", "reference").code == 1  # which is no more what the lineage says
    made = read_certificate(out)
    assert made is not None
    assert made.divergence is None


def test_an_adapter_needs_its_base(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny, {"4": "2"})
    assert "does not say what it is an adapter of" in dapji("verify", adapter, "--certify").err
    assert dapji("verify", adapter, "--certify", "--base", tiny).code == 0
    result = dapji("verify", adapter, "--base", tiny, "--executor", "reference")
    assert result.code == 0
    assert "✓ numbers: conversation, the base alone on reference" in result.out
    assert dapji("verify", tiny, "--force").code == 1


def test_show_draws_what_a_model_was_made_of(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    for path in (base, out):
        shutil.copyfile(tiny, path)
    examples = tmp_path / "examples.jsonl"
    examples.write_text("{}\n")
    taught = Lineage(kind="distill", parents=(parent("teacher", str(tiny)),))
    write_lineage(base, Lineage(kind="tune", parents=(parent("base", str(tiny)),), outcome={"steps": 12}))
    data = (
        DataFile(use="train", file="a.jsonl", sha256="a" * 64, licence="cc-by-sa-4.0"),
        DataFile(use="train", file="b.jsonl", sha256="b" * 64, lineage=taught),
    )
    write_lineage(out, Lineage(kind="tune", parents=(parent("base", str(base)),), data=data, outcome={"steps": 3}))
    sha256 = parent("base", str(tiny)).files["tiny.gguf"][:12]
    lines = dapji("show", out).out.splitlines()
    assert [line[14:] for line in lines[-6:]] == [
        "tune, 3 steps",
        f"├─ base {base} (licence unknown, sha256 {sha256}…, made by tune, 12 steps)",
        f"│  └─ base {tiny} (licence unknown, sha256 {sha256}…)",
        f"├─ train a.jsonl (cc-by-sa-4.0, sha256 {'a' * 12}…)",
        f"└─ train b.jsonl (licence unknown, sha256 {'b' * 12}…, made by distill)",
        f"   └─ teacher {tiny} (licence unknown, sha256 {sha256}…)",
    ]
    duties = [line[14:] for line in lines if line.startswith("duties") or "adaptations" in line]
    assert duties == [
        f"unknown: find out before you pass it on (base {tiny}, train b.jsonl, teacher {tiny})",
        "cc-by-sa-4.0: name the authors, say what was changed, give adaptations under the same licence (train a.jsonl)",
    ]
    assert json.loads(dapji("show", out, "--json").out)["lineage"]["data"][0]["licence"] == "cc-by-sa-4.0"


def test_show_of_an_adapter(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny, {"4": "2"})
    write_lineage(adapter, Lineage(kind="tune", parents=(parent("base", str(tiny)),)))
    out = dapji("show", adapter).out
    assert "rank          1, alpha 1" in out.splitlines()
    assert f"└─ base {tiny}" in out
    assert json.loads(dapji("show", adapter, "--json").out)["adapter"]["r"] == 1
    assert dapji("show", adapter, "--tensors").code == 1
