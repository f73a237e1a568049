"""Learning from a teacher: the divergence against plain torch, the teacher's opinions against transformers, a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_network import gradients
from test_preference import same_gradients
from test_trainer import oracle
from test_tune import lines

import tiny_training as tiny
from byte_tokenizers import Tokenizers
from dapji.errors import ConfigError, UsageError
from dapji.model import load
from dapji.proof.lineage import read_lineage
from dapji.training import loss
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Sample, Sequence
from dapji.training.data.stream import Stream
from dapji.training.distillation import Distillation
from dapji.training.loss import distillation_losses
from dapji.training.settings import DistillSettings, read_recipe
from dapji.training.teacher import Opinions, Taught, TaughtSource, check_alike
from dapji.training.tune import tune

V = 50


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("k", [1, 7, V - 1])
def test_divergence_and_gradients(monkeypatch: pytest.MonkeyPatch, k: int, softcap: float | None) -> None:
    """With all tokens but one kept, it is KL over the whole vocabulary. Rows in several chunks."""
    monkeypatch.setattr(loss, "_CHUNK_VALUES", 1)
    torch.manual_seed(0)
    hidden, head = torch.randn(130, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    labels, teacher = torch.randint(V, (130,)), F.log_softmax(2 * torch.randn(130, V), dim=1)
    top_log_probs, top = teacher.topk(k)
    ours = distillation_losses(hidden, head, labels, top, top_log_probs, softcap)
    (ours[0].sum() + 3 * ours[1].sum()).backward()
    got = hidden.grad, head.grad
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    student = F.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=1)
    kept = torch.zeros(130, V, dtype=torch.bool).scatter(1, top, True)
    p, q = teacher.exp(), student.exp()
    rest_p, rest_q = (p * ~kept).sum(1), (q * ~kept).sum(1)
    want = (p * (teacher - student) * kept).sum(1) + rest_p * (rest_p / rest_q).log()
    if k == V - 1:
        torch.testing.assert_close(want, F.kl_div(student, teacher, log_target=True, reduction="none").sum(1))
    else:
        assert (want <= F.kl_div(student, teacher, log_target=True, reduction="none").sum(1) + 1e-6).all()
    nll = F.cross_entropy(student, labels, reduction="none")
    (nll.sum() + 3 * want.sum()).backward()
    # float32, sums over 50 terms of up to 10
    torch.testing.assert_close(ours[0], nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], want, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got, (hidden.grad, head.grad), rtol=1e-3, atol=1e-4)


def test_a_student_that_is_its_teacher_differs_by_nothing() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 8), torch.randn(V, 8)
    top_log_probs, top = F.log_softmax(hidden @ head.T, dim=1).topk(5)
    _, divergences = distillation_losses(hidden, head, torch.zeros(9, dtype=torch.int64), top, top_log_probs)
    assert divergences.abs().max() < 1e-6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("teacher") / "teacher.gguf", seed=1)


def dataset(folder: Path) -> Dataset:
    random = np.random.default_rng(0)
    samples = []
    for n in (9, 20, 14):
        learned = random.random(n) < 0.6
        learned[:3], learned[-1] = False, True
        samples.append(Sample(sequences=(Sequence(ids=random.integers(3, 259, n).astype(np.int32), learned=learned),)))
    return Dataset.write(folder, samples)


def test_what_the_teacher_thinks(teacher: Path, tmp_path: Path) -> None:
    """Transformers' likeliest tokens before each learned one. What is there is not computed again."""
    data, path = dataset(tmp_path / "data"), tmp_path / "teacher.bin"
    opinions, told = Opinions(path, data, 6, vocab_size=259), []
    assert opinions.missing() == [0, 1, 2]
    with load(teacher, kv="f32", context=64) as model:
        opinions.compute(model.engine, lambda *done: told.append(done))
        assert told == [(3, 3)]
        model_of_theirs = oracle(seed=1)
        for sample in range(3):
            (sequence,) = data[sample].sequences
            with torch.no_grad():
                logits = model_of_theirs(torch.tensor(sequence.ids[None].astype(np.int64))).logits[0]
            rows = F.log_softmax(logits, dim=-1)[np.flatnonzero(sequence.learned) - 1]
            values, ids = rows.topk(6)
            assert opinions[sample]["token"].tolist() == ids.tolist()
            np.testing.assert_allclose(opinions[sample]["log_prob"], values, atol=1e-4)  # float32 in another order
        kept = path.read_bytes()
        opinions[1]["log_prob"][:] = np.nan
        again = Opinions(path, data, 6, vocab_size=259)
        assert again.missing() == [1]
        again.compute(model.engine, lambda done, total: None)
    assert path.read_bytes() == kept
    (window,) = TaughtSource(Stream(data, capacity=64), again).take([0])
    assert window.top.shape == (len(window.labels), 6)
    first = int(window.samples[0])
    assert window.top[: len(again[first])].tolist() == again[first]["token"].tolist()
    with pytest.raises(UsageError, match=r"method.k \(259\) must be less than the vocabulary's 259"):
        Opinions(tmp_path / "other.bin", data, 259, vocab_size=259)
    with load(teacher, context=64) as model, pytest.raises(ConfigError, match="the teacher gives token"):
        Opinions(tmp_path / "small.bin", data, 6, vocab_size=50).compute(model.engine, lambda done, total: None)


