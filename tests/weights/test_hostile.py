"""Files made to break a reader: always our exception, in no time, with no more memory than the file is large."""

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dapji.errors import FormatError
from dapji.ops import native
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import _Cursor, parse_gguf, read_gguf, write_gguf
from dapji.weights.safetensors import parse_safetensors

HUGE = (2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)
STRING, ARRAY, U8, U32, U64 = 8, 9, 0, 4, 10


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def key(name: bytes, type: int, value: bytes) -> bytes:
    return text(name) + u32(type) + value


def description(name: bytes, shape: tuple[int, ...], type: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(type) + u64(offset)


def gguf(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
) -> bytes:
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def refused(data: bytes, parse: Callable[[bytes, str], object] = parse_gguf) -> str:
    """The message, after checking time and memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(FormatError) as error:
            parse(data, "m")
        # 64 kB for the exception, its traceback and what the interpreter sets up once.
        assert tracemalloc.get_traced_memory()[1] <= len(data) + (1 << 16)
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1
    assert error.value.message.startswith("m: ")
    return error.value.message


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small whole file with every kind of value."""
    path = tmp_path_factory.mktemp("sample") / "m.gguf"
    metadata = {
        "general.architecture": "llama", "tokens": [f"piece{i}" for i in range(50)], "yes": True, "float": 0.5,
        "types": np.arange(50, dtype=np.int32), "nested": [["a"], ["b", "c"]],
    }  # fmt: skip
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    tensors = [TensorToWrite.of(f"blk.{i}.w", Tensor.from_float32("w", values)) for i in range(6)]
    write_gguf(path, metadata, tensors)
    return path.read_bytes()


def test_a_gguf_file_cut_anywhere_is_refused(sample: bytes) -> None:
    assert len(parse_gguf(sample, "m").tensors) == 6
    for step in range(64):
        refused(sample[: len(sample) * step // 64])


def test_a_gguf_file_cut_at_every_byte_of_its_header_is_refused(sample: bytes) -> None:
    header = parse_gguf(sample, "m").tensors.stored["blk.0.w"].start
    for size in range(header):
        with pytest.raises(FormatError):
            parse_gguf(sample[:size], "m")


def test_a_cut_file_on_the_disk_is_refused(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sample[:-1])
    with pytest.raises(FormatError, match=r"'blk\.5\.w': shape \[2, 32\] of type F32 takes bytes"):
        read_gguf(path)


@pytest.mark.parametrize("number", HUGE)
def test_counts_and_sizes_that_overflow(number: int) -> None:
    cases = {
        f"number of tensors is {number}": gguf(n_tensors=number),
        f"number of keys is {number}": gguf(n_keys=number),
        f"string needs {number} bytes": gguf((key(b"k", STRING, u64(number) + b"abc"),)),
        f"its name is {number} bytes long": gguf((u64(number) + b"k" * 8,), n_keys=1),
        f"array length is {number}": gguf((key(b"k", ARRAY, u32(U8) + u64(number)),)),
        "takes bytes": gguf((), (description(b"w", (number,)),), bytes(64)),
        "a string of an array of 2 ends beyond": gguf(
            (key(b"k", ARRAY, u32(STRING) + u64(2) + text(b"a") + u64(number)),)
        ),
    }
    for message, data in cases.items():
        assert message in refused(data)
    for type in (STRING, ARRAY, U64):
        assert f"array length is {number}" in refused(gguf((key(b"k", ARRAY, u32(type) + u64(number)),)))
    assert "offset" in refused(gguf((), (description(b"w", (8,), offset=number - number % 32 + 1),), bytes(64)))
    assert "takes bytes" in refused(gguf((), (description(b"w", (8,), offset=number - number % 32),), bytes(64)))
    refused(gguf((), (description(b"w", (number, number, number, number)),), bytes(64)))
    refused(gguf((), (description(b"w", (2**32, 2**32)),), bytes(64)))


@pytest.mark.parametrize(
    ("message", "data"),
    [
        ("starts with b'GGML'", b"GGML" + bytes(28)),
        ("big endian", gguf(version=3 << 24)),
        ("version 1, we read 2 and 3", gguf(version=1)),
        ("key 'a': appears twice", gguf((key(b"a", U8, b"\0"), key(b"a", U8, b"\0")))),
        ("'w': appears twice", gguf((), (description(b"w", (1,)), description(b"w", (1,), offset=32)), bytes(64))),
        ("overlaps tensor", gguf((), (description(b"v", (9,)), description(b"w", (1,), offset=32)), bytes(64))),
        ("overlaps tensor", gguf((), (description(b"v", (8,)), description(b"w", (8,))), bytes(64))),
        ("offset 33 is not a multiple of the alignment 32", gguf((), (description(b"w", (1,), offset=33),), bytes(64))),
        ("takes bytes 64 to 100", gguf((), (description(b"w", (9,)),), bytes(32))),
        ("shape [0] has no values", gguf((), (description(b"w", (0,)),))),
        ("shape [4294967296, 0] has no values", gguf((), (description(b"w", (0, 2**32)),))),
        ("0 dimensions", gguf((), (description(b"w", ()) + bytes(32),))),
        ("4294967295 dimensions", gguf((), (text(b"w") + u32(2**32 - 1) + bytes(64),))),
        ("rows of 31 values, type Q4_0 has blocks of 32", gguf((), (description(b"w", (31, 32), type=2),), bytes(999))),
        ("'general.alignment': must be a power of two", gguf((key(b"general.alignment", U32, u32(48)),))),
        ("'general.alignment': must be a power of two", gguf((key(b"general.alignment", U32, u32(0)),))),
        ("'general.alignment': must be a power of two", gguf((key(b"general.alignment", STRING, text(b"x")),))),
        ("unknown value type 13", gguf((key(b"k", 13, bytes(8)),))),
        ("a bool is 0 or 1, not 2", gguf((key(b"k", 7, b"\2"),))),
        ("its name is not UTF-8", gguf((key(b"\xff", U8, b"\0"),))),
        ("string is not UTF-8", gguf((key(b"k", STRING, text(b"\xc3")),))),
        ("nested more than 4 deep", gguf((key(b"k", ARRAY, (u32(ARRAY) + u64(1)) * 5 + u32(U8) + u64(0)),))),
        ("its name is 65 bytes long", gguf((), (description(b"w" * 65, (1,)),), bytes(64))),
    ],
)
def test_headers_that_contradict_themselves(message: str, data: bytes) -> None:
    assert message in refused(data)


def test_arrays_are_checked_when_they_are_decoded() -> None:
    file = parse_gguf(gguf((key(b"k", ARRAY, u32(STRING) + u64(1) + text(b"\xff")),)), "m")
    with pytest.raises(FormatError, match="string 0 of 1 is not UTF-8"):
        file.metadata["k"]
    file = parse_gguf(gguf((key(b"k", ARRAY, u32(7) + u64(2) + b"\1\3"),)), "m")
    with pytest.raises(FormatError, match="a bool is 0 or 1, not 3"):
        file.metadata["k"]


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_strings_are_read_alike_with_and_without_the_native_core(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way and the slow one, on strings that are whole, cut or no UTF-8, from the middle of a buffer."""
    texts = ["", "a", "답지", "\0", "x" * 300, "🎉"]
    whole = b"".join(text(one.encode()) for one in texts)
    arrays = [whole, text(b"ok") + text(b"\xc3") + text(b"z"), u64(2**63) + b"ab"]
    for data, count in zip(arrays, (len(texts), 3, 1), strict=True):
        found = []
        for available in (True, False):
            monkeypatch.setattr(native, "available", lambda available=available: available)
            read, skipped = (_Cursor("m", memoryview(b"head" + data)[: len(data) + 4 - cut]) for _ in range(2))
            read.position = skipped.position = 4
            try:
                skipped.skip_strings(count)
                found.append((read.strings(count), read.position, skipped.position))
            except FormatError as error:
                found.append(error.message)
        assert found[0] == found[1]
        if data is whole and not cut:
            assert found[0] == (texts, len(data) + 4, len(data) + 4)


def memory_of(parse: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        parse()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_opening_a_large_file_takes_no_memory_for_its_arrays_and_tensors() -> None:
    """A vocabulary of 300,000 and tensors of 20 MB: neither is copied."""
    pieces = b"".join(text(b"piece%d" % i) for i in range(300_000))
    vocabulary = key(b"tokens", ARRAY, u32(STRING) + u64(300_000) + pieces)
    data = gguf((vocabulary,), (description(b"w", (5_000_000,)),), bytes(20_000_000))
    assert memory_of(lambda: parse_gguf(data, "m")) < 1 << 16


def test_many_small_things_take_memory_in_proportion() -> None:
    """A tensor needs at least 33 bytes of the file and becomes an object of some 600: linear, not more."""
    tensors = tuple(description(b"%d" % i, (8,), offset=32 * i) for i in range(5_000))
    data = gguf((), tensors, bytes(32 * 5_000))
    assert memory_of(lambda: parse_gguf(data, "m")) < 16 * len(data)


def test_nested_arrays_take_memory_in_proportion() -> None:
    """An empty array has 12 bytes in the file and becomes an object of some 230, when it is asked for."""
    inner = u32(U8) + u64(0)
    level = u32(ARRAY) + u64(3_000) + inner * 3_000
    data = gguf((key(b"k", ARRAY, u32(ARRAY) + u64(4) + level * 4),))
    file = parse_gguf(data, "m")
    assert memory_of(lambda: file.metadata["k"]) < 24 * len(data)


@pytest.mark.parametrize("number", HUGE)
def test_safetensors_headers_that_overflow(number: int) -> None:
    def file_of(header: str) -> bytes:
        return u64(len(header)) + header.encode() + bytes(8)

    entry = '{"w": {"dtype": "F32", "shape": %s, "data_offsets": %s}}'
    assert "header needs" in refused(u64(number) + b"{}", parse_safetensors)
    for shape, offsets in (
        (f"[{number}]", "[0, 8]"),
        (f"[{number}, {number}]", "[0, 8]"),
        ("[2]", f"[0, {number}]"),
        ("[2]", f"[{number}, {number + 8}]"),
        ("[2]", f"[{number}, 8]"),
        (f"[{number}, 0]", "[0, 0]"),
        ("[2]", f"[-{number}, 8]"),
    ):
        refused(file_of(entry % (shape, offsets)), parse_safetensors)
