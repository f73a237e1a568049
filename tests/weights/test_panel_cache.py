"""Packed weights kept from one start to the next: the same logits to the last bit, and never those of another file."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import dapji
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from dapji.ops import native
from dapji.ops.batch import Batch
from dapji.ops.rope import RopeConfig
from dapji.weights import panel_cache
from random_model import write_random

IDS = np.arange(20, dtype=np.int32)


def write_model(path: Path, seed: int) -> Path:
    """Some 3 MB in Q4_K, Q6_K and F32, so that its cache spans several chunks; a Llama, whose rows are reordered."""
    attention = AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=32, rope=RopeConfig(dim=32, theta=10000.0))
    layer = LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=1024))
    config = ModelConfig(
        family="llama", dim=256, vocab_size=300, max_context=64, norm_eps=1e-5, layers=(layer,) * 5, tied_head=False
    )
    write_random(path, config, seed=seed)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two models of one size, that differ in their weights."""
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"{seed}.gguf", seed).read_bytes() for seed in (0, 1)]


@pytest.fixture
def path(tmp_path: Path, models: list[bytes]) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(models[0])
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache" / "panels"
    monkeypatch.setenv("DAPJI_CACHE", str(folder))
    return folder


def logits(path: Path) -> NDArray[np.float32]:
    with dapji.load(path, executor="native") as model:
        return model.executor.step(Batch.single(IDS))


@pytest.fixture
def wanted(path: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float32]:
    """Without a cache."""
    with monkeypatch.context() as without:
        without.setenv("DAPJI_CACHE", "off")
        return logits(path)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an item whenever a model is packed."""
    made: list[int] = []
    pack = native._pack

    def counted(matrices: list[object], *rest: object) -> None:
        made.append(len(matrices))
        pack(matrices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "_pack", counted)
    return made


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_the_second_start_packs_nothing_and_computes_the_same(
    path: Path, folder: Path, wanted: NDArray[np.float32], packings: list[int]
) -> None:
    for n_packings in (1, 1, 1):
        np.testing.assert_array_equal(logits(path), wanted)
        assert len(packings) == n_packings
    (entry,) = panel_cache.entries()
    assert (entry.model, entry.path, entry.current) == (str(path), the_file(folder), True)
    assert entry.size == entry.path.stat().st_size > path.stat().st_size


@pytest.mark.parametrize("huge", [True, False])
def test_mapped_or_copied_it_is_the_same(
    huge: bool, path: Path, folder: Path, wanted: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(path)
    monkeypatch.setattr(panel_cache, "_in_huge_pages", lambda packed: huge)
    np.testing.assert_array_equal(logits(path), wanted)


def test_off_means_that_nothing_is_kept(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPJI_CACHE", "off")
    logits(path)
    assert panel_cache.folder() is None
    assert panel_cache.entries() == []
    assert panel_cache.clear() == 0
    assert not folder.exists()


def in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def by_a_rename(path: Path, content: bytes) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(content)
    other.replace(path)


@pytest.mark.parametrize("change", [in_place, by_a_rename])
def test_a_file_that_changes_is_packed_again(
    change: Callable[[Path, bytes], None],
    path: Path,
    models: list[bytes],
    folder: Path,
    wanted: NDArray[np.float32],
    packings: list[int],
) -> None:
    """Even where neither its size nor the time that programs can set tells so."""
    logits(path)
    before = path.stat()
    change(path, models[1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert [entry.current for entry in panel_cache.entries()] == [False]
    changed = logits(path)
    assert len(packings) == 2
    assert (changed != wanted).any()
    np.testing.assert_array_equal(logits(path), changed)
    assert len(packings) == 2
    the_file(folder)  # which has replaced the other one


def test_panels_of_another_version_are_packed_again(
    path: Path, folder: Path, packings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = native.panels_version()
    for one in (version, version + 1, version + 1):
        monkeypatch.setattr(native, "panels_version", lambda one=one: one)
        logits(path)
    assert len(packings) == 2


def test_a_file_that_changes_while_it_is_packed_is_not_kept(
    path: Path, models: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = native._pack

    def and_change(*arguments: object) -> None:
        pack(*arguments)  # type: ignore[arg-type]
        in_place(path, models[1])

    monkeypatch.setattr(native, "_pack", and_change)
    logits(path)
    assert panel_cache.entries() == []


def cut(size: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)

    return damage


def overwritten(at: int, content: bytes) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        *(cut(size) for size in (0, 10, 100, 1 << 20, (2 << 20) + 10, -1)),
        overwritten(0, b"GGUF"),
        overwritten(12, b"\xff"),  # the version
        overwritten(16, b"\xff\xff\xff\xff"),  # the header's size
        overwritten(60, b"!!"),  # the header
        overwritten(3 << 20, bytes(4096)),  # a block of the matrices that never reached the disk
        lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    ],
)
def test_a_damaged_file_is_never_used_and_made_anew(
    damage: Callable[[Path], None], path: Path, folder: Path, wanted: NDArray[np.float32], packings: list[int]
) -> None:
    logits(path)
    whole = the_file(folder).read_bytes()
    damage(the_file(folder))
    np.testing.assert_array_equal(logits(path), wanted)
    assert len(packings) == 2
    assert the_file(folder).read_bytes() == whole


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dapji", "run", str(path), "abc", "--max-tokens", "8", "--temperature", "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_at_once(path: Path, folder: Path) -> None:
    results = [(*child.communicate(), child.returncode) for child in [start(path) for _ in range(4)]]
    out, err, code = results[0]
    assert code == 0, err
    assert results == [(out, err, 0)] * 4
    assert start(path).communicate() == (out, err)
    assert [entry.current for entry in panel_cache.entries()] == [True]
    the_file(folder)  # and nothing else


def test_what_a_killed_process_left_is_not_used_and_goes_in_time(
    path: Path, folder: Path, wanted: NDArray[np.float32]
) -> None:
    code = f"import dapji, time; model = dapji.load({str(path)!r}); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        while not (folder.exists() and list(folder.iterdir())):
            assert child.poll() is None
        child.kill()
    left = the_file(folder)
    assert left.name.endswith(".tmp")
    left.write_bytes(left.read_bytes() or b"begun")  # it may have been killed before its first byte
    np.testing.assert_array_equal(logits(path), wanted)
    assert left.exists()  # for all that another process knows, it is being written
    assert [entry.current for entry in panel_cache.entries()] == [True]
    os.utime(left, (0, 0))
    assert panel_cache.sweep() > 0
    assert not left.exists()
    assert [entry.current for entry in panel_cache.entries()] == [True]


def test_an_interrupt_gives_up_writing(path: Path, folder: Path) -> None:
    """Of a file that would take half a minute."""
    code = f"""
