"""safetensors, read and written: one file, or shards with an index, as Hugging Face folders hold them.

The format (huggingface/safetensors): the length of a JSON header as u64, the header, the tensors' bytes. The reader is
our own, because a file is mapped and checked as a whole: every size and offset against the file, every byte in exactly
one tensor, no name twice. Knows no model and never unpickles anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from dapji.errors import FormatError
from dapji.weights.files import (
    MAX_TENSORS,
    StoredTensor,
    StoredTensors,
    TensorToWrite,
    check_no_overlap,
    map_file,
    replacing,
)

MAX_JSON_BYTES = 100_000_000
"""The format's own limit of a header; kept for index and configuration files too."""
MAX_DIMENSIONS = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip
"""Bits of one value of every dtype that the format defines."""
_WRITTEN = ("F32", "F16", "BF16")

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_T = TypeVar("_T")


def decode_json(data: bytes | memoryview, type: type[_T], file: str) -> _T:
    """JSON of a foreign file as `type`; a name that appears twice in an object is refused. Raises FormatError."""
    if len(data) > MAX_JSON_BYTES:
        raise FormatError(f"{file}: {len(data)} bytes of JSON, the limit is {MAX_JSON_BYTES}")
    try:
        value = msgspec.json.decode(data, type=type)
        json.loads(bytes(data), object_pairs_hook=_unique)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not the JSON that is expected here: {error}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"the name {name!r} appears twice")
        names.add(name)


def parse_safetensors(buffer: bytes | memoryview, file: str) -> StoredTensors:
    """Parse one whole file that lies in memory; `file` is its name for messages. Raises FormatError."""
    buffer = memoryview(buffer)
    header_size = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or header_size > len(buffer) - 8:
        raise FormatError(
            f"{file}: the header needs {header_size} bytes, the file has {max(0, len(buffer) - 8)} for it"
        )
    header = decode_json(buffer[8 : 8 + header_size], dict[str, msgspec.Raw], file)
    if "__metadata__" in header:
        decode_json(header.pop("__metadata__"), dict[str, str], f"{file}: __metadata__")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{file}: {len(header)} tensors, the limit is {MAX_TENSORS}")
    stored = {
        name: _locate(file, name, decode_json(raw, _Entry, f"{file}: tensor {name!r}"), buffer, 8 + header_size)
        for name, raw in header.items()
    }
    check_no_overlap(stored.values())
    described = sum(len(tensor.data) for tensor in stored.values())
    if described != len(buffer) - 8 - header_size:
        raise FormatError(f"{file}: the tensors take {described} bytes, the file has {len(buffer) - 8 - header_size}")
    return StoredTensors(stored)


def _locate(file: str, name: str, entry: _Entry, buffer: memoryview, data_start: int) -> StoredTensor:
    where = f"{file}: tensor {name!r}"
    if len(entry.shape) > MAX_DIMENSIONS:
        raise FormatError(f"{where}: {len(entry.shape)} dimensions, the limit is {MAX_DIMENSIONS}")
    bits = _BITS.get(entry.dtype)
    if bits is None:
        raise FormatError(f"{where}: unknown dtype {entry.dtype!r}", hint=f"known: {', '.join(_BITS)}")
    count = math.prod(entry.shape)
    if count == 0:
        raise FormatError(f"{where}: shape {entry.shape} has no values")
    first, last = entry.data_offsets
    room = len(buffer) - data_start
    if not first <= last <= room:
        raise FormatError(f"{where}: lies at bytes {first} to {last} of {room}")
    if count * bits != 8 * (last - first):
        raise FormatError(
            f"{where}: shape {entry.shape} of {entry.dtype} takes {-(-count * bits // 8)} bytes, "
            f"the offsets say {last - first}"
        )
    start = data_start + first
    return StoredTensor(
        file=file,
        name=name,
        type=entry.dtype,
        shape=tuple(entry.shape),
        start=start,
        data=buffer[start : data_start + last],
    )


def parse_index(data: bytes | memoryview, file: str) -> dict[str, str]:
    """Tensor name -> name of the shard that holds it, a plain file name of the index's folder. Raises FormatError."""
    weight_map = decode_json(data, _Index, file).weight_map
    for shard in set(weight_map.values()):
        if not shard.endswith(".safetensors") or not shard.isprintable() or any(sign in shard for sign in "/\\:"):
            raise FormatError(f"{file}: {shard!r} is no plain name of a .safetensors file")
    return weight_map


def read_safetensors(folder: Path) -> StoredTensors:
    """The tensors of a folder's model.safetensors, or of all shards of its index. Raises ModelNotFound, FormatError."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists() or not index.exists():
        return parse_safetensors(map_file(single), str(single))
    weight_map = parse_index(map_file(index), str(index))
    stored: dict[str, StoredTensor] = {}
    buffers = {shard: map_file(folder / shard) for shard in sorted(set(weight_map.values()))}
    for shard, buffer in buffers.items():
        path = folder / shard
        for name, tensor in parse_safetensors(buffer, str(path)).stored.items():
            if weight_map.get(name) != shard:
                raise FormatError(f"{path}: holds tensor {name!r}, which {index} places in {weight_map.get(name)}")
            stored[name] = tensor
    if missing := weight_map.keys() - stored.keys():
        name = min(missing)
        raise FormatError(f"{folder / weight_map[name]}: tensor {name!r} is missing, {index} says that it is here")
    return StoredTensors(stored)


def write_safetensors(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    """Write one file, tensor by tensor; it appears at `path` only when it is whole. F32, F16 and BF16 only."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers demands the entry
    offset = 0
    for tensor in tensors:
        if tensor.format.name not in _WRITTEN:
            raise FormatError(
                f"{path}: tensor {tensor.name!r} is {tensor.format.name}, safetensors holds {', '.join(_WRITTEN)}",
                hint="quantised weights are written as GGUF",
            )
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.format.name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            tensor.write(file)


def write_shards(folder: Path, tensors: Sequence[TensorToWrite], *, max_bytes: int) -> None:
    """Write model.safetensors, or where that would exceed `max_bytes` of tensors several shards and then their index.

    A tensor larger than `max_bytes` gets a shard of its own.
    """
    shards: list[list[TensorToWrite]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_NAME, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index: Mapping[str, Any] = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": weight_map,
    }
    with replacing(folder / INDEX_NAME) as file:
        file.write(json.dumps(index, indent=2).encode())
