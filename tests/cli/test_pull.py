"""dapji pull, list and remove on a store of one's own, from files: sources and failures are tested in weights."""

import json
from pathlib import Path

import pytest
from in_process import Dapji

CATALOGUE = ("qwen2.5-coder-0.5b", "smollm2-135m", "qwen2.5-coder-1.5b")


def test_pull_prints_the_path_on_stdout_and_talks_on_stderr(dapji: Dapji, tiny: Path, home: Path) -> None:
    result = dapji("pull", f"file:{tiny}")
    path = home / "models" / "tiny" / "tiny.gguf"
    assert result == (0, f"{path}\n", f"fetching tiny from file:{tiny}\n")
    assert path.read_bytes() == tiny.read_bytes()
    assert dapji("pull", f"file:{tiny}") == (0, f"{path}\n", "tiny is installed already\n")


def test_pull_under_another_name(dapji: Dapji, tiny: Path, home: Path) -> None:
    assert dapji("pull", f"file:{tiny}", "--name", "mine").out == f"{home / 'models' / 'mine' / 'tiny.gguf'}\n"
    refused = dapji("pull", f"file:{tiny}", "--name", "../mine")
    assert (refused.code, refused.out) == (1, "")
    assert "cannot be a model's name" in refused.err


def test_what_cannot_be_pulled_has_a_reason_and_a_hint(dapji: Dapji, tmp_path: Path) -> None:
    result = dapji("pull", f"file:{tmp_path}/none.gguf")
    assert (result.code, result.out) == (1, "")
    assert f"file:{tmp_path}/none.gguf: {tmp_path} lacks none.gguf" in result.err
    assert "hint:" not in result.err  # a copy of the file is what was asked for
    unknown = dapji("pull", "smolm2")
    assert unknown.code == 1
    assert "did you mean smollm2" in unknown.err
    assert "hint: dapji pull smollm2-135m" in unknown.err
    assert dapji("pull").code == 2


def test_a_path_or_a_source_in_the_wrong_place_is_told_how_to_become_a_model(
    dapji: Dapji, tiny: Path, tmp_path: Path
) -> None:
    assert dapji("pull", tiny).err.endswith(f"\nhint: dapji pull file:{tiny} installs what is there\n")
    assert dapji("show", "hf:a/b").err.endswith("\nhint: dapji pull hf:a/b installs it under a name\n")
    assert dapji("show", "").err.startswith("error: no model '' is installed")  # not the working folder
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert f"\nhint: name one: file:{tmp_path}/FILE\n" in dapji("pull", f"file:{tmp_path}").err


def test_a_store_that_cannot_be_one_has_a_remedy(
    dapji: Dapji, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPJI_HOME", str(tiny))
    result = dapji("pull", f"file:{tiny}")
    assert result.code == 1
    assert result.err == (
        f"error: no access to {tiny}/models: Not a directory\nhint: set DAPJI_HOME to a folder that you may write to\n"
    )


def test_list_of_an_empty_store_is_the_catalogue(dapji: Dapji) -> None:
    result = dapji("list")
    header, *lines = result.out.splitlines()
    assert header.split() == ["NAME", "STATUS", "SIZE", "LICENCE", "DESCRIPTION"]
    assert {line.split()[0] for line in lines} == set(CATALOGUE)
    assert {line.split()[1] for line in lines} == {"available"}
    assert "491.4 MB" in result.out


def test_list_shows_what_is_installed_and_what_is_begun(dapji: Dapji, tiny: Path, home: Path) -> None:
    dapji("pull", f"file:{tiny}")
    partial = home / "partial" / "smollm2-135m" / "x"
    partial.mkdir(parents=True)
    (partial / "model.part").write_bytes(bytes(1000))
    models = {model["name"]: model for model in json.loads(dapji("list", "--json").out)}
    assert set(models) == {"tiny", *CATALOGUE}
    assert {tuple(model) for model in models.values()} == {tuple(models["tiny"])}  # the same keys everywhere
    installed = models["tiny"]
    assert (installed["status"], installed["size"]) == ("installed", tiny.stat().st_size)
    assert installed["path"] == str(home / "models" / "tiny" / "tiny.gguf")
    assert installed["source"] == f"file:{tiny}"
    begun = models["smollm2-135m"]
    assert (begun["status"], begun["size"], begun["downloaded"]) == ("partial", 98_362_432, 1000)
    assert dapji("list").out.splitlines()[1].split()[:2] == ["tiny", "installed"]


def test_remove_asks_and_says_what_it_freed(dapji: Dapji, tiny: Path, home: Path) -> None:
    dapji("pull", f"file:{tiny}")
    refused = dapji("remove", "tiny", stdin="n\n")
    assert refused.code == 1
    assert "Delete tiny" in refused.err
    assert (home / "models" / "tiny").exists()
    assert dapji("remove", "tiny", stdin="y\n").code == 0
    assert not (home / "models" / "tiny").exists()
    assert tiny.exists()
    dapji("pull", f"file:{tiny}")
    removed = dapji("remove", "tiny", "--yes")
    assert (removed.code, removed.out) == (0, "")
    assert removed.err.startswith("removed tiny, ")
    missing = dapji("remove", "tiny", "--yes")
    assert missing.code == 1
    assert "tiny is not in the store" in missing.err


@pytest.mark.parametrize("name", ["pull", "list", "remove", "show", "quantize"])
def test_help_has_examples_and_exit_codes(dapji: Dapji, name: str) -> None:
    result = dapji(name, "--help")
    assert result.code == 0
    assert f"  dapji {name}" in result.out
    assert "Exit codes: 0" in result.out
    assert max(map(len, result.out.splitlines())) <= 100
