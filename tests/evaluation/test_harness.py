"""Tasks of lm-evaluation-harness: our model in its place, against its own model of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from dapji.evaluation.harness import HarnessModel
from dapji.model import Model, load
from tiny import CHATML, alphabet

pytestmark = pytest.mark.filterwarnings("ignore")
MAX_LENGTH = 96
SOUNDS = [("moo", 1), ("meow", 2), ("cluck", 1), ("mooo", 16), ("음매", 12), (" ", 3)]
DOCUMENTS = [
    {"question": f"Who says {sound}?", "choices": ["cat", "cow", "hen"], "answer": i % 3, "text": f"{sound} a cow " * n}
    for i, (sound, n) in enumerate(SOUNDS)
]
"""Two texts are longer than the context."""
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "empty": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{text}}\nA:",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["o"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}
CASES = [("choice", 0, False), ("choice", 2, False), ("choice", 1, True), ("empty", 0, False), ("texts", 0, False)]
CASES += [("answer", 0, False), ("answer", 1, True)]


def write_model(folder: Path, *, bos: bool) -> transformers.PreTrainedModel:
    """A random Llama, with a tokenizer that merges, with BOS before a text or without, and a chat template."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("c", "a"), ("ca", "t"), ("o", "w"), ("o", "o"), ("m", "oo"), ("Ġ", "c"), ("e", "n"), ("h", "en")]
    vocabulary = [*control, *alphabet(), *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if bos:
        made.post_processor = processors.TemplateProcessing(single=f"{control[0]} $A", special_tokens=[(control[0], 0)])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,  # so that some continuations are much likelier than others
        bos_token_id=0,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=control[0], eos_token=control[2], pad_token=control[2]
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["without BOS", "with BOS"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, HFLM]]:
    """The same model on our reference executor and in transformers, both in float32."""
    folder = tmp_path_factory.mktemp("model")
    model = write_model(folder, bos=request.param)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=MAX_LENGTH, batch_size=4)
    with load(folder, executor="reference", kv="f32") as ours:
        yield ours, theirs


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        splits = {"test_split": "test", "fewshot_split": "test"}
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **splits, **files, **task}))  # YAML holds JSON
    return folder


def run(model: LM, task: Path, few_shot: int, chat: bool) -> dict[str, Any]:
    loaded = TaskManager(include_defaults=False).load([str(task)])
    for each in loaded["tasks"].values():
        each.set_config(key="num_fewshot", value=few_shot)
        each.set_fewshot_seed(seed=1)
    found: dict[str, Any] = lm_eval.evaluate(
        lm=model, task_dict=loaded, apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=0
    )
    return found


@pytest.mark.parametrize(("name", "few_shot", "chat"), CASES)
def test_scores_are_those_of_transformers(
    name: str, few_shot: int, chat: bool, pair: tuple[Model, HFLM], task_folder: Path
) -> None:
    model = HarnessModel(pair[0])
    ours, theirs = (run(each, task_folder / f"{name}.yaml", few_shot, chat) for each in (model, pair[1]))
    for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        assert mine["arguments"] == other["arguments"], "the same questions"
        for (got,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
            if name == "answer":
                assert got == expected
            elif name == "texts":
                assert got == pytest.approx(expected, rel=1e-4)  # float32, summed in another order
            else:
                assert got[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
                assert got[1] == expected[1], "greedy or not"
    metrics = [key for key, value in theirs["results"][name].items() if "," in key and value != "N/A"]
    assert metrics
    for key in metrics:
        assert ours["results"][name][key] == pytest.approx(theirs["results"][name][key], rel=1e-4)
    if name == "answer":
        assert model.cut == sum(len(tokens) > MAX_LENGTH - 12 for tokens in map(model.tok_encode, contexts(ours, name)))
        assert model.cut >= 2


def contexts(found: dict[str, Any], name: str) -> list[str]:
    return [arguments[0] for sample in found["samples"][name] for arguments in sample["arguments"]]
