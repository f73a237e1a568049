"""The page of a run, as text and in a browser: its numbers are those of the run, and what models say stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from playwright.sync_api import Browser, Page, expect
from test_tune import interrupt_at, lines

import tiny_training as tiny
from browsing import browser, serious_violations
from dapji.errors import FormatError, UsageError
from dapji.evaluation.bootstrap import Difference, Score
from dapji.evaluation.result import Comparison, Examined, Item, Result, write_result
from dapji.proof.lineage import Role
from dapji.training import log, report
from dapji.training.log import RunLog
from dapji.training.report import PAGE, write_report
from dapji.training.report.plot import Point, nice_ticks, number, smoothed
from dapji.training.report.texts import TEXTS
from dapji.training.settings import read_recipe
from dapji.training.tune import tune

__all__ = ["browser"]

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\0\u202e\x1b[31m"
SOURCES = Path(report.__file__).parent


def result() -> Result:
    """Of two questions, the first of which was wrong before, and the second is now."""
    items = [
        Item(
            row=row, question=f"{row}?", fields={"language": "korean"}, expected={"exact": str(row)}, answer=answer,
            checks={"exact": score > 0}, score=score, truncated=False, verdict_probability=None, before_answer="before",
            before_checks={}, before_score=before, before_truncated=False, before_verdict_probability=None,
        )
        for row, answer, score, before in ((1, "1", 1.0, 0.0), (2, HOSTILE, 0.0, 1.0))
    ]  # fmt: skip
    score = Score(value=0.9, low=0.8, high=0.96, n=50)
    difference = Difference(value=0.8, low=0.7, high=0.9, p=0.0001, better=41, worse=1)
    whole = Comparison(score=score, before=Score(value=0.1, low=0.0, high=0.2, n=50), difference=difference)
    return Result(
        kind="exam", model="tiny", adapter="run", against=Examined(model="tiny", adapter=None), file="exam.jsonl",
        sha256="0" * 64, score=whole.score, before=whole.before, difference=whole.difference,
        groups={"language": {"korean": whole}}, items=items, versions={}, settings={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: `run`, whose answers and examples are hostile, and `pairs`, of DPO."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = tiny.write_recipe(
        folder, "[lora]\nrank = 4\n[optimizer]\nlearning_rate = 1e-2\n[run]\nepochs = 12\nbatch = 1"
    )
    row = {"prompt": HOSTILE.replace("\0", ""), "completion": "안녕 <b>"}
    for name in ("train", "held-out"):
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    assert tune(read_recipe(recipe, changes={"run.evaluate_every": "3"}))
    path = folder / "run" / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**sample, "answer": HOSTILE}) + "\n" for sample in samples))
    for name in ("train", "held-out"):
        tiny.write_pairs(folder / f"{name}.jsonl", 4)
    pairs = tiny.write_recipe(folder, '[method]\nname = "dpo"\n[run]\nsteps = 4\nbatch = 1', name="pairs")
    assert tune(read_recipe(pairs))
    stopped = read_recipe(pairs, changes={"output": f"{folder}/stopped"})
    assert not tune(stopped, report=lambda metrics: interrupt_at(2)(metrics) if "loss" in metrics else None)
    write_result(folder / "result.json", result())
    write_report(folder / "run" / PAGE, [folder / "run"], evaluations=[folder / "result.json"], language="en")
    write_report(folder / "goes-on.html", [folder / "stopped"], running=True, language="en")
    write_report(folder / "both.html", [folder / "run", folder / "pairs"], language="en")
    return folder


@pytest.fixture
def opened(browser: Browser) -> Iterator[Any]:
    """Opens a file as a new reader, and fails where the browser has had to complain, or asked for anything else."""
    complaints: list[str] = []
    contexts = []

    def open_file(path: Path, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda line: complaints.append(line.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if asked.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert complaints == []


def table(page: Page, title: str) -> dict[str, dict[int, float]]:
    """The columns of the table under a plot, by their heads."""
    figure = page.locator("figure", has=page.locator(".title", has_text=re.compile(f"^{title}$")))
    figure.locator("summary").click()
    (_, *names), *rows = (row.split("\t") for row in figure.locator("tr").all_inner_texts())
    return {
        name: {int(step): float(values[i].replace(",", "")) for step, *values in rows if values[i]}
        for i, name in enumerate(names)
    }


def test_the_numbers_are_those_of_the_run(runs: Path, opened: Any) -> None:
    page = opened(runs / "run" / PAGE)
    metrics = lines(runs / "run")
    steps = {line["step"]: line for line in metrics if "loss" in line}
    held_out = {line["step"]: line["evaluation_loss"] for line in metrics if "evaluation_loss" in line}
    loss = table(page, "Loss")
    # numbers are written with four digits
    assert loss["training"] == pytest.approx({step: line["loss"] for step, line in steps.items()}, rel=1e-3)
    assert loss["held out"] == pytest.approx(held_out, rel=1e-3)
    for title, value in {
        "Learning rate": lambda line: line["learning_rate"],
        "Length of the gradient": lambda line: line["gradient_norm"],
        "Trained tokens/s": lambda line: line["trained_tokens"] / line["seconds"],
        "Peak memory, GB": lambda line: line["memory"] / 1e9,
    }.items():
        (column, *_) = table(page, title).values()
        assert column == pytest.approx({step: value(line) for step, line in steps.items()}, rel=5e-3, abs=1e-9), title
    tiles = page.locator("main > .tiles > div").all_inner_texts()
    assert tiles[0].split("\n") == [
        "Held-out loss",
        number(held_out[max(steps)]),
        f"before training {number(held_out[0])}",
    ]
    assert f"{sum(line['trained_tokens'] for line in steps.values()):,}" in tiles[1]
    # the line of the plot is where its values are: the least loss is drawn lowest
    points = page.locator("figure polyline").first.get_attribute("points")
    assert points is not None
    heights = [float(point.split(",")[1]) for point in points.split()]
    losses = [line["loss"] for line in steps.values()]
    assert heights[losses.index(min(losses))] == max(heights)
    assert heights[losses.index(max(losses))] == min(heights)


def test_values_under_the_pointer_and_by_keys(runs: Path, opened: Any) -> None:
    page = opened(runs / "run" / PAGE)
    figure = page.locator("figure").first
    value, at = figure.locator(".legend b").first, figure.locator(".at")
    last = value.inner_text()
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.11, box["y"] + 50)
    first = next(line for line in lines(runs / "run") if "loss" in line)
    expect(value).to_have_text(number(first["loss"]))
    expect(figure.locator(".cursor")).to_have_attribute("visibility", "visible")
    page.mouse.move(0, 0)
    expect(value).to_have_text(last)
    expect(at).to_be_hidden()
    figure.locator("svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(at).to_have_text("Step 1")


def test_what_a_model_says_is_text(runs: Path, opened: Any) -> None:
    for path in (runs / "run" / PAGE, runs / "both.html"):
        page = opened(path)
        shown = page.locator(".answers .said").first.inner_text()
        assert "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>␀" in shown
        assert page.evaluate("window.hacked") is None
        expect(page.locator("main img, main script")).to_have_count(0)
    page = opened(runs / "run" / PAGE)
    example = page.locator(".card", has=page.locator("mark")).first
    expect(example.locator("mark")).to_have_text("안녕 <b><|im_end|>")
    assert HOSTILE.partition("\0")[0] in example.inner_text()


def test_the_policy_lets_no_other_script_run(runs: Path, browser: Browser) -> None:
    page = browser.new_page()
    page.goto((runs / "run" / PAGE).as_uri())
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 3\">')")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 4'}))")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    page.close()


def test_it_is_read_without_a_script_and_on_a_phone(runs: Path, opened: Any) -> None:
    page = opened(runs / "run" / PAGE, java_script_enabled=False, viewport={"width": 360, "height": 640})
    expect(page.locator("h1")).to_be_visible()
    expect(page.locator("figure svg").first).to_be_visible()
    expect(page.locator("#language")).to_be_hidden()
    page = opened(runs / "run" / PAGE, viewport={"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page = opened(runs / "both.html", viewport={"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_languages_and_themes(runs: Path, opened: Any) -> None:
    page = opened(runs / "run" / PAGE, color_scheme="dark")
    english = page.locator("body").inner_text()
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == "rgb(20, 24, 23)"
    page.get_by_role("button", name="Light or dark").click()
    page.get_by_role("button", name="한국어").click()
    expect(page.locator("html")).to_have_attribute("lang", "ko")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    korean = page.locator("body").inner_text()
    write_report(runs / "korean.html", [runs / "run"], evaluations=[runs / "result.json"], language="ko")
    assert opened(runs / "korean.html").locator("body").inner_text() == korean
    page.get_by_role("button", name="English").click()
    assert page.locator("body").inner_text() == english


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", [f"run/{PAGE}", "both.html", "goes-on.html"])
def test_axe_finds_nothing_serious_in_a_report(runs: Path, opened: Any, name: str, theme: str) -> None:
    page = opened(runs / name, color_scheme=theme, bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert serious_violations(page) == []


def test_how_far_a_run_is(runs: Path, opened: Any) -> None:
    page = opened(runs / "goes-on.html")
    expect(page.locator(".state")).to_have_text(re.compile(r"Running: step 2 of 4, about \d+:\d\d left."))
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "2")
    page.clock.install()
    with page.expect_navigation():
        page.reload()
    page.evaluate("window.before = true")
    page.get_by_role("button", name="Keep loading again", pressed=True).click()
    page.clock.fast_forward(31_000)
    assert page.evaluate("window.before")
    page.get_by_role("button", name="Keep loading again", pressed=False).click()
    with page.expect_navigation():
        page.clock.fast_forward(31_000)
    assert page.evaluate("window.before") is None
    page = opened(runs / "stopped" / PAGE)
    expect(page.locator(".state")).to_have_text("Not finished: step 2 of 4. “dapji tune RECIPE --resume” goes on.")


def test_several_runs_are_compared(runs: Path, opened: Any) -> None:
    page = opened(runs / "both.html")
    names = [f"{runs.name}/run", f"{runs.name}/pairs"]
    assert page.locator("figure .legend").first.locator("li span").all_inner_texts() == names
    differ = page.locator("h2", has_text="Settings in which they differ").locator("+ .wide")
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in differ.locator("tbody tr").all_inner_texts()}
    assert rows["method.name"] == ["supervised", "dpo"]
    assert rows["lora.rank"] == ["4", "–"]
    assert "run.batch" not in rows
    last = lines(runs / "pairs")[-2]
    assert table(page, "Margin of rewards")[names[1]][last["step"]] == pytest.approx(last["margin"], rel=1e-3)


def test_an_evaluation_is_shown(runs: Path, opened: Any) -> None:
    page = opened(runs / "run" / PAGE)
    card = page.locator(".card", has_text="exam.jsonl")
    assert card.locator(".tiles > div").all_inner_texts() == [
        "Score\n90.0 %\n95 % interval 80.0 % to 96.0 %",
        "Before\n10.0 %\n95 % interval 0.0 % to 20.0 %",
        "Difference\n80.0 %\n95 % interval 70.0 % to 90.0 %\n41 better, 1 worse\np = 1e-4",
    ]
    expect(card.locator("tbody tr").first).to_have_text("language: korean5090.0 %10.0 %80.0 %")
    card.locator("summary").click()
    expect(card.locator("details tbody th")).to_have_text(["2", "1"])  # the wrong answer first


def test_a_run_that_goes_on_loads_its_page_again(tmp_path: Path) -> None:
    pages: list[str] = []
    page = tmp_path / "run" / PAGE
    recipe = read_recipe(tiny.write_recipe(tmp_path, "[run]\nsteps = 3\nbatch = 1\nevaluate_every = 1"))
    stop = interrupt_at(2)

    def look(metrics: Any) -> None:
        if "loss" in metrics:
            pages.append(page.read_text())
            stop(metrics)

    assert not tune(recipe, report=look)
    pages.append(page.read_text())
    assert tune(recipe, resume=True)
    pages.append(page.read_text())
    states = [re.findall(r'class="state (\w+)"', text) for text in pages]
    assert states == [["running"], ["running"], ["stopped"], ["done"]]
    assert ['http-equiv="refresh"' in text for text in pages] == [True, True, False, False]


@pytest.mark.parametrize(("takes", "seconds"), [(0.1, 30), (3, 150)])
def test_the_page_of_many_steps_takes_little_of_the_time(
    takes: float, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = 1000.0, []

    def write(path: Path, runs: Any, *, running: bool) -> None:
        nonlocal now
        written.append(now)
        now += takes

    monkeypatch.setattr(log, "write_report", write)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now))
    with RunLog(tmp_path, read_recipe(tiny.write_recipe(tmp_path))) as told:
        told.begin({}, 0)
        for step in range(1000):
            now += 1
            told.metrics({"step": step, "loss": 1.0})
    gaps = [b - a for a, b in pairwise(written[:-1])]  # the last is that of the end
    assert len(gaps) > 5
    assert all(seconds < gap < seconds + 5 for gap in gaps)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run that has begun"):
        write_report(tmp_path / "x.html", [tmp_path])
    assert tune(read_recipe(tiny.write_recipe(tmp_path, "[run]\nsteps = 1\nbatch = 1")))
    (tmp_path / "result.json").write_text('{"kind": "exam", "model": 3}')
    with pytest.raises(FormatError, match=r"result.json: no result of an evaluation: Expected `str`, got `int`"):
        write_report(tmp_path / "x.html", [tmp_path / "run"], evaluations=[tmp_path / "result.json"])
    (tmp_path / "run" / "metrics.jsonl").write_text("{\n")
    with pytest.raises(FormatError, match=r"metrics.jsonl: no JSON"):
        write_report(tmp_path / "x.html", [tmp_path / "run"])


def test_every_language_has_every_text_and_every_text_is_used() -> None:
    def slots(text: str) -> list[str]:
        return sorted(re.findall(r"\{(\w+)\}", text))

    assert TEXTS["en"].keys() == TEXTS["ko"].keys()
    assert {f"lineage.{role}" for role in get_args(Role)} <= TEXTS["en"].keys()
    assert [key for key in TEXTS["en"] if slots(TEXTS["en"][key]) != slots(TEXTS["ko"][key])] == []
    sources = "".join(path.read_text() for path in SOURCES.glob("*.py") if path.name != "texts.py")
    made = ("state.", "metric.", "files.", "lineage.", "evaluation.")
    assert [key for key in TEXTS["en"] if f'"{key}"' not in sources and not key.startswith(made)] == []


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.31, 5.85), (-2.4, 1.5), (1e-9, 3e-9), (4, 4), (0, 0), (-3, -3), (1e5, 1.1e5)]
)
def test_ticks_enclose_all_values_and_are_round(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-15
    assert ticks[-1] >= high - 1e-15
    assert 2 <= len(ticks) <= 7
    gaps = {f"{b - a:.6e}"[:1] for a, b in pairwise(ticks)}
    assert gaps <= {"1", "2", "5"}


def test_a_smoothed_line_is_a_mean_of_what_was_before() -> None:
    values = [float(i % 7) for i in range(100)]
    line = smoothed([Point(i, value) for i, value in enumerate(values)])
    keep = 1 - 25 / 100
    for i in (0, 1, 50, 99):
        weights = [keep ** (i - j) for j in range(i + 1)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert line[i].value == pytest.approx(mean)
