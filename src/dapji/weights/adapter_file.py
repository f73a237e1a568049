"""An adapter on disk, for the model that it changes: PEFT's folder, or llama.cpp's GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dapji.errors import ConfigError, FormatError, ModelNotFound
from dapji.models import families
from dapji.models.adapter import Adapter
from dapji.models.config import ModelConfig
from dapji.weights.checkpoint import open_checkpoint, read_json
from dapji.weights.files import TensorToWrite, map_file, replacing
from dapji.weights.gguf import Value, read_gguf, write_gguf
from dapji.weights.safetensors import parse_safetensors, write_safetensors

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"


def is_adapter(path: Path) -> bool:
    """Whether a folder, or a GGUF file, is an adapter and no model. Raises ModelNotFound or FormatError."""
    if path.is_dir():
        return (path / CONFIG_NAME).exists() and not (path / "config.json").exists()
    return open_checkpoint(path).metadata.get("general.type") == "adapter"


def open_adapter(path: Path, config: ModelConfig, config_json: Mapping[str, object] | None = None) -> Adapter:
    """Maps the matrices, reads none of them. config_json: as in `families.adapter_from_peft`.

    Raises ModelNotFound, FormatError, and ConfigError where it is no adapter for that model.
    """
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder")
    try:
        if not path.is_dir():
            file = read_gguf(path)
            return families.adapter_from_gguf(config, file.metadata, file.tensors)
        if not (path / TENSORS_NAME).exists():
            raise FormatError(f"{path}: no {TENSORS_NAME}", hint="an adapter is a folder as PEFT writes it, or a .gguf")
        stored = parse_safetensors(map_file(path / TENSORS_NAME), str(path / TENSORS_NAME))
        return families.adapter_from_peft(config, read_json(path / CONFIG_NAME), stored, config_json=config_json)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error


def base_of(path: Path) -> str | None:
    """The model that PEFT's folder says it is for, as a name or path; None where nothing is said, as in a GGUF file.

    Raises ModelNotFound, FormatError.
    """
    base = read_json(path / CONFIG_NAME).get("base_model_name_or_path") if path.is_dir() else None
    return base if isinstance(base, str) and base else None


def write_adapter(folder: Path, config: ModelConfig, adapter: Adapter, *, base: str) -> None:
    """The two files of a folder that PEFT loads. base: what the adapter is for, as a name or path.

    Raises ConfigError as `families.adapter_to_peft`.
    """
    adapter_config, tensors = families.adapter_to_peft(config, adapter)
    write_safetensors(folder / TENSORS_NAME, [TensorToWrite.of(name, tensor) for name, tensor in tensors.items()])
    with replacing(folder / CONFIG_NAME) as file:
        text = json.dumps({**adapter_config, "base_model_name_or_path": base}, indent=2, ensure_ascii=False)
        file.write(text.encode() + b"\n")


def write_gguf_adapter(path: Path, config: ModelConfig, adapter: Adapter, *, name: str) -> None:
    """A GGUF file of the type adapter, as llama.cpp loads it for a base of the same architecture.

    Raises ConfigError as `families.adapter_to_gguf`.
    """
    metadata, tensors = families.adapter_to_gguf(config, adapter)
    metadata["general.name"] = name
    write_gguf(
        path, cast("dict[str, Value]", metadata), [TensorToWrite.of(key, tensor) for key, tensor in tensors.items()]
    )