import contextlib, signal, time, dapji
from dapji.weights import panel_cache

class Slow:
    def __init__(self, file):
        self.seek = file.seek
    def write(self, data):
        time.sleep(0.05)

replacing = panel_cache.replacing

@contextlib.contextmanager
def slowly(path):
    with replacing(path) as file:
        yield Slow(file)

panel_cache.replacing, panel_cache._CHUNK, panel_cache._PATIENCE = slowly, 4096, 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
dapji.load({str(path)!r}).close()
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "writing packed weights for the next start; Ctrl-C leaves it\n"
        child.send_signal(signal.SIGINT)
        assert child.stderr.read().endswith("KeyboardInterrupt\n")
    assert list(folder.iterdir()) == []


def no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.write_text("a file where a folder is wanted")


def may_not_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder of another user: the tests may run as one whom no permissions stop."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dapji.weights.panel_cache.replacing", refuse)


def little_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(no_folder, "Not a directory"), (may_not_be_written, "Permission denied"), (little_room, "has too little room")],
)
def test_without_a_place_it_works_with_a_warning(
    make: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    path: Path,
    folder: Path,
    wanted: NDArray[np.float32],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(folder, monkeypatch)
    np.testing.assert_array_equal(logits(path), wanted)
    (record,) = caplog.records
    assert record.name == "dapji"
    assert reason in record.getMessage()
    assert "DAPJI_CACHE" in record.getMessage()
    assert panel_cache.entries() == []


def test_a_disk_that_becomes_full(path: Path, folder: Path) -> None:
    """A limit on the size of files stands for it."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    command = [sys.executable, "-m", "dapji", "run", str(path), "abc", "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("packed weights are not kept for the next start: cannot write ")
    assert "File too large" in line
    assert list(folder.iterdir()) == []


def test_what_has_gone_is_swept_when_another_is_written(path: Path, folder: Path, models: list[bytes]) -> None:
    logits(path)
    other = path.with_name("other.gguf")
    other.write_bytes(models[1])
    path.unlink()
    logits(other)
    assert [entry.model for entry in panel_cache.entries()] == [str(other)]


def test_each_file_is_cleared_alone_or_all_together(path: Path, folder: Path, models: list[bytes]) -> None:
    other = path.with_name("other.gguf")
    other.write_bytes(models[1])
    for model in (path, other):
        logits(model)
    sizes = {entry.model: entry.size for entry in panel_cache.entries()}
    assert panel_cache.clear(path) == sizes[str(path)]
    assert panel_cache.clear(path) == 0
    assert [entry.model for entry in panel_cache.entries()] == [str(other)]
    assert panel_cache.clear() == sizes[str(other)]
    assert panel_cache.entries() == []
