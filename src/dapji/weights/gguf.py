"""GGUF, read and written: versions 2 and 3, little endian, in one file or split into several.

The format is described in ggml's docs/gguf.md: a header, key-value metadata, tensor descriptions, padding, tensor data.
The reader is bounded: every count, length and offset is checked against the bytes that are there before it is used, so
a hostile file costs no more than a walk over it. Tensors are mapped, arrays of the metadata decoded when asked for.
Knows no model: what the keys and the tensors mean is the business of `models.families` and `tokenizer`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dapji.errors import FormatError
from dapji.ops import native
from dapji.ops.formats import FORMATS
from dapji.weights.files import (
    MAX_TENSORS,
    StoredTensor,
    StoredTensors,
    TensorToWrite,
    check_no_overlap,
    map_file,
    replacing,
)

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_ARRAY_DEPTH = 4

Value = bool | int | float | str | list[Any] | NDArray[Any]
"""A metadata value. Arrays of numbers and booleans are numpy arrays, arrays of strings and of arrays are lists."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, str] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""Type code -> numpy type."""
_SCALAR_TYPES = {np.dtype(name): code for code, name in _SCALARS.items()}
_SIZES = {code: np.dtype(name).itemsize for code, name in _SCALARS.items()}
_MIN_SIZES = _SIZES | {_STRING: 8, _ARRAY: 12}
_PACKERS = {
    code: struct.Struct(symbol)
    for code, symbol in {
        0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", _BOOL: "<B", 10: "<Q", 11: "<q", 12: "<d",
    }.items()
}  # fmt: skip
_U32 = _PACKERS[4]
_U64 = _PACKERS[10]
_ARRAY_HEADER = struct.Struct("<IQ")

_TENSOR_TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16",
}  # fmt: skip
"""Those in FORMATS."""
_TENSOR_CODES = {name: code for code, name in _TENSOR_TYPES.items()}
_OTHER_TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    9: ("Q8_1", 32, 40), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Types that ggml defines and we only know by name and size (block, block_bytes): enough to show a file's header."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A metadata value as it lies in a file: copied to another file without loss of its exact type."""

    type: int
    data: memoryview


class Metadata(Mapping[str, Value]):
    """A file's key-value pairs in order. Scalars are checked when the file is opened, arrays decoded on first use."""

    def __init__(self, file: str, buffer: memoryview, spans: Mapping[str, tuple[int, int, int]]) -> None:
        """`spans`: key -> type code, start and end of the encoded value in `buffer`."""
        self._file = file
        self._buffer = buffer
        self._spans = spans
        self._decoded: dict[str, Value] = {}

    def __getitem__(self, key: str) -> Value:
        if key not in self._decoded:
            type, start, end = self._spans[key]
            self._decoded[key] = _Cursor(self._file, self._buffer[start:end], what=f"key {key!r}").value(type)
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def encoded(self, key: str) -> Encoded:
        type, start, end = self._spans[key]
        return Encoded(type=type, data=self._buffer[start:end])


@dataclass(frozen=True, kw_only=True, eq=False)
class Gguf:
    """An opened GGUF file, or all files of a split one."""

    file: str
    version: int
    metadata: Metadata
    tensors: StoredTensors


