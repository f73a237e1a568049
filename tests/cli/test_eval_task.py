"""`dapji eval --task`: tasks of lm-evaluation-harness, with answers that are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from in_process import Dapji

from dapji.evaluation.bootstrap import paired_difference, proportion
from dapji.evaluation.result import read_result
from tiny import ANSWER, SCRIPT, write_adapter, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
OTHER = "안녕하세요!입니다. 🎉"
"""With the adapter."""
TARGETS = [ANSWER, OTHER, ANSWER, "?"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which the command changes for its own process."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")


def write_task(folder: Path, name: str, **changes: Any) -> Path:
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps({"question": "몇?", "target": target}) + "\n" for target in TARGETS))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}\n",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["!!"], "max_gen_toks": 32},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task | changes, ensure_ascii=False), encoding="utf-8")  # YAML holds JSON
    return path


def test_before_and_after(tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny, {"안녕하세요!": "입니다."})
    task, output = write_task(tmp_path, "known"), tmp_path / "result.json"
    shown = dapji("eval", tiny, "--task", task, "--adapter", adapter, "--against", tiny, "-o", output)
    assert shown.code == 0
    assert [line.split("[")[0].split() for line in shown.out.splitlines()] == [
        ["known"],
        ["exact_match", "0.2500"],
        ["before", "0.5000"],
        ["difference", "-0.2500"],
    ]
    result = read_result(output)
    after, before = [0.0, 1, 0, 0], [1.0, 0, 1, 0]
    assert (result.kind, result.file, result.score) == ("lm-eval", str(task), proportion(after))
    assert (result.before, result.difference) == (proportion(before), paired_difference(after, before))
    assert [(item.row, item.answer, item.before_answer) for item in result.items] == [
        (i, OTHER, ANSWER) for i in range(4)
    ]
    assert [item.expected for item in result.items] == [{"target": target} for target in TARGETS]
    assert result.versions["lm_eval"]


def test_names_limits_and_templates(tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    write_task(tmp_path, "known", doc_to_text="{{question}}")  # without a newline before the answer
    arguments = ["eval", tiny, "--task", "known", "--include-path", tmp_path, "--json"]
    plain = json.loads(dapji(*arguments, "--limit", "2").out)
    assert (plain["score"]["n"], plain["score"]["value"]) == (2, 0)
    chat = json.loads(dapji(*arguments, "--limit", "1", "--chat", "--few-shot", "1").out)
    assert (chat["score"]["n"], chat["score"]["value"]) == (1, 1)
    assert chat["items"][0]["question"].startswith("<|im_start|>user\n몇?<|im_end|>\n<|im_start|>assistant\n")
    assert chat["settings"]["few_shot"] == 1


def test_a_group(tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    write_task(tmp_path, "first")
    write_task(tmp_path, "second", doc_to_target=OTHER)
    mean = {"aggregate_metric_list": [{"metric": "exact_match", "aggregation": "mean", "weight_by_size": True}]}
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["first", "second"], **mean}))
    adapter = write_adapter(tmp_path / "adapter", tiny, {"안녕하세요!": "입니다."})
    arguments = ["--task", "both", "--include-path", tmp_path, "--against-adapter", adapter, "--json"]
    result = json.loads(dapji("eval", tiny, *arguments).out)
    assert result["score"] == {"value": 0.25, "low": None, "high": None, "n": 8}
    assert (result["before"]["value"], result["difference"]) == (0.625, None), "a group has no rows of its own"
    assert result["groups"]["first"]["exact_match"]["difference"]["value"] == 0.5 - 0.25
    assert {name: each["exact_match"]["score"]["value"] for name, each in result["groups"].items()} == {
        "both": 0.25,
        "first": 0.5,
        "second": 0,
    }
    assert [item["fields"]["task"] for item in result["items"]] == ["first"] * 4 + ["second"] * 4


def test_contexts_that_are_too_long(tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    task = write_task(tmp_path, "known", doc_to_text="{{question}}" + "long " * 900 + "\n")
    shown = dapji("eval", tiny, "--task", task)
    assert "4 requests were too long and lost the beginning of their context\n" in shown.err
    assert "0.5000" in shown.out
    roomy = write_tiny(tmp_path / "roomy.gguf", SCRIPT, max_context=8192)
    shown = dapji("eval", roomy, "--task", task, "--against", tiny)
    assert "4 requests to the other model were too long and lost the beginning of their context\n" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give either EXAM or --task"),
        (["EXAM", "--task", "TASK"], 2, "give either EXAM or --task"),
        (["--task", "TASK", "--judge", "TINY"], 2, "--judge goes with EXAM alone"),
        (["EXAM", "--few-shot", "1"], 2, "--few-shot goes with --task alone"),
        (["--task", "TASK", "--few-shot", "1"], 1, "the task 'known' says that it has 0 examples, --few-shot 1"),
        (["--task", "BROKEN"], 1, "cannot be loaded: FileNotFoundError"),
        (["--task", "CODE"], 1, "the task's generation_kwargs have 'num_beams', which the engine does not know"),
        (["--task", "LONG"], 1, "the task's answers have up to 5000 tokens, the context only 4096"),
    ],
)
def test_mistakes(arguments: list[str], code: int, message: str, tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"prompt": "a", "exact": "b"}')
    missing = {"data_files": {"test": str(tmp_path / "missing.jsonl")}}
    paths = {
        "TINY": tiny,
        "EXAM": exam,
        "TASK": write_task(tmp_path, "known", num_fewshot=0),
        "BROKEN": write_task(tmp_path, "broken", dataset_kwargs=missing),
        "CODE": write_task(tmp_path, "code", generation_kwargs={"until": [], "num_beams": 2}),
        "LONG": write_task(tmp_path, "long", generation_kwargs={"until": [], "max_gen_toks": 5000}),
    }
    shown = dapji("eval", tiny, *(paths.get(argument, argument) for argument in arguments))
    assert (shown.code, shown.out) == (code, "")
    assert message in shown.err


def test_without_the_harness(tiny: Path, dapji: Dapji, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dapji.evaluation.") or name == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "lm-eval is not installed\nhint: pip install 'dapji[eval]'" in dapji("eval", tiny, "--task", "known").err
