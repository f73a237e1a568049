"""Settings of a run: what a recipe says. Strict: a key that is unknown is refused by its name. Knows no torch."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

import msgspec

from dapji.errors import ConfigError, UsageError
from dapji.models.adapter import adaptable
from dapji.models.config import ModelConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]

PEFT_NAMES = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.o",
    "gate_proj": "feed_forward.gate",
    "up_proj": "feed_forward.up",
    "down_proj": "feed_forward.down",
}
"""What people call the targets of adapters -> the ends of our names."""


def layer_matrices(config: ModelConfig) -> list[str]:
    """Canonical names of what adapters usually change: every matrix of the layers but routers."""
    return [name for name in adaptable(config) if name.startswith("layers.") and not name.endswith(".router")]


class DataSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    train: Annotated[list[str], msgspec.Meta(min_length=1)]
    """Files of examples."""
    evaluate: list[str] = []
    """Files that are held out."""
    format: str | None = None
    """The convention that all are in; None: what their fields say."""
    separator: str | None = None
    """The line between two texts of a text file (.txt, .md); None: a file is one text."""
    window: Positive = 1024
    """Tokens that are computed at once: examples are packed into windows of this size. The longest example; of
    two answers that stay in one window, each has half of it."""
    truncate: bool = False
    """Cut longer examples, which are refused otherwise."""
    skip_invalid: bool = False
    """Leave out rows that cannot be learned, which are refused otherwise."""
    licences: dict[str, str] = {}
    """File of `train` or `evaluate` -> the licence that it is under, for the lineage; mostly a name of SPDX."""

    def __post_init__(self) -> None:
        for file in self.licences.keys() - {*self.train, *self.evaluate}:
            raise ValueError(f"data.licences names {file!r}, which is none of the files that are used")


class LoraSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter (LoRA, Hu et al. 2021)."""

    rank: Positive = 16
    alpha: Annotated[float, msgspec.Meta(gt=0)] = 32
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023), not by alpha / rank."""
    dora: bool = False
    """Learn how long each row of a changed matrix is, apart from where it points (Liu et al. 2024)."""
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    targets: list[str] = []
    """Ends of canonical names (attention.q), or PEFT's (q_proj); none: every matrix of the layers."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def chosen(self, config: ModelConfig) -> list[str]:
        """Canonical names of the weights that change. Raises ConfigError where a target is none."""
        possible = layer_matrices(config)
        if not self.targets:
            return possible
        ends = {target: f".{PEFT_NAMES.get(target, target)}" for target in self.targets}
        for target, end in ends.items():
            if not any(f".{name}".endswith(end) for name in possible):
                known = sorted({name.split(".", 2)[2] for name in possible})
                raise ConfigError(
                    f"lora.targets: {target!r} is no matrix of this model", hint=f"of each layer: {', '.join(known)}"
                )
        return [name for name in possible if f".{name}".endswith(tuple(ends.values()))]


class _Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"):
    """What is learned of examples: the table [method], whose `name` says which has the settings beside it."""

    examples: ClassVar[Literal["texts", "pairs", "rated", "prompts"]] = "pairs"
    """What its files hold: conversations, prompts with completions and texts; preferences; answers that are rated;
    prompts alone."""


class SupervisedSettings(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="supervised"):
    examples = "texts"