class _Cursor:
    """Reads a buffer from the front; nothing is read or allocated that the buffer does not hold."""

    def __init__(self, file: str, buffer: memoryview, *, what: str = "the header") -> None:
        self.file = file
        self.buffer = buffer
        self.position = 0
        self.what = what
        """What is being read, for messages."""

    def fail(self, message: str) -> NoReturn:
        raise FormatError(f"{self.file}: {self.what}: {message}")

    def need(self, size: int, thing: str) -> int:
        """Advance over `size` bytes that must be there; gives where they start."""
        start = self.position
        if size > len(self.buffer) - start:
            self.fail(f"{thing} needs {size} bytes at {start}, the file has {len(self.buffer) - start} more")
        self.position = start + size
        return start

    def u32(self, thing: str) -> int:
        start = self.need(4, thing)
        return int(_U32.unpack_from(self.buffer, start)[0])

    def u64(self, thing: str) -> int:
        start = self.need(8, thing)
        return int(_U64.unpack_from(self.buffer, start)[0])

    def count(self, thing: str, min_size: int) -> int:
        """A number of things of at least `min_size` bytes each, which must fit into the rest of the buffer."""
        count = self.u64(thing)
        rest = len(self.buffer) - self.position
        if count * min_size > rest:
            self.fail(f"{thing} is {count}, but only {rest} bytes follow")
        return count

    def string(self, thing: str, *, limit: int | None = None) -> str:
        size = self.u64(f"length of {thing}")
        if limit is not None and size > limit:
            self.fail(f"{thing} is {size} bytes long, the limit is {limit}")
        start = self.need(size, thing)
        try:
            return str(self.buffer[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{thing} is not UTF-8 ({error.reason} at byte {start + error.start})")

    def value(self, type: int, depth: int = 0) -> Value:
        if type == _STRING:
            return self.string("string")
        if type == _ARRAY:
            return self.array(depth)
        start = self.need(_SIZES[type], "value")
        value: Value = _PACKERS[type].unpack_from(self.buffer, start)[0]
        if type == _BOOL:
            if value not in (0, 1):
                self.fail(f"a bool is 0 or 1, not {value}")
            value = bool(value)
        return value

    def array_header(self, depth: int) -> tuple[int, int]:
        """Element type and count."""
        if depth >= MAX_ARRAY_DEPTH:
            self.fail(f"arrays are nested more than {MAX_ARRAY_DEPTH} deep")
        type = self.value_type()
        return type, self.count("array length", _MIN_SIZES[type])

    def value_type(self) -> int:
        type = self.u32("type")
        if type not in _MIN_SIZES:
            self.fail(f"unknown value type {type}, the known ones are 0 to {max(_MIN_SIZES)}")
        return type

    def array(self, depth: int) -> Value:
        type, count = self.array_header(depth)
        if type == _ARRAY:
            return [self.array(depth + 1) for _ in range(count)]
        if type == _STRING:
            return self.strings(count)
        start = self.need(count * _SIZES[type], "array")
        raw = np.frombuffer(self.buffer[start : self.position], dtype=np.uint8)
        if type == _BOOL and raw.size and raw.max() > 1:
            self.fail(f"a bool is 0 or 1, not {raw.max()}")
        return raw.copy().view(_SCALARS[type])

    def strings(self, count: int) -> list[str]:
        if native.available():
            with suppress(ValueError):  # not as they should be: the loop below says which one
                read: tuple[list[str], int] = native.module().read_strings(self.buffer[self.position :], count)
                self.position += read[1]
                return read[0]
        # A vocabulary has 50,000 to 300,000 strings: one tight loop over bytes, whose bounds skip() has checked.
        raw = bytes(self.buffer[self.position :])
        size_at = _U64.unpack_from
        position = 0
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + size_at(raw, position)[0]
                strings.append(raw[start:position].decode())
        except UnicodeDecodeError as error:
            self.fail(f"string {len(strings)} of {count} is not UTF-8 ({error.reason})")
        self.position += position
        return strings

    def skip(self, type: int, depth: int = 0) -> None:
        """Advance over a value, checking all its bounds."""
        if type == _STRING:
            self.need(self.u64("length of string"), "string")
        elif type != _ARRAY:
            self.need(_SIZES[type], "value")
        else:
            element, count = self.array_header(depth)
            if element == _STRING:
                self.skip_strings(count)
            elif element == _ARRAY:
                for _ in range(count):
                    self.skip(_ARRAY, depth + 1)
            else:
                self.need(count * _SIZES[element], "array")

    def skip_strings(self, count: int) -> None:
        if native.available():
            with suppress(ValueError):
                self.position += native.module().skip_strings(self.buffer[self.position :], count)
                return
        buffer, position, size_at = self.buffer, self.position, _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + size_at(buffer, position)[0]
        except (struct.error, OverflowError):  # the length before this one leads beyond the buffer
            position = len(buffer) + 1
        if position > len(buffer):
            self.fail(f"a string of an array of {count} ends beyond the file's {len(buffer)} bytes")
        self.position = position


def parse_gguf(buffer: bytes | memoryview, file: str) -> Gguf:
    """Parse one whole file that lies in memory; `file` is its name for messages. Raises FormatError."""
    buffer = memoryview(buffer)
    cursor = _Cursor(file, buffer)
    start = cursor.need(4, "magic")
    if buffer[start : start + 4] != MAGIC:
        cursor.fail(f"starts with {bytes(buffer[start : start + 4])!r}, a GGUF file with {MAGIC!r}")
    version = cursor.u32("version")
    if version and version & 0xFFFF == 0:
        raise FormatError(
            f"{file}: big endian, we read little endian", hint="convert it with gguf-py's gguf_convert_endian.py"
        )
    if version not in (2, 3):
        raise FormatError(
            f"{file}: GGUF version {version}, we read 2 and 3", hint="convert the original model again, or update Dapji"
        )
    n_tensors = cursor.count("number of tensors", 8 + 1 + 4 + 8 + 4 + 8)
    n_keys = cursor.count("number of keys", 8 + 1 + 4 + 1)
    if n_tensors > MAX_TENSORS:
        cursor.fail(f"{n_tensors} tensors, the limit is {MAX_TENSORS}")
    if n_keys > MAX_KEYS:
        cursor.fail(f"{n_keys} keys, the limit is {MAX_KEYS}")

    metadata = _parse_metadata(cursor, n_keys)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    cursor.what = "key 'general.alignment'"
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"must be a power of two, not {alignment!r}")

    described = [_parse_description(cursor, index) for index in range(n_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    stored: dict[str, StoredTensor] = {}
    for description in described:
        tensor = _locate(cursor, description, data_start, alignment)
        if tensor.name in stored:
            cursor.fail("appears twice")
        stored[tensor.name] = tensor
    check_no_overlap(stored.values())
    return Gguf(file=file, version=version, metadata=metadata, tensors=StoredTensors(stored))


def _parse_metadata(cursor: _Cursor, n_keys: int) -> Metadata:
    spans: dict[str, tuple[int, int, int]] = {}
    for index in range(n_keys):
        cursor.what = f"key {index} of {n_keys}"
        key = cursor.string("its name", limit=MAX_KEY_BYTES)
        cursor.what = f"key {key!r}"
        if key in spans:
            cursor.fail("appears twice")
        type = cursor.value_type()
        start = cursor.position
        cursor.skip(type)
        spans[key] = (type, start, cursor.position)
    metadata = Metadata(cursor.file, cursor.buffer, spans)
    for key, (type, _, _) in spans.items():
        if type != _ARRAY:
            metadata[key]
    return metadata


@dataclass(frozen=True, slots=True)
class _Description:
    name: str
    dimensions: tuple[int, ...]
    type: int
    offset: int


def _parse_description(cursor: _Cursor, index: int) -> _Description:
    cursor.what = f"tensor {index}"
    name = cursor.string("its name", limit=MAX_TENSOR_NAME_BYTES)
    cursor.what = f"tensor {name!r}"
    n_dimensions = cursor.u32("number of dimensions")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"{n_dimensions} dimensions, it must be 1 to {MAX_DIMENSIONS}")
    dimensions = tuple(cursor.u64("dimension") for _ in range(n_dimensions))
    return _Description(name, dimensions, cursor.u32("type"), cursor.u64("offset"))


def _locate(cursor: _Cursor, description: _Description, data_start: int, alignment: int) -> StoredTensor:
    """Check a tensor's type, size and place. Python's integers do not overflow, so products need no care."""
    cursor.what = f"tensor {description.name!r}"
    shape = description.dimensions[::-1]
    count = math.prod(shape)
    if count == 0:
        cursor.fail(f"shape {list(shape)} has no values")
    if description.type in _TENSOR_TYPES:
        type = _TENSOR_TYPES[description.type]
        block, block_bytes = FORMATS[type].block, FORMATS[type].block_bytes
    elif description.type in _OTHER_TENSOR_TYPES:
        type, block, block_bytes = _OTHER_TENSOR_TYPES[description.type]
    else:  # newer than this list: nothing is known of its size, so that all we can do is name it
        type, block, block_bytes = f"number {description.type}", 1, 0
    if shape[-1] % block:
        cursor.fail(f"rows of {shape[-1]} values, type {type} has blocks of {block}")
    if description.offset % alignment:
        cursor.fail(f"offset {description.offset} is not a multiple of the alignment {alignment}")
    start = data_start + description.offset
    nbytes = count // block * block_bytes
    if start + nbytes > len(cursor.buffer):
        cursor.fail(
            f"shape {list(shape)} of type {type} takes bytes {start} to {start + nbytes}, "
            f"the file has {len(cursor.buffer)}"
        )
    return StoredTensor(
        file=cursor.file,
        name=description.name,
        type=type,
        shape=shape,
        start=start,
        data=cursor.buffer[start : start + nbytes],
    )


_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_gguf(path: Path) -> Gguf:
    """Open and map a GGUF file; of a split one give the first, the others must lie beside it.

    Raises ModelNotFound or FormatError.
    """
    first = parse_gguf(map_file(path), str(path))
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return first
    number = first.metadata.get("split.no")
    match = _SPLIT_NAME.fullmatch(path.name)
    if not isinstance(count, int) or match is None or int(match["count"]) != count:
        raise FormatError(
            f"{path}: says that it is part {number} of {count}, which its name does not",
            hint="the parts must be named NAME-00001-of-0000N.gguf",
        )
    if number != 0 or int(match["number"]) != 1:
        raise FormatError(
            f"{path}: is part {number} (from 0) of {count}",
            hint=f"open the first one, {match['stem']}-00001-of-{count:05}.gguf",
        )
    stored = dict(first.tensors.stored)
    for index in range(1, count):
        part_path = path.with_name(f"{match['stem']}-{index + 1:05}-of-{count:05}.gguf")
        part = parse_gguf(map_file(part_path), str(part_path))
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (index, count):
            raise FormatError(
                f"{part_path}: should be part {index} (from 0) of {count}, but says "
                f"part {part.metadata.get('split.no')} of {part.metadata.get('split.count')}"
            )
        for name, tensor in part.tensors.stored.items():
            if name in stored:
                raise FormatError(f"{part_path}: tensor {name!r} is also in {stored[name].file}")
            stored[name] = tensor
    total = first.metadata.get("split.tensors.count")
    if total != len(stored):
        raise FormatError(f"{path}: says that all parts have {total} tensors, they have {len(stored)}")
    return Gguf(file=first.file, version=first.version, metadata=first.metadata, tensors=StoredTensors(stored))


def write_gguf(path: Path, metadata: Mapping[str, Value | Encoded], tensors: Sequence[TensorToWrite]) -> None:
    """Write a GGUF file, version 3, tensor by tensor; it appears at `path` only when it is whole.

    Integers become u32 where they fit, else i32, u64 or i64; floats f32; numpy scalars and arrays keep their type;
    `Encoded` values are copied.
    """
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(alignment, Encoded):
        alignment = Metadata("", alignment.data, {"": (alignment.type, 0, len(alignment.data))})[""]
    assert isinstance(alignment, int)
    header = bytearray(MAGIC + _U32.pack(3) + _U64.pack(len(tensors)) + _U64.pack(len(metadata)))
    for key, value in metadata.items():
        encoded = value if isinstance(value, Encoded) else _encode(value)
        header += _string(key) + _U32.pack(encoded.type) + encoded.data
    offset = 0
    for tensor in tensors:
        if len(tensor.name.encode()) >= MAX_TENSOR_NAME_BYTES:  # llama.cpp's limit includes a final zero
            raise FormatError(f"{path}: tensor name {tensor.name!r} is longer than {MAX_TENSOR_NAME_BYTES - 1} bytes")
        header += _string(tensor.name) + _U32.pack(len(tensor.shape))
        header += b"".join(_U64.pack(size) for size in tensor.shape[::-1])
        header += _U32.pack(_TENSOR_CODES[tensor.format.name]) + _U64.pack(offset)
        offset += tensor.nbytes + -tensor.nbytes % alignment
    with replacing(path) as file:
        file.write(header)
        file.write(bytes(-len(header) % alignment))
        for tensor in tensors:
            tensor.write(file)
            file.write(bytes(-tensor.nbytes % alignment))


def _string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


def _encode(value: Value | np.generic) -> Encoded:
    if isinstance(value, np.generic):  # first, since np.float64 is a float too
        return Encoded(type=_SCALAR_TYPES[value.dtype], data=memoryview(value.tobytes()))
    if isinstance(value, str):
        return Encoded(type=_STRING, data=memoryview(_string(value)))
    if isinstance(value, bool):
        return _encode(np.bool_(value))
    if isinstance(value, int):
        fitting = (
            code for code in (4, 5, 10, 11) if np.iinfo(_SCALARS[code]).min <= value <= np.iinfo(_SCALARS[code]).max
        )
        code = next(fitting)
        return Encoded(type=code, data=memoryview(_PACKERS[code].pack(value)))
    if isinstance(value, float):
        return _encode(np.float32(value))
    if isinstance(value, np.ndarray):
        header = _ARRAY_HEADER.pack(_SCALAR_TYPES[value.dtype], value.size)
        return Encoded(type=_ARRAY, data=memoryview(header + value.tobytes()))
    elements = [_encode(element) for element in value]
    types = {element.type for element in elements} or {_STRING}
    if len(types) > 1:
        raise FormatError(f"an array of GGUF has elements of one type, not of types {sorted(types)}")
    header = _ARRAY_HEADER.pack(types.pop(), len(elements))
    return Encoded(type=_ARRAY, data=memoryview(header + b"".join(element.data for element in elements)))
