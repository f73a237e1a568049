"""Our GGUF reader and writer against the gguf package's."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from local_sources import split_gguf

from dapji.errors import FormatError, ModelNotFound
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import Encoded, Gguf, parse_gguf, read_gguf, write_gguf

NUMBERS = {
    "u8": np.uint8(250), "i8": np.int8(-100), "u16": np.uint16(65000), "i16": np.int16(-30000),
    "u32": np.uint32(4_000_000_000), "i32": np.int32(-2_000_000_000), "f32": np.float32(0.1),
    "u64": np.uint64(2**64 - 1), "i64": np.int64(-(2**63)), "f64": np.float64(0.1),
}  # fmt: skip


def random_tensors(*names: str) -> dict[str, Tensor]:
    rng = np.random.default_rng(7)
    tensors = {}
    for name in names:
        format = FORMATS[name]
        data = rng.integers(0, 256, (3, format.row_bytes(512)), dtype=np.uint8)
        tensors[f"w.{name}"] = Tensor(name=f"w.{name}", format=format, shape=(3, 512), source=data)
    return tensors


def to_write(tensors: dict[str, Tensor]) -> list[TensorToWrite]:
    return [TensorToWrite.of(name, tensor) for name, tensor in tensors.items()]


def write_with_the_gguf_package(path: Path, tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "시험 🙂")
    writer.add_bool("yes", True)
    for name, value in NUMBERS.items():
        kind = {"u": "UINT", "i": "INT", "f": "FLOAT"}[name[0]] + name[1:]
        writer.add_key_value(name, value.item(), gguf.GGUFValueType[kind])
    writer.add_array("strings", ["a", "", "한국어", "x" * 300])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 0.25])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=gguf.GGMLQuantizationType[tensor.format.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contents(file: Gguf) -> dict[str, object]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    tensors = random_tensors(*FORMATS)
    write_with_the_gguf_package(tmp_path / "m.gguf", tensors)
    read = read_gguf(tmp_path / "m.gguf")
    assert contents(read) == {
        "general.architecture": "llama",
        "general.name": "시험 🙂",
        "yes": True,
        **{name: value.item() for name, value in NUMBERS.items()},
        "strings": ["a", "", "한국어", "x" * 300],
        "ints": [1, -2, 3],
        "floats": [0.5, 0.25],
    }
    assert list(read.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert read.tensors[name].format is tensor.format
        assert read.tensors[name].shape == (3, 512)
        np.testing.assert_array_equal(read.tensors[name].data, tensor.data)


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = random_tensors(*FORMATS)
    metadata = {
        "general.architecture": "llama", "general.alignment": 64, "name": "시험 🙂", "yes": True, "no": False,
        "small": 3, "negative": -3, "large": 2**40, "lowest": -(2**40), "float": 0.5,
        "strings": ["a", "", "한국어"], "none": [], "ints": np.array([1, -2], dtype=np.int32), **NUMBERS,
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", metadata, to_write(tensors))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.alignment == 64
    for key, value in metadata.items():
        wanted = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        assert reader.fields[key].contents() == wanted, key
    assert [t.name for t in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        wanted = tensors[tensor.name]
        assert tensor.tensor_type.name == wanted.format.name
        assert tensor.shape.tolist() == [512, 3]
        np.testing.assert_array_equal(np.asarray(tensor.data).view(np.uint8).reshape(3, -1), wanted.data)


def test_metadata_is_copied_byte_for_byte(tmp_path: Path) -> None:
    write_with_the_gguf_package(tmp_path / "a.gguf", random_tensors("Q8_0"))
    first = read_gguf(tmp_path / "a.gguf")
    copied: dict[str, Encoded] = {key: first.metadata.encoded(key) for key in first.metadata}
    write_gguf(tmp_path / "b.gguf", copied, to_write(dict(first.tensors)))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_nested_arrays_round_trip(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"nested": [["a", "b"], [], ["c"]], "flags": np.array([True, False])}, [])
    read = read_gguf(tmp_path / "m.gguf")
    assert read.metadata["nested"] == [["a", "b"], [], ["c"]]
    assert read.metadata["flags"].tolist() == [True, False]


def test_version_2_is_read() -> None:
    data = b"GGUF" + (2).to_bytes(4, "little") + bytes(16)
    assert parse_gguf(data, "m").version == 2


def test_shapes_are_in_numpy_order(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    write_gguf(tmp_path / "m.gguf", {}, [TensorToWrite.of("w", Tensor.from_float32("w", values))])
    np.testing.assert_array_equal(read_gguf(tmp_path / "m.gguf").tensors["w"].float32(), values)


def test_a_header_with_unsupported_types_opens_and_the_tensor_says_why(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("odd", np.zeros((1, 66), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "m.gguf")
    assert read.tensors.stored["odd"].type == "IQ2_XXS"
    assert read.tensors.stored["odd"].shape == (1, 256)
    with pytest.raises(FormatError, match="'odd' has type IQ2_XXS"):
        read.tensors["odd"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    def broken() -> list[np.ndarray]:
        raise RuntimeError("disk on fire")

    tensor = TensorToWrite(name="w", format=FORMATS["F32"], shape=(4,), chunks=broken)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_gguf(path, {}, [tensor])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    read = read_gguf(split_gguf(tmp_path, 3)[0])
    assert [float(read.tensors[f"w{i}"].float32()[1, 1]) for i in range(3)] == [0.0, 1.0, 2.0]


def test_splits_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    paths = split_gguf(tmp_path, 3)
    with pytest.raises(FormatError, match=r"part 1 .* of 3") as error:
        read_gguf(paths[1])
    assert "m-00001-of-00003.gguf" in str(error.value)
    (tmp_path / "renamed.gguf").write_bytes(paths[0].read_bytes())
    with pytest.raises(FormatError, match="its name does not"):
        read_gguf(tmp_path / "renamed.gguf")
    third = paths[2].read_bytes()
    paths[2].write_bytes(paths[0].read_bytes())  # a part that refers to the first again
    with pytest.raises(FormatError, match="should be part 2"):
        read_gguf(paths[0])
    paths[2].unlink()
    paths[2].symlink_to(paths[1])
    with pytest.raises(FormatError, match="should be part 2"):
        read_gguf(paths[0])
    paths[2].unlink()
    with pytest.raises(ModelNotFound, match="m-00003-of-00003"):
        read_gguf(paths[0])
    paths[2].write_bytes(third)
    split_gguf(tmp_path, 3, declared=4)
    with pytest.raises(FormatError, match="all parts have 4 tensors, they have 3"):
        read_gguf(paths[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = split_gguf(tmp_path, 2)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"w1", b"w0"))
    with pytest.raises(FormatError, match="'w0' is also in"):
        read_gguf(paths[0])