class DpoSettings(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dpo"):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    """How closely the model is held to the one that it begins from."""
    label_smoothing: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.0
    """The share of pairs that are expected to be the wrong way round (cDPO, Mitchell 2023)."""
    length_normalised: bool = False
    """Compare means over the tokens of an answer, not sums."""


class KtoSettings(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="kto"):
    """Answers that are good or not, one by one (Ethayarajh et al. 2024)."""

    examples = "rated"
    beta: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    desirable_weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    undesirable_weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """The paper advises weights that, times the numbers of good and bad answers, are from 1 : 1 to 4 : 3."""


class OrpoSettings(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="orpo"):
    """The chosen answer is learned, with odds against the rejected one (Hong et al. 2024). Needs no reference."""

    beta: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    """The weight of the odds, the paper's lambda."""


class SimpoSettings(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="simpo"):
    """Mean log-probabilities compared, with a margin (Meng et al. 2024). Needs no reference."""

    beta: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    gamma: Amount = 1.0
    """The margin by which beta times the difference has to exceed 0."""
    label_smoothing: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.0
    """As DPO's."""


class RolloutSettings(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of methods that learn from answers of the model itself."""

    examples = "prompts"
    group: Positive = 1
    """Answers to a prompt."""
    max_tokens: Positive = 256
    """The longest answer."""
    reuse: Positive = 1
    """Steps that learn from the same answers."""
    clip: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2
    """How far a token's probability may be from what it was when the answer was written, before it is left alone."""
    kl: Amount = 0.0
    """The weight of the divergence from the model that training begins from."""


class GrpoSettings(RolloutSettings, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="grpo"):
    """Answers are rewarded, each against others to the same prompt (Shao et al. 2024)."""

    reward: str
    """PATH.py:FUNCTION, as `rewards.Reward` loads it."""
    group: Annotated[int, msgspec.Meta(ge=2)] = 8
    scale: bool = True
    """Divide what a reward is above its group's mean by the group's standard deviation; false: Liu et al. 2025."""


class OnPolicySettings(RolloutSettings, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="on-policy"):
    """A teacher says of each token of an answer how likely it is (Agarwal et al. 2024)."""

    teacher: str
    """As DistillSettings'."""


class DistillSettings(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="distill"):
    """A teacher's distributions are learned beside the labels (Hinton et al. 2015)."""

    examples = "texts"
    teacher: str
    """A model with the same tokens: a name of `dapji list`, a GGUF file, or a folder."""
    k: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    """The teacher's likeliest tokens that are kept for each learned token; the others count as one."""
    weight: Share = 0.5
    """Of the divergence from the teacher; the rest of 1 is that of the labels."""


MethodSettings: TypeAlias = (
    SupervisedSettings
    | DpoSettings
    | KtoSettings
    | OrpoSettings
    | SimpoSettings
    | GrpoSettings
    | OnPolicySettings
    | DistillSettings
)


class OptimizerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW (Loshchilov and Hutter 2019), its rate rising linearly at first."""

    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls, to 0 at the end."""
    warmup: Share = 0.03
    """The share of all steps in which the rate rises."""
    weight_decay: Amount = 0.0
    """Of matrices; norms and biases have none."""
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Annotated[float, msgspec.Meta(gt=0)] = 1e-8
    clip: Amount = 1.0
    """Longest gradient; 0: any."""

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of so many."""
        warmup = math.ceil(self.warmup * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        along = (step - warmup) / max(1, steps - warmup)
        share = {"cosine": (1 + math.cos(math.pi * along)) / 2, "linear": 1 - along, "constant": 1.0}[self.schedule]
        return self.learning_rate * share


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    epochs: Annotated[float, msgspec.Meta(gt=0)] = 1
    """Times that every example is seen."""
    steps: Positive | None = None
    """End after so many steps, whatever `epochs` says."""
    batch: Positive = 8
    """Windows of each step, on all ranks together."""
    evaluate_every: Positive | None = None
    """Steps; None: at the end alone."""
    save_every: Positive = 100
    """Steps between checkpoints."""
    recompute: bool = False
    """Less memory, a third more to compute."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "stored"] = "float32"
    """Of weights that are not trained, and of activations. stored: the layers' matrices stay as the file has them, and
    are dequantised to float32 for each product (as Dettmers et al. 2023, QLoRA)."""
    writers: list[Literal["tensorboard", "wandb"]] = []
    """Other programs' logs that metrics go to as well."""


class SamplesSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answers of the model at each evaluation, for people to look at. Training is the same without them."""

    count: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Held-out examples that are answered; None: 4 on a CPU, and none on a device whose memory training may need."""
    prompts: list[str] = []
    """Asked beside them, each as a user's message; as it is, where the model has no chat template."""
    max_tokens: Positive = 128
    """The longest answer."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a run."""

    model: str
    """The base: a name of `dapji list`, a GGUF file, or a folder."""
    output: str
    """The folder of the run."""
    data: DataSettings
    method: MethodSettings = SupervisedSettings()
    seed: int = 0
    lora: LoraSettings | None = None
    """None: all weights are trained."""
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()
    samples: SamplesSettings = SamplesSettings()


def read_recipe(path: Path, *, profile: str | None = None, changes: dict[str, str] | None = None) -> Recipe:
    """A recipe in TOML. profile: a table of [profiles], whose keys are taken instead. changes: dotted key -> value in
    TOML, or a bare text. Raises UsageError with the name of what is wrong."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    profiles = given.pop("profiles", {})
    if profile is not None:
        if profile not in profiles:
            raise UsageError(f"{path}: no profile {profile!r}", hint=f"it has: {', '.join(profiles) or 'none'}")
        _merge(given, profiles[profile])
    for key, text in (changes or {}).items():
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(given, value)
    try:
        return msgspec.convert(given, Recipe)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}") from error


def write_recipe(recipe: Recipe) -> str:
    """The same settings in TOML, those that were left to themselves too."""
    lines: list[str] = []
    _write_table(msgspec.to_builtins(recipe), "", lines)
    return "\n".join(lines) + "\n"


def _write_table(table: dict[str, object], name: str, lines: list[str]) -> None:
    if name:
        lines += ["", f"[{name}]"]
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    # JSON's strings, numbers and lists of them are TOML's too; what is None is left out
    plain = {key: value for key, value in table.items() if key not in tables and value is not None}
    lines += [f"{_key(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items()]
    for key, value in tables.items():
        if value:
            _write_table(value, f"{name}.{key}" if name else key, lines)


def _key(key: str) -> str:
    """A bare key where TOML allows it, else a quoted one: the name of a file."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _merge(into: dict[str, object], other: dict[str, object]) -> None:
    for key, value in other.items():
        present = into.get(key)
        if isinstance(present, dict) and isinstance(value, dict):
            _merge(present, value)
        else:
            into[key] = value
