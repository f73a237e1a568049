"""Answers while a model learns: right, the same after a kill, and without any influence on what is learned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from test_sharding import torchrun
from test_tune import LORA, base_in_transformers, exact, interrupt_at, lines

import tiny_training as tiny
from dapji.errors import ContextError
from dapji.files import open_files
from dapji.training.data.encoding import Encoder
from dapji.training.data.reading import Reader
from dapji.training.samples import Reservoir, question_of
from dapji.training.settings import read_recipe
from dapji.training.tune import tune

RUN = "[optimizer]\nlearning_rate = 1e-2\n[run]\nepochs = 4\nbatch = 2\nevaluate_every = 5"
SAMPLES = '[samples]\ncount = 3\nprompts = ["1+1?"]\nmax_tokens = 12'


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def trained(folder: Path) -> bytes:
    (path,) = folder.glob("*.safetensors")
    return path.read_bytes()


@pytest.mark.parametrize(
    "tables", [RUN, f"{LORA}\n{RUN}", f'{LORA}\n{RUN}\ndtype = "stored"'], ids=["full", "lora", "stored"]
)
def test_training_is_bit_for_bit_the_same_without_them(tmp_path: Path, tables: str) -> None:
    assert tune(read_recipe(tiny.write_recipe(tmp_path, tables, SAMPLES, name="with")))
    assert tune(read_recipe(tiny.write_recipe(tmp_path, tables, "[samples]\ncount = 0", name="without")))
    assert exact(lines(tmp_path / "with")) == exact(lines(tmp_path / "without"))
    assert trained(tmp_path / "with") == trained(tmp_path / "without")
    assert samples(tmp_path / "without") == []
    found = samples(tmp_path / "with")
    evaluations = [line["step"] for line in lines(tmp_path / "with") if "evaluation_loss" in line]
    assert [line["step"] for line in found] == [step for step in evaluations for _ in range(4)]
    assert found[0]["prompt"] == "1+1?"
    assert found[0]["expected"] is None
    for line in found[1:4]:
        a, b = line["prompt"].removesuffix("?").split("+")
        assert line["expected"].replace(str(int(a) + int(b)), "") == ""
    assert found[0]["answer"] != found[-4]["answer"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("tables", ["", "[lora]\nrank = 4"], ids=["full", "lora"])
def test_the_last_are_what_transformers_answers_with_the_result(tmp_path: Path, tables: str) -> None:
    assert tune(read_recipe(tiny.write_recipe(tmp_path, tables, RUN, SAMPLES)))
    out = tmp_path / "run"
    if tables:
        model: Any = PeftModel.from_pretrained(base_in_transformers(tmp_path), out)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = open_files(tmp_path / "tiny.gguf").tokenizer()
    last = samples(out)[-4:]
    for sample in last:
        start, end = (tokenizer.control[name] for name in ("<|im_start|>", "<|im_end|>"))
        ids = tokenizer.encode_parts([start, f"user\n{sample['prompt']}", end, "\n", start, "assistant\n"])
        given = torch.tensor([ids])
        with torch.no_grad():
            answer = model.eval().generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False,
                eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=0,
            )[0, len(ids) :].tolist()  # fmt: skip
        assert (answer[-1] in tokenizer.stop_ids) == sample["ended"]
        assert tokenizer.decode([token for token in answer if token not in tokenizer.stop_ids]) == sample["answer"]


def test_a_run_that_goes_on_has_the_same(tmp_path: Path) -> None:
    recipe = read_recipe(tiny.write_recipe(tmp_path, RUN, SAMPLES))
    assert not tune(recipe, report=interrupt_at(7))
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"step": 8, "sample": 0, "prompt": "of a step that is lost"}\n{"step": 8, "samp')
    assert tune(recipe, resume=True)
    assert tune(read_recipe(tiny.write_recipe(tmp_path, RUN, SAMPLES, name="whole")))
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("tables", [RUN, f"{LORA}\n{RUN}"], ids=["full", "lora"])
def test_sharded_runs_have_them(tmp_path: Path, tables: str) -> None:
    torchrun(2, tiny.write_recipe(tmp_path, tables, SAMPLES))
    assert tune(read_recipe(tiny.write_recipe(tmp_path, tables, SAMPLES, name="alone")))
    sharded, alone = samples(tmp_path / "run"), samples(tmp_path / "alone")
    assert sharded[:4] == alone[:4]  # of the base
    assert [(line["step"], line["prompt"]) for line in sharded] == [(line["step"], line["prompt"]) for line in alone]


def test_questions_out_of_examples(tmp_path: Path) -> None:
    tokenizer = open_files(tiny.write_model(tmp_path / "tiny.gguf")).tokenizer()
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in
            (("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"))]},
        {"text": "from the beginning to its end"},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "completion": "bad", "label": False},
    ]  # fmt: skip
    found = []
    for i, row in enumerate(rows):
        path = tmp_path / f"{i}.jsonl"
        path.write_text(json.dumps(row))
        (entry,) = Reader(path, Encoder(tokenizer))
        question = question_of(entry, tokenizer)
        found.append((question.text, tokenizer.decode(question.ids), question.expected))
    assert found[0] == ("c?", "user\na?\nassistant\nb\nuser\nc?\nassistant\n", "d")
    assert found[1] == ("from the beginn", "from the beginn", "ing to its end")
    assert found[2] == ("p", "p", "good")
    assert found[3] == ("p", "p", None)


def test_every_example_is_as_likely_to_be_asked() -> None:
    counts: Counter[int] = Counter()
    for seed in range(3000):
        few = Reservoir[int](4, seed)
        for i in range(20):
            few.add(i)
        assert len({*few}) == 4
        assert [*few] == sorted(few)
        counts.update(few)
    # 600 of each are expected, with a standard deviation of 22
    assert all(abs(counts[i] - 600) < 110 for i in range(20))
    few = Reservoir(4, 0)
    few.add(7)
    assert [*few] == [7]


def test_a_prompt_needs_room(tmp_path: Path) -> None:
    recipe = read_recipe(tiny.write_recipe(tmp_path, RUN), changes={"samples.prompts": json.dumps(["x" * 600])})
    with pytest.raises(ContextError, match=r"samples.prompts\[0\] has \d+ tokens, .* context is 512"):
        tune(recipe)
