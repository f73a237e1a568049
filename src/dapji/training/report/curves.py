"""Which plots a run has, or several runs beside each other, out of their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from dapji.training.report.markup import Markup
from dapji.training.report.plot import Point, Series, plot, smoothed
from dapji.training.report.runs import RunRecord
from dapji.training.report.texts import TEXTS, Language, Text, text

_OWN = frozenset({"step", "loss", "learning_rate", "gradient_norm", "trained_tokens", "seconds", "memory"})
"""Metrics that every run has; others are of a method."""
_REWARDS = "_reward"
_SMOOTHED = 40
"""Steps from which on a line is smoothed."""

Value: TypeAlias = Callable[[Mapping[str, Any]], float]
_Drawn: TypeAlias = tuple[Text, list[Series], bool]
"""A plot's title, its lines, and whether it begins at 0."""


def curves(runs: Sequence[RunRecord], language: Language) -> list[Markup]:
    """Those that have something to draw."""
    drawn = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    return [
        plot(f"plot-{i}", title, series, language, zero=zero) for i, (title, series, zero) in enumerate(drawn) if series
    ]


def _of_one(run: RunRecord) -> Iterable[_Drawn]:
    yield text("plot.loss"), [*_train(run, _of("loss")), *_held_out(run, "evaluation_loss")], False
    for name in _method_metrics([run]):
        yield _title(name), _method(run, name), False
    yield text("plot.rate"), _line(run, "plot.rate", _of("learning_rate")), True
    norms, clip = _train(run, _of("gradient_norm")), run.recipe.optimizer.clip
    # a level far above all that was seen would press them to the ground
    highest = max((point.value for each in norms for point in each.points), default=0.0)
    if 0 < clip <= 2 * highest:
        level = Series(name=text("series.clip"), points=[Point(run.steps[0]["step"], clip)], kind="level")
        norms = [*norms, level]
    yield text("plot.norm"), norms, True
    yield text("plot.speed"), _train(run, _speed), True
    yield text("plot.memory"), _line(run, "plot.memory", _gigabytes), True


def _of_several(runs: Sequence[RunRecord]) -> Iterable[_Drawn]:
    def beside(series: Callable[[RunRecord], list[Series]]) -> list[Series]:
        """The same of each run, in its colour and under its name."""
        return [
            Series(name=run.name, points=each.points, colour=colour, kind=each.kind)
            for colour, run in enumerate(runs)
            for each in series(run)[-1:]
        ]

    yield text("plot.train"), beside(lambda run: _train(run, _of("loss"))), False
    yield text("plot.evaluation"), beside(lambda run: _held_out(run, "evaluation_loss")), False
    for name in _method_metrics(runs):
        for metric in _metrics_of(runs, name):
            title = _both(text("plot.rewards"), _name(metric)) if name == _REWARDS else _name(metric)
            yield title, beside(partial(_train, value=_of(metric))), False
    yield text("plot.rate"), beside(lambda run: _line(run, "plot.rate", _of("learning_rate"))), True
    yield text("plot.norm"), beside(lambda run: _train(run, _of("gradient_norm"))), True
    yield text("plot.speed"), beside(lambda run: _train(run, _speed)), True
    yield text("plot.memory"), beside(lambda run: _line(run, "plot.memory", _gigabytes)), True


def _of(name: str) -> Value:
    return lambda line: float(line[name])


def _speed(line: Mapping[str, Any]) -> float:
    return float(line["trained_tokens"] / line["seconds"])


def _gigabytes(line: Mapping[str, Any]) -> float:
    return float(line["memory"] / 1e9)


def _points(lines: Sequence[Mapping[str, Any]], value: Value) -> list[Point]:
    """Of the lines that have it."""
    found = []
    for line in lines:
        try:
            found.append(Point(line["step"], value(line)))
        except KeyError:
            continue
    return found


def _train(run: RunRecord, value: Value, *, name: Text | None = None, colour: int = 0) -> list[Series]:
    """Each step, faint, and what they are in the mean; the line alone of few steps."""
    points = _points(run.steps, value)
    kind = text("series.train")
    if len(points) < _SMOOTHED:
        return [Series(name=name or kind, points=points, colour=colour)] if points else []
    smooth = text("series.smooth")
    return [
        Series(name=_both(name, kind), points=points, colour=colour, kind="faint"),
        Series(name=_both(name, smooth), points=smoothed(points), colour=colour),
    ]


def _held_out(run: RunRecord, metric: str, *, name: Text | None = None, colour: int = 1) -> list[Series]:
    points = _points(run.evaluations, _of(metric))
    kind = text("series.evaluation")
    return [Series(name=_both(name, kind), points=points, colour=colour, kind="marked")] if points else []


def _line(run: RunRecord, key: str, value: Value) -> list[Series]:
    points = _points(run.steps, value)
    return [Series(name=text(key), points=points)] if points else []


def _method_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """What the plots of methods are called: metrics, of which all rewards share one."""
    names = [
        name.removeprefix("evaluation_")
        for run in runs
        for line in (*run.steps[:1], *run.evaluations[:1])
        for name in line
    ]
    own = [name for name in names if name not in _OWN]
    return list(dict.fromkeys(_REWARDS if name.endswith(_REWARDS) else name for name in own))


def _metrics_of(runs: Sequence[RunRecord], name: str) -> list[str]:
    if name != _REWARDS:
        return [name]
    found = [each for run in runs for line in run.steps[:1] for each in line if each.endswith(_REWARDS)]
    return list(dict.fromkeys(found))


def _method(run: RunRecord, name: str) -> list[Series]:
    if name != _REWARDS:
        return [*_train(run, _of(name)), *_held_out(run, f"evaluation_{name}")]
    series: list[Series] = []
    for pair, metric in enumerate(_metrics_of([run], name)):
        label = _name(metric)
        series += _train(run, _of(metric), name=label, colour=2 * pair)
        series += _held_out(run, f"evaluation_{metric}", name=label, colour=2 * pair + 1)
    return series


def _title(name: str) -> Text:
    return text("plot.rewards") if name == _REWARDS else _name(name)


def _name(metric: str) -> Text:
    """A metric that is not known here is called as it is."""
    key = f"metric.{metric}"
    return text(key) if key in TEXTS["en"] else text("metric.other", name=metric)


def _both(name: Text | None, kind: Text) -> Text:
    return kind if name is None else text("series.both", name=name, kind=kind)
