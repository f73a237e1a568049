"""Lineages: what is in them, through a chain of runs, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import tiny_training as tiny
from dapji.errors import FormatError, UsageError
from dapji.proof.lineage import Lineage, ancestors, data_file, parent, read_lineage, write_lineage
from dapji.proof.record import record_path
from dapji.proof.verification import verify
from dapji.training.settings import read_recipe
from dapji.training.tune import tune


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_chain_of_runs(tmp_path: Path) -> None:
    """All weights, then an adapter to that with a teacher: each file of each as hashlib has it."""
    quick = "[run]\nsteps = 1"
    train = tmp_path / "train.jsonl"
    assert tune(read_recipe(tiny.write_recipe(tmp_path, f'licences = {{"{train}" = "cc-by-4.0"}}', quick, name="one")))
    teacher = tiny.write_model(tmp_path / "teacher.gguf", seed=1)
    second = read_recipe(
        tiny.write_recipe(
            tmp_path, f'[method]\nname = "distill"\nteacher = "{teacher}"\n[lora]\nrank = 2', quick, name="two"
        ),
        changes={"model": str(tmp_path / "one")},
    )
    assert tune(second)
    lineage = read_lineage(tmp_path / "two")
    assert lineage is not None
    assert [each.model for each in ancestors(lineage) if hasattr(each, "model")] == [
        str(tmp_path / "one"), str(tmp_path / "tiny.gguf"), str(teacher),
    ]  # fmt: skip
    base = lineage.parents[0]
    assert base.files == {name: sha256(tmp_path / "one" / name) for name in base.files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= base.files.keys()
    assert base.lineage == read_lineage(tmp_path / "one")
    assert base.lineage is not None
    assert base.lineage.data[0].licence == "cc-by-4.0"
    assert base.lineage.data[0].sha256 == sha256(train)
    assert base.lineage.parents[0].files == {"tiny.gguf": sha256(tmp_path / "tiny.gguf")}
    for run in ("one", "two"):
        assert {check.passed for check in verify(tmp_path / run)} == {True}
    with train.open("a") as file:
        file.write("\n")
    changed = [check.name for check in verify(tmp_path / "two") if check.passed is False]
    assert changed == [f"train: {train}"]
    adapter = parent("adapter", str(tmp_path / "two"))
    assert sorted(adapter.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert adapter.lineage == lineage


def test_licences_are_of_files_that_are_used(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path, 'licences = {"other.jsonl" = "mit"}')
    with pytest.raises(UsageError, match=r"data.licences names 'other.jsonl', which is none of the files"):
        read_recipe(path)


def test_a_record_lies_beside_a_file_and_keeps_its_other_parts(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "m.gguf")
    beside = tmp_path / "m.gguf.dapji.json"
    beside.write_text('{"store": {"name": "m"}}')
    examples = tiny.write_examples(tmp_path / "answers.jsonl")
    taught = Lineage(kind="distill", parents=(parent("teacher", str(model)),), settings={"rate": 0.1, "글": "한"})
    write_lineage(examples, taught)
    lineage = Lineage(kind="tune", data=(data_file("train", str(examples), sha256(examples)),))
    write_lineage(model, lineage)
    assert record_path(model) == beside
    assert json.loads(beside.read_text())["store"] == {"name": "m"}
    assert read_lineage(model) == lineage
    assert lineage.data[0].lineage == taught


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tune"', '"merge"', "its lineage was changed"),
        ("0.25", "0.26", "its lineage was changed"),
        ('"sha256"', '"sha255"', "unknown field `sha255`"),
        ('"lineage": {', '"lineage": [', "cannot be read"),
    ],
)
def test_a_record_that_was_changed_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_lineage(tmp_path, Lineage(kind="tune", outcome={"loss": 0.25}))
    path = tmp_path / "dapji.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(FormatError, match=message):
        read_lineage(tmp_path)
