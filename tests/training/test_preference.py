"""Preferences against TRL on transformers' model; losses however they are split; references that are kept."""

from __future__ import annotations

import json
import signal
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from test_trainer import oracle
from test_tune import exact, lines
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

import tiny_training as tiny
from dapji.errors import FormatError
from dapji.models import families
from dapji.ops.tensor import Tensor
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Sample, Sequence
from dapji.training.data.stream import Stream, Window
from dapji.training.kto_data import mismatched
from dapji.training.methods import make_method, make_source
from dapji.training.network import Network
from dapji.training.preference import Answers, Orpo
from dapji.training.reference import ReferencedSource, reference_log_probs
from dapji.training.settings import (
    DpoSettings,
    KtoSettings,
    MethodSettings,
    OrpoSettings,
    SimpoSettings,
    read_recipe,
)
from dapji.training.trainer import Method
from dapji.training.tune import tune

PAIRS = [((4, 9), (4, 17)), ((3, 25), (3, 8)), ((7, 3), (7, 2)), ((2, 30), (2, 31))]
"""Tokens of the prompt and of the answer, of chosen and rejected."""
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
"""float32: log-probabilities are sums of up to 30 terms of about 5, so their errors are about 1e-5, times beta."""
METHODS: list[MethodSettings] = [
    DpoSettings(beta=0.3),
    DpoSettings(beta=0.3, label_smoothing=0.2),
    DpoSettings(beta=2.0, length_normalised=True),
    SimpoSettings(beta=2.5, gamma=0.7, label_smoothing=0.1),
    OrpoSettings(beta=0.4),
    KtoSettings(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8),
]


def ident(settings: MethodSettings) -> str:
    return ",".join([type(settings).__name__.removesuffix("Settings").lower(), *map(str, vars_of(settings))])


def vars_of(settings: MethodSettings) -> list[Any]:
    return [getattr(settings, name) for name in settings.__struct_fields__]


def sequence(random: np.random.Generator, prompt: int, answer: int) -> Sequence:
    ids = random.integers(3, 259, prompt + answer).astype(np.int32)
    return Sequence(ids=ids, learned=np.arange(prompt + answer) >= prompt)


def samples(kind: str) -> list[Sample]:
    random = np.random.default_rng(4)
    pairs = [tuple(sequence(random, *lengths) for lengths in pair) for pair in PAIRS]
    if kind == "pairs":
        return [Sample(sequences=pair) for pair in pairs]
    return [Sample(sequences=(pair[i % 2],), good=i % 3 > 0) for i, pair in enumerate(pairs)]


def source_of(settings: MethodSettings, folder: Path, capacity: int = 512) -> tuple[Any, int]:
    """Windows with a reference that is another model than the one that is trained; how many an epoch has."""
    dataset = Dataset.write(folder / "data", samples(settings.examples))
    if settings.examples == "rated":
        dataset = mismatched(dataset, folder / "data", max_length=64, seed=0)
    stream = Stream(dataset, capacity=capacity)
    source = make_source(settings, stream, tiny.network(tiny.config(), seed=1), folder / "reference.bin")
    return source, len(stream.epoch(0))


def sums(values: float | int, *others: float) -> tuple[float, ...]:
    return (values, *others)


def results(method: Method, network: Network, windows: list[Window]) -> tuple[float, dict[str, torch.Tensor], Any]:
    """The loss of a step, its gradients, and the method's metrics."""
    with torch.no_grad():
        method.begin(network, [(window, True) for window in windows], sums)
    count = sum(method.count(window) for window in windows)
    loss, metrics = 0.0, defaultdict(lambda: np.zeros(2))
    for window in windows:
        outcome = method.loss(network, window)
        given = outcome.loss / count
        given.backward()
        loss += given.item()
        for name, pair in outcome.metrics.items():
            metrics[name] += pair
    found = {name: parameter.grad for name, parameter in network.trained().items()}
    network.zero_grad(set_to_none=True)
    return loss, found, {name: value / number for name, (value, number) in metrics.items()}


