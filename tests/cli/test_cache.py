"""`dapji cache`: what it shows of files that chats have left, and what it deletes."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from in_process import Dapji

from tiny import ANSWER


@pytest.fixture(autouse=True)
def own_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is by default."""
    monkeypatch.delenv("DAPJI_CACHE")


@pytest.fixture
def used(home: Path, tiny: Path, tmp_path: Path, dapji: Dapji) -> Path:
    """A model by its path, beside which `installed` is in the store; both have been opened."""
    model = Path(shutil.copy(tiny, tmp_path / "model.gguf"))
    assert dapji("pull", f"file:{shutil.copy(tiny, tmp_path / 'source.gguf')}", "--name", "installed").code == 0
    for one in ("installed", model):
        assert dapji("chat", "-m", one, "hello") == (0, ANSWER + "\n", "")
    return model


def test_what_it_shows(used: Path, home: Path, dapji: Dapji) -> None:
    report = json.loads(dapji("cache", "--json").out)
    assert report["folder"] == str(home / "panels")
    assert {(one["model"], one["status"]) for one in report["models"]} == {
        ("installed", "ready"),
        (str(used), "ready"),
    }
    for one in report["models"]:
        assert one["size"] == Path(one["path"]).stat().st_size
        assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(one["last_use"]) < timedelta(minutes=5)
    assert report["total"] == sum(one["size"] for one in report["models"])

    used.touch()
    shown = dapji("cache")
    assert shown.code == 0
    header, *lines = (line.split() for line in shown.out.splitlines())
    assert header == ["SIZE", "STATUS", "LAST", "USE", "MODEL"]
    assert {(line[2], line[-1]) for line in lines} == {("ready", "installed"), ("outdated", str(used))}
    assert shown.err.endswith(f" in {home / 'panels'}\n")


def test_clearing(used: Path, dapji: Dapji) -> None:
    def kept() -> set[str]:
        return {one["model"] for one in json.loads(dapji("cache", "--json").out)["models"]}

    assert dapji("cache", "clear", "installed").code == 0
    assert kept() == {str(used)}
    assert dapji("chat", "-m", "installed", "hello").out == ANSWER + "\n"
    assert kept() == {str(used), "installed"}
    assert dapji("cache", "clear", used).code == 0
    assert kept() == {"installed"}
    assert dapji("cache", "clear").err.endswith(" freed\n")
    assert kept() == set()
    assert dapji("cache", "clear").err == "0 B freed\n"
    unknown = dapji("cache", "clear", "nothing")
    assert unknown.code == 1
    assert "no model 'nothing'" in unknown.err


def test_a_removed_model_leaves_nothing(used: Path, home: Path, dapji: Dapji) -> None:
    assert dapji("remove", "installed", "--yes").code == 0
    assert [one["model"] for one in json.loads(dapji("cache", "--json").out)["models"]] == [str(used)]
    assert len(list((home / "panels").iterdir())) == 1


def test_off(used: Path, dapji: Dapji, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPJI_CACHE", "off")
    assert dapji("cache") == (0, "", "the cache is off (DAPJI_CACHE)\n")
    assert json.loads(dapji("cache", "--json").out) == {"folder": None, "total": 0, "models": []}
    assert "cache            off" in dapji("doctor").out


def test_doctor_tells_its_size(used: Path, home: Path, dapji: Dapji) -> None:
    total = json.loads(dapji("cache", "--json").out)["total"]
    report = json.loads(dapji("doctor", "--json").out)["store"]
    assert (report["cache"], report["cached"]) == (str(home / "panels"), total)
