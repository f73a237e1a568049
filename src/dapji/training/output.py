"""What a run leaves: an adapter as PEFT reads it, or a whole model as transformers does, and where it came from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dapji.files import Files
from dapji.models.adapter import Adapter
from dapji.ops.tensor import Tensor
from dapji.proof.certificate import write_proof
from dapji.proof.lineage import DataFile, Lineage, Parent, Use, data_file, parent, versions
from dapji.training.actor import lora_pairs
from dapji.training.checkpoints import Progress
from dapji.training.network import Network
from dapji.training.settings import DistillSettings, GrpoSettings, OnPolicySettings, Recipe
from dapji.weights.adapter_file import write_adapter
from dapji.weights.convert import write_folder
from dapji.weights.sources_base import Progress as Bars
from dapji.weights.sources_base import sha256_file


def gathered(network: Network) -> dict[str, Tensor]:
    """What was trained, by name, as float32 on the host; of all ranks, which all call this."""
    values: dict[str, Tensor] = {}
    for name, parameter in network.trained().items():
        value: torch.Tensor = parameter.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        elif isinstance(network, FSDPModule):  # gathered for a step, in memory that is given back
            value = value.clone()
        values[name] = Tensor.from_float32(name, value.float().cpu().numpy())
    return values


def write(
    folder: Path,
    recipe: Recipe,
    files: Files,
    trained: Mapping[str, Tensor],
    *,
    progress: Progress,
    data: Mapping[Use, Sequence[Mapping[str, str]]],
    bars: Bars | None = None,
) -> None:
    """trained: as `gathered` gives it. data: the files that were learned from, as `RunData.record` has them. bars: of
    what takes its time."""
    if recipe.lora is None:
        whole = folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        write_folder(files.checkpoint, whole, "F32", weights=trained)
        for path in whole.iterdir():
            path.replace(folder / path.name)
        whole.rmdir()
    else:
        pairs = lora_pairs(files.config, recipe.lora, trained)
        write_adapter(folder, files.config, Adapter(pairs=pairs), base=recipe.model)
    # written last: a folder that has it is whole
    write_proof(
        folder,
        Lineage(
            kind="tune",
            parents=tuple(_parents(recipe, bars)),
            data=tuple(_data_files(recipe, data)),
            settings=msgspec.to_builtins(recipe),
            outcome={
                "steps": progress.step,
                "trained_tokens": progress.trained_tokens,
                "seconds": progress.seconds,
            },
            versions=versions("torch"),
        ),
        bars,
    )


def _parents(recipe: Recipe, bars: Bars | None) -> Iterator[Parent]:
    yield parent("base", recipe.model, bars)
    if isinstance(recipe.method, DistillSettings | OnPolicySettings):
        yield parent("teacher", recipe.method.teacher, bars)


def _data_files(recipe: Recipe, data: Mapping[Use, Sequence[Mapping[str, str]]]) -> Iterator[DataFile]:
    for use, files in data.items():
        for each in files:
            yield data_file(use, each["file"], each["sha256"], recipe.data.licences.get(each["file"]))
    if isinstance(recipe.method, GrpoSettings):
        path, _, _ = recipe.method.reward.rpartition(":")
        yield data_file("reward", path, sha256_file(Path(path)))
