"""`dapji distill`: a teacher's answers as rows that training reads, and what was cut off goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from in_process import Dapji

from dapji.model import load
from dapji.proof.lineage import read_lineage
from dapji.training.answers import write_answers
from dapji.training.data import Encoder, Reader
from tiny import ANSWER

ASKED = {"role": "user", "content": "뭐?"}
ROWS: list[dict[str, Any]] = [{"messages": [ASKED]}, {"prompt": [ASKED, {"role": "assistant", "content": "?"}, ASKED]}]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_become_examples(dapji: Dapji, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "examples.jsonl"
    done = dapji("distill", tiny, prompts, "-o", output, "-n", "2")
    assert done.code == 0, done.err
    assert done.out == f"{output}\n"
    assert "4 examples" in done.err
    found = lines(output)
    assert [(row["line"], row["answer"]) for row in found] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert all(row["completion"] == [{"role": "assistant", "content": ANSWER}] for row in found)
    assert found[0]["prompt"] == [ASKED]
    with load(tiny) as model:
        entries = list(Reader(output, Encoder(model.tokenizer)))
        assert [entry.error for entry in entries] == [None] * 4
        (sequence,) = entries[0].samples[0].sequences
        assert model.tokenizer.decode(sequence.ids[sequence.learned].tolist()) == ANSWER
    assert not output.with_name("examples.jsonl.partial").exists()
    lineage = read_lineage(output)
    assert lineage is not None
    assert [(each.role, each.model) for each in lineage.parents] == [("teacher", str(tiny))]
    assert lineage.data[0].sha256 == hashlib.sha256(prompts.read_bytes()).hexdigest()
    again = dapji("distill", tiny, prompts, "-o", output)
    assert again.code == 1
    assert "exists already" in again.err


def test_what_was_cut_off_goes_on(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "examples.jsonl"

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with load(tiny) as model:
        with pytest.raises(KeyboardInterrupt):
            write_answers(model, prompts, output, n=2, progress=stop)
        kept = output.with_name("examples.jsonl.partial") / "answers.jsonl"
        assert len(lines(kept)) == 3
        kept.write_text(kept.read_text()[:-10])  # as a power cut leaves it
        told: list[int] = []
        assert write_answers(model, prompts, output, n=2, progress=lambda done, total: told.append(done)).examples == 4
        assert told == [2, 3, 4]
        write_answers(model, prompts, tmp_path / "whole.jsonl", n=2)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_options_do_not_go_on(dapji: Dapji, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "examples.jsonl.partial"
    folder.mkdir()
    (folder / "about.json").write_text('{"model": "other"}')
    done = dapji("distill", tiny, prompts, "-o", tmp_path / "examples.jsonl")
    assert done.code == 1
    assert "answers of another call: model was other, now" in done.err


def test_answers_that_are_too_long(dapji: Dapji, endless: Path, prompts: Path, tmp_path: Path) -> None:
    done = dapji("distill", endless, prompts, "-o", tmp_path / "examples.jsonl", "--max-tokens", "5")
    assert done.code == 1
    assert "all 2 answers had become too long" in done.err
    assert "a larger --max-tokens than 5" in done.err


def test_rows_that_are_no_prompts(dapji: Dapji, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ok"}\n{"question": "?"}\n')
    done = dapji("distill", tiny, path, "-o", tmp_path / "examples.jsonl")
    assert done.code == 1
    assert "1 of 2 rows" in done.err
    assert "prompts.jsonl:2: prompt is missing" in done.err
