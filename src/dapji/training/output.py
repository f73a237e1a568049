"""What a run leaves: an adapter as PEFT reads it, or a whole model as transformers does, and where it came from."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import dapji
from dapji.model import Files, open_files
from dapji.models.adapter import Adapter
from dapji.ops.tensor import Tensor
from dapji.training.actor import lora_pairs
from dapji.training.checkpoints import Progress
from dapji.training.network import Network
from dapji.training.run_data import file_hash
from dapji.training.settings import DistillSettings, OnPolicySettings, Recipe
from dapji.weights.adapter_file import write_adapter
from dapji.weights.convert import write_folder
from dapji.weights.files import replacing
from dapji.weights.sources_base import model_files

RECORD = "dapji.json"
"""Written last: a folder that has it is whole."""


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
    data: Mapping[str, Any],
) -> None:
    """trained: as `gathered` gives it. data: the hashes of the files that were learned from."""
    method = recipe.method
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
    lineage = {
        "base": origin(files, recipe.model),
        **(
            {"teacher": origin(open_files(method.teacher), method.teacher)}
            if isinstance(method, DistillSettings | OnPolicySettings)
            else {}
        ),
        "data": data,
        "recipe": msgspec.to_builtins(recipe),
        "steps": progress.step,
        "trained_tokens": progress.trained_tokens,
        "seconds": progress.seconds,
        "versions": {"dapji": dapji.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    with replacing(folder / RECORD) as file:
        file.write(json.dumps({"lineage": lineage}, indent=2, ensure_ascii=False).encode() + b"\n")


def origin(files: Files, name: str) -> dict[str, Any]:
    """What a model is made of: the hash of every file, and its own lineage, where it has one."""
    path = files.checkpoint.path
    names = [path.name] if path.is_file() else sorted(model_files([p.name for p in path.iterdir()], str(path)))
    folder = path.parent if path.is_file() else path
    found: dict[str, Any] = {"model": name, "files": {each: file_hash(folder / each) for each in names}}
    record = folder / RECORD
    if record.exists() and "lineage" in (own := json.loads(record.read_text(encoding="utf-8"))):
        found["lineage"] = own["lineage"]
    return found