def test_a_step_does_not_depend_on_its_split() -> None:
    packed, random = tiny.window([9, 14, 6]), np.random.default_rng(0)
    n = len(packed.labels)
    top = np.stack([random.permutation(259)[:5] for _ in range(n)]).astype(np.int32)
    top_log_probs = np.log(random.dirichlet(np.ones(6), n)[:, :5]).astype(np.float32)
    split = np.cumsum([6, 11])
    whole = Taught(**vars(packed), top=top, top_log_probs=top_log_probs)
    apart = [
        Taught(**vars(window), top=a, top_log_probs=b)
        for window, a, b in zip(tiny.alone(packed), np.split(top, split), np.split(top_log_probs, split), strict=True)
    ]
    network, method = tiny.network(tiny.config()), Distillation(DistillSettings(teacher="any", weight=0.7))
    same_gradients(gradients(network, apart, method), gradients(network, [whole], method))


RUN = "[optimizer]\nlearning_rate = 1e-2\n[run]\nepochs = 6\nbatch = 2"


def test_a_run_comes_nearer_to_its_teacher(teacher: Path, tmp_path: Path) -> None:
    method = f'[method]\nname = "distill"\nteacher = "{teacher}"\nk = 16\nweight = 1.0'
    told: list[Any] = []
    recipe = read_recipe(tiny.write_recipe(tmp_path, method, RUN))
    assert tune(recipe, prepare=lambda *done: told.append(done))
    assert told[-1] == (8, 8)
    metrics = lines(tmp_path / "run")
    assert metrics[-1]["evaluation_kl"] < 0.7 * metrics[0]["evaluation_kl"]
    assert metrics[-1]["evaluation_loss"] == pytest.approx(metrics[-1]["evaluation_kl"])
    lineage = read_lineage(tmp_path / "run")
    assert lineage is not None
    assert [list(each.files) for each in lineage.parents if each.role == "teacher"] == [["teacher.gguf"]]


def test_what_the_teacher_has_said_is_kept_when_a_run_is_cut_off(teacher: Path, tmp_path: Path) -> None:
    """Before the first step, when there is no checkpoint yet; of another recipe nothing is kept."""
    method = f'[method]\nname = "distill"\nteacher = "{teacher}"\nk = 4'
    recipe = read_recipe(tiny.write_recipe(tmp_path, method, RUN), changes={"run.steps": "1"})

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    told: list[Any] = []
    for other in (False, True):
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, prepare=stop)
        changed = msgspec.structs.replace(recipe, seed=1) if other else recipe
        told.clear()
        assert tune(changed, resume=True, prepare=lambda *done: told.append(done))
        assert told == ([(24, 24), (8, 8)] if other else [(8, 8)])  # of train and of evaluate
        shutil.rmtree(tmp_path / "run")


def test_a_student_learns_from_what_its_teacher_thinks_of_its_answers(teacher: Path, tmp_path: Path) -> None:
    """Each token's advantage is how much likelier transformers finds it by the teacher's weights than it was."""
    rows = "".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4))
    (tmp_path / "prompts.jsonl").write_text(rows)
    method = f'[method]\nname = "on-policy"\nteacher = "{teacher}"\nmax_tokens = 12\ngroup = 4'
    path = tiny.write_recipe(
        tmp_path, method, "[optimizer]\nlearning_rate = 1e-2\n[run]\nsteps = 20\nbatch = 4", window=64
    )
    data = json.dumps([str(tmp_path / "prompts.jsonl")])
    assert tune(read_recipe(path, changes={"data.train": data, "data.evaluate": data}))
    kept = [json.loads(line) for line in (tmp_path / "run/rollouts/step-00000001.jsonl").read_text().splitlines()]
    assert len(kept) == 16
    for line in kept:
        ids = torch.tensor([[*line["prompt_tokens"], *line["tokens"]]])
        with torch.no_grad():
            rows_of = F.log_softmax(oracle(seed=1)(ids).logits[0, len(line["prompt_tokens"]) - 1 : -1], dim=-1)
        theirs = rows_of.gather(1, ids[0, len(line["prompt_tokens"]) :, None]).squeeze(1).numpy()
        # a teacher's cache is float16: 3e-3 was measured
        np.testing.assert_allclose(line["advantages"], theirs - line["log_probs"], atol=1e-2)
        assert line["reward"] == pytest.approx(np.mean(line["advantages"]))
    rewards = [line["reward"] for line in lines(tmp_path / "run") if "reward" in line]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    lineage = read_lineage(tmp_path / "run")
    assert lineage is not None
    assert [each.role for each in lineage.parents] == ["base", "teacher"]


def test_a_teacher_with_other_tokens_is_refused(both: Tokenizers, teacher: Path) -> None:
    with load(teacher, context=64) as model:
        check_alike(model.tokenizer, model.tokenizer)
        with pytest.raises(ConfigError, match=r"the teacher has|to the teacher and"):
            check_alike(both.ours, model.tokenizer)