def same_gradients(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(ours[name] / scale, theirs[name] / scale, **CLOSE, msg=name)


@pytest.mark.parametrize("settings", METHODS, ids=ident)
def test_a_step_does_not_depend_on_its_split(settings: MethodSettings, tmp_path: Path) -> None:
    """All in one window, and each pair or answer in a window of its own."""
    network, method = tiny.network(tiny.config()), make_method(settings)
    (tmp_path / "whole").mkdir()
    (tmp_path / "apart").mkdir()
    whole, n = source_of(settings, tmp_path / "whole")
    assert n == 1
    apart, n = source_of(settings, tmp_path / "apart", capacity=72)
    assert n > 1
    one = results(method, network, whole.take([0]))
    many = results(method, network, apart.take(range(n)))
    assert one[0] == pytest.approx(many[0], rel=1e-5)
    same_gradients(many[1], one[1])
    assert one[2] == pytest.approx(many[2], rel=1e-4, abs=1e-5)


def trainer(**settings: Any) -> Any:
    """What a trainer of TRL has when it computes a loss, on one CPU."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda x: x,
    )
    return SimpleNamespace(
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def padded(sequences: list[Sequence], prefix: str = "") -> dict[str, torch.Tensor]:
    def pad(rows: list[np.ndarray]) -> torch.Tensor:
        tensors = [torch.tensor(np.asarray(row, dtype=np.int64)) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    return {
        f"{prefix}input_ids": pad([each.ids for each in sequences]),
        f"{prefix}attention_mask": pad([np.ones_like(each.ids) for each in sequences]),
        f"{prefix}completion_mask": pad([each.learned for each in sequences]),
    }


def logps(model: transformers.PreTrainedModel, batch: Mapping[str, torch.Tensor], *, average: bool) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average)


def by_trl(
    settings: MethodSettings, dataset: Dataset, model: Any, reference: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss of all samples, and TRL's metrics by our names."""
    every = [dataset[i] for i in range(len(dataset))]
    if isinstance(settings, KtoSettings):
        batch = padded([sample.sequences[0] for sample in every]) | padded([s.sequences[1] for s in every], "KL_")
        batch["label"] = torch.tensor([sample.good for sample in every])
        self = trainer(
            model=model, ref_model=reference, calculate_KL=True, loss_type="kto", beta=settings.beta,
            desirable_weight=settings.desirable_weight, undesirable_weight=settings.undesirable_weight,
        )  # fmt: skip
        self._compute_kl_logps = lambda of, batch: KTOTrainer._compute_kl_logps(self, of, batch)
        loss = KTOTrainer._compute_loss(self, model, batch, False)
        names = {"kl": "kl", "rewards/chosen": "desirable_reward", "rewards/rejected": "undesirable_reward"}
        return loss, {ours: self._metrics["train"][theirs][0] for theirs, ours in names.items()}
    batch = padded([sample.sequences[side] for side in (0, 1) for sample in every])
    if isinstance(settings, DpoSettings) and not settings.label_smoothing:
        kind = "sigmoid_norm" if settings.length_normalised else "sigmoid"
        self = trainer(model=model, ref_model=reference, loss_types=[kind], beta=settings.beta, label_smoothing=0.0)
        loss = DPOTrainer._compute_loss(self, model, batch, False)
        names = {
            "accuracies": "accuracy",
            "margins": "margin",
            "chosen": "chosen_reward",
            "rejected": "rejected_reward",
        }
        found = {ours: self._metrics["train"][f"rewards/{theirs}"][0] for theirs, ours in names.items()}
        return loss, {} if settings.length_normalised else found  # whose rewards are of sums all the same
    average = isinstance(settings, SimpoSettings)
    values = logps(model, batch, average=average)
    if not average:
        values = values - logps(reference, batch, average=False).detach()
    assert isinstance(settings, DpoSettings | SimpoSettings)
    self = trainer(
        alpha=0.0, beta=settings.beta, label_smoothing=settings.label_smoothing,
        loss_type="simpo" if average else "sigmoid", simpo_gamma=getattr(settings, "gamma", None),
    )  # fmt: skip
    losses, chosen, rejected = CPOTrainer.cpo_loss(self, *values.chunk(2))
    return losses.mean(), {
        "chosen_reward": chosen.mean(), "rejected_reward": rejected.mean(),
        "margin": (chosen - rejected).mean(), "accuracy": (chosen > rejected).float().mean(),
    }  # fmt: skip


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def as_hf(gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Moved as weights are."""
    _, tensors = families.to_hf(
        tiny.config(), {name: Tensor.from_float32(name, value.numpy()) for name, value in gradients.items()}
    )
    return {name: torch.tensor(tensor.float32()) for name, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # TRL asks transformers for it
@pytest.mark.parametrize("settings", [each for each in METHODS if not isinstance(each, OrpoSettings)], ids=ident)
def test_losses_and_gradients_are_those_of_trl(settings: MethodSettings, tmp_path: Path) -> None:
    source, _ = source_of(settings, tmp_path)
    loss, gradients, metrics = results(make_method(settings), tiny.network(tiny.config()), source.take([0]))
    model, reference = oracle(), oracle(seed=1)
    for each in (model, reference):
        add_fused_lm_head(each, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    theirs, measured = by_trl(settings, Dataset(tmp_path / "data"), model, reference)
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    same_gradients(as_hf(gradients), gradients_of(model))
    for name, value in measured.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
    if isinstance(settings, KtoSettings):
        assert metrics["kl"] > 0.01  # so that it says something


def test_orpo_is_that_of_trl(tmp_path: Path) -> None:
    """TRL learns the chosen prompt as well, and takes the mean over all tokens of a batch, where the paper has a mean
    over pairs: one pair after another, whose prompts are one token that nothing is before."""
    settings, model, network = OrpoSettings(beta=0.4), oracle(), tiny.network(tiny.config())
    random = np.random.default_rng(0)
    pairs = [Sample(sequences=(sequence(random, 1, a), sequence(random, 1, b))) for a, b in ((9, 20), (12, 5))]
    stream = Stream(Dataset.write(tmp_path / "data", pairs), capacity=72)
    loss, gradients, metrics = results(make_method(settings), network, stream.take([0]))
    want, self = 0.0, trainer(beta=0.4, is_encoder_decoder=False, padding_value=0)
    self.concatenated_inputs = ORPOTrainer.concatenated_inputs
    self.get_batch_logps = ORPOTrainer.get_batch_logps
    self.concatenated_forward = lambda *given: ORPOTrainer.concatenated_forward(self, *given)
    self.odds_ratio_loss = lambda *given: ORPOTrainer.odds_ratio_loss(self, *given)
    measured = defaultdict(float)
    for pair in pairs:
        batch = {}
        for side, each in zip(("chosen", "rejected"), pair.sequences, strict=True):
            one = padded([each])
            labels = one["input_ids"].masked_fill(one.pop("completion_mask") == 0, -100)
            batch |= {f"{side}_{name}": value for name, value in one.items()} | {f"{side}_labels": labels}
        given, theirs = ORPOTrainer.get_batch_loss_metrics(self, model, batch)
        (given / len(pairs)).backward()
        want += given.item() / len(pairs)
        for name, value in theirs.items():
            measured[name] += value / len(pairs)
    assert loss == pytest.approx(want, rel=1e-5)
    same_gradients(as_hf(gradients), gradients_of(model))
    assert metrics["margin"] == pytest.approx(measured["rewards/margins"], rel=1e-4)
    assert metrics["accuracy"] == measured["rewards/accuracies"]


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    certain, other = (torch.tensor([value], requires_grad=True) for value in (0.0, -3.0))
    one = torch.ones(1)
    given = Orpo(OrpoSettings()).compare(
        Answers(log_probs=certain, lengths=one, reference=None), Answers(log_probs=other, lengths=one, reference=None)
    )
    given.losses.sum().backward()
    assert all(torch.isfinite(value).all() for value in (given.losses, certain.grad, other.grad))


def test_a_reference_is_computed_once(tmp_path: Path) -> None:
    """What a killed run has written stays; the rest is computed by the model that it begins from."""
    stream = Stream(Dataset.write(tmp_path / "data", samples("pairs")), capacity=72)
    first, path, told = tiny.network(tiny.config()), tmp_path / "reference.bin", []
    values = np.array(reference_log_probs(first, stream, path, lambda *done: told.append(done)))
    assert told == [(i + 1, len(stream.epoch(0))) for i in range(len(stream.epoch(0)))]
    for index in range(len(values)):
        for side, each in enumerate(Dataset(tmp_path / "data")[index].sequences):
            ids = torch.tensor(each.ids[None].astype(np.int64))
            with torch.no_grad():
                table = F.log_softmax(oracle()(ids).logits[0, :-1], dim=-1)
            taken = table.gather(1, ids[0, 1:, None])[torch.tensor(each.learned[1:])]
            assert values[index, side] == pytest.approx(taken.sum().item(), rel=1e-5)
    broken = values.copy()
    broken[2] = np.nan
    path.write_bytes(broken.tobytes())
    told.clear()
    assert np.array_equal(reference_log_probs(first, stream, path, lambda *done: told.append(done)), values)
    assert told == [(1, 1)]
    other = tiny.network(tiny.config(), seed=1)
    assert np.array_equal(reference_log_probs(other, stream, path), values)
    (window,) = ReferencedSource(stream, values).take([0])
    assert window.reference.tolist() == [v for s in window.samples[::2] for v in values[s]]


def test_mismatched_answers_are_those_of_others(tmp_path: Path) -> None:
    """Each answer once, behind another's prompt, cut where there is no room for all of it."""
    rated = samples("rated") * 5
    dataset = mismatched(Dataset.write(tmp_path / "data", rated), tmp_path / "data", max_length=20, seed=3)
    met = []
    for i, own in enumerate(rated):
        first, second = dataset[i].sequences
        assert dataset[i].good == own.good
        assert first.ids.tolist() == own.sequences[0].ids.tolist()
        prompt = first.ids[~first.learned]
        assert second.ids[: len(prompt)].tolist() == prompt.tolist()
        assert len(second.ids) <= 20
        answer = second.ids[second.learned]
        assert len(prompt) + len(answer) == len(second.ids)
        found = [
            j
            for j, other in enumerate(rated)
            if other.sequences[0].ids[other.sequences[0].learned][: len(answer)].tolist() == answer.tolist()
        ]
        assert found
        met.append(found)
    assert len({tuple(found) for found in met}) == len(PAIRS)
    with pytest.raises(FormatError, match="two examples at least"):
        mismatched(Dataset.write(tmp_path / "one", rated[:1]), tmp_path / "one", max_length=20, seed=3)


RUN = "[lora]\nrank = 4\n[optimizer]\nlearning_rate = 2e-2\n[run]\nepochs = 8\nbatch = 1\nsave_every = 1"


def recipe_of(folder: Path, settings: str, *, name: str = "run", rated: bool = False) -> Any:
    write = tiny.write_rated if rated else tiny.write_pairs
    files = [json.dumps([str(write(folder / f"{first}.jsonl", first=first))]) for first in (0, 16)]
    path = tiny.write_recipe(folder, settings, RUN, name=name, window=64)
    return read_recipe(path, changes={"data.train": files[0], "data.evaluate": files[1]})


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo"])
def test_a_run_prefers_what_it_is_told_to(method: str, tmp_path: Path) -> None:
    assert tune(recipe_of(tmp_path, f'[method]\nname = "{method}"'))
    metrics = lines(tmp_path / "run")
    before, after = metrics[0], metrics[-1]
    assert after["evaluation_accuracy"] >= 0.9
    assert after["evaluation_margin"] > before["evaluation_margin"]
    assert after["evaluation_loss"] < before["evaluation_loss"]
    if method == "dpo":
        assert before["evaluation_loss"] == pytest.approx(np.log(2))  # the reference is where it begins
        assert before["evaluation_accuracy"] == 0
    steps = [line for line in metrics if "loss" in line]
    assert all({"accuracy", "margin", "chosen_reward", "rejected_reward"} <= line.keys() for line in steps)


def interrupted(recipe: Any, step: int) -> None:
    def interrupt(metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGINT)

    assert not tune(recipe, report=interrupt)


@pytest.mark.parametrize("full", [True, False])
def test_rated_answers_and_resuming(full: bool, tmp_path: Path) -> None:
    """An interrupted run has the weights and the metrics of one that was not, bit for bit: its reference is the base,
    not what had been trained."""

    def make(name: str) -> Any:
        recipe = recipe_of(tmp_path, '[method]\nname = "kto"\nundesirable_weight = 1.5', name=name, rated=True)
        return msgspec.structs.replace(recipe, lora=None) if full else recipe

    interrupted(make("run"), step=3)
    assert tune(make("run"), resume=True)
    assert tune(make("whole"))
    assert exact(lines(tmp_path / "run")) == exact(lines(tmp_path / "whole"))
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / path.name).read_bytes()
    metrics = lines(tmp_path / "run")
    assert metrics[0]["evaluation_kl"] == 0
    assert metrics[0]["evaluation_desirable_reward"] == 0
    assert metrics[-1]["evaluation_desirable_reward"] > metrics[-1]["evaluation_undesirable_reward"] + 0.1


def test_data_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"data.train: preferences are nothing for this method.*answers with ratings"):
        tune(recipe_of(tmp_path, '[method]\nname = "kto"'))
    with pytest.raises(FormatError, match=r"data.train: preferences are nothing.*conversations"):
        tune(recipe_of(tmp_path, "", name="other"))
    recipe = recipe_of(tmp_path, '[method]\nname = "dpo"', name="long")
    text = json.dumps({"prompt": "?", "chosen": "a" * 40, "rejected": "b"}) + "\n"
    (tmp_path / "0.jsonl").write_text(text)
    with pytest.raises(FormatError, match=r"0.jsonl:1: 4\d tokens, but the context has 32"):
        tune(recipe)
