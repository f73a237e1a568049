"""Our safetensors reader and writer against the safetensors package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from dapji.errors import FormatError, ModelNotFound
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from dapji.weights.safetensors import parse_index, parse_safetensors, read_safetensors, write_safetensors, write_shards


def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    return {
        "model.embed": rng.standard_normal((10, 4)).astype(np.float32),
        "model.halves": rng.standard_normal((3, 5)).astype(np.float16),
        "model.norm": rng.standard_normal(7).astype(np.float32),
        "model.cube": rng.standard_normal((2, 3, 4)).astype(np.float32),
    }


def as_tensor(name: str, values: np.ndarray) -> Tensor:
    format = FORMATS["F16" if values.dtype == np.float16 else "F32"]
    rows = values.reshape(-1, values.shape[-1])
    return Tensor(name=name, format=format, shape=values.shape, source=rows.view(np.uint8))


def to_write(values: dict[str, np.ndarray]) -> list[TensorToWrite]:
    return [TensorToWrite.of(name, as_tensor(name, array)) for name, array in values.items()]


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    safetensors.numpy.save_file(sample(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path)
    assert set(read) == set(sample())
    for name, values in sample().items():
        assert read[name].shape == values.shape
        np.testing.assert_array_equal(read[name].float32(), values.astype(np.float32))


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", to_write(sample()))
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, values in sample().items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)


def test_bfloat16_is_read_as_torch_writes_it() -> None:
    values = torch.tensor([[1.0, -2.5, 3.0e38, 0.0, float("inf")]]).to(torch.bfloat16)
    data = safetensors.torch.save({"w": values})
    np.testing.assert_array_equal(parse_safetensors(data, "m")["w"].float32(), values.float().numpy())


def test_other_dtypes_are_shown_and_refused_by_name() -> None:
    data = safetensors.numpy.save({"ids": np.arange(4), "w": np.ones((1, 2), np.float32)})
    read = parse_safetensors(data, "m")
    assert read.stored["ids"].type == "I64"
    assert read["w"].float32().tolist() == [[1.0, 1.0]]
    with pytest.raises(FormatError, match="'ids' has type I64"):
        read["ids"]


def test_shards_hold_at_most_what_they_may_and_read_back(tmp_path: Path) -> None:
    write_shards(tmp_path, to_write(sample()), max_bytes=130)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in sample().values())
    for shard in shards:
        loaded = safetensors.numpy.load_file(shard)
        assert len(loaded) == 1 or sum(values.nbytes for values in loaded.values()) <= 130
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(loaded)
    read = read_safetensors(tmp_path)
    for name, values in sample().items():
        np.testing.assert_array_equal(read[name].float32(), values.astype(np.float32))


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    write_shards(tmp_path, to_write(sample()), max_bytes=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_quantised_tensors_cannot_be_written(tmp_path: Path) -> None:
    tensor = TensorToWrite(name="w", format=FORMATS["Q4_0"], shape=(1, 32), chunks=list)
    with pytest.raises(FormatError, match="'w' is Q4_0"):
        write_safetensors(tmp_path / "m.safetensors", [tensor])


def file_of(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(dtype: str = "F32", shape: Any = (1, 2), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "needs 0 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", f"needs {2**63} bytes"),
        (file_of(b"[" * 50_000), "not the JSON"),
        (file_of(b'{"a":' * 50_000), "not the JSON"),
        (file_of(b"\xff\xfe{}"), "not the JSON"),
        (file_of({"w": entry(shape=[2**40, 2**40])}, bytes(8)), "the offsets say 8"),
        (file_of({"w": entry(shape=[2**63, 2])}, bytes(8)), "the offsets say 8"),
        (file_of({"w": entry(shape=[-1, -2])}, bytes(8)), "not the JSON"),
        (file_of({"w": entry(shape=[0, 2], offsets=[0, 0])}), "no values"),
        (file_of({"w": entry(shape=[1] * 9)}, bytes(8)), "9 dimensions"),
        (file_of({"w": entry(offsets=[0, 2**64 - 1])}, bytes(8)), "bytes 0 to 18446744073709551615 of 8"),
        (file_of({"w": entry(offsets=[8, 0])}, bytes(8)), "bytes 8 to 0 of 8"),
        (file_of({"w": entry(shape=[1, 3])}, bytes(8)), "takes 12 bytes, the offsets say 8"),
        (file_of({"w": entry(dtype="F99")}, bytes(8)), "unknown dtype 'F99'"),
        (file_of({"w": entry() | {"extra": 1}}, bytes(8)), "not the JSON"),
        (file_of({"a": entry(), "b": entry()}, bytes(8)), "overlaps tensor 'b'"),
        (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
        (file_of({"a": entry()}, bytes(12)), "take 8 bytes, the file has 12"),
        (file_of({"__metadata__": {"a": 1}, "w": entry()}, bytes(8)), "not the JSON"),
        (
            file_of(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
            "the name 'w' appears twice",
        ),
        (file_of(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "appears twice"),
    ],
)
def test_hostile_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match="m: ") as error:
        parse_safetensors(data, "m")
    assert message in str(error.value)


def test_a_file_cut_anywhere_is_refused() -> None:
    data = safetensors.numpy.save(sample())
    for step in range(64):
        with pytest.raises(FormatError):
            parse_safetensors(data[: len(data) * step // 64], "m")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors", "x"])
def test_an_index_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(FormatError, match="no plain name"):
        parse_index(json.dumps({"weight_map": {"w": name}}).encode(), "index")


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, to_write(sample()), max_bytes=130)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = index["weight_map"]["model.norm"]

    index["weight_map"]["ghost"] = shard
    index_path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match="'ghost' is missing"):
        read_safetensors(tmp_path)

    del index["weight_map"]["ghost"], index["weight_map"]["model.norm"]
    index_path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"holds tensor 'model.norm', .* places in None"):
        read_safetensors(tmp_path)

    index["weight_map"]["model.norm"] = "model-00009-of-00009.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="model-00009"):
        read_safetensors(tmp_path)

    index_path.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(FormatError, match="appears twice"):
        read_safetensors(tmp_path)


def test_a_folder_is_a_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path, to_write(sample()), max_bytes=10_000)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "huggingface"
    assert checkpoint.metadata == {"model_type": "llama", "hidden_size": 4}
    assert checkpoint.generation == {"eos_token_id": [1, 2]}
    assert checkpoint.nbytes == sum(values.nbytes for values in sample().values())
    assert checkpoint.formats == {"F32": 160 + 28 + 96, "F16": 30}


def test_a_gguf_file_is_a_checkpoint(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, to_write(sample()))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.kind == "gguf"
    assert checkpoint.metadata["general.architecture"] == "llama"
    np.testing.assert_array_equal(checkpoint.tensors["model.cube"].float32(), sample()["model.cube"])


def test_what_is_no_checkpoint_gets_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="neither"):
        open_checkpoint(tmp_path)
    write_gguf(tmp_path / "m.gguf", {}, [])
    with pytest.raises(FormatError, match="GGUF files") as error:
        open_checkpoint(tmp_path)
    assert "m.gguf" in str(error.value)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(FormatError) as error:
            open_checkpoint(path)
        assert "convert them to safetensors" in str(error.value)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="empty"):
        open_checkpoint(tmp_path / "empty.gguf")
