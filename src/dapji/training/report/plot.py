"""A plot as a figure of HTML: SVG with its title and description, a legend with the newest values, and a table.

Without a script it shows everything; with one, the values under the pointer. Knows no run: series of numbers by step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from dapji.training.report.markup import Child, Markup, h, join, table
from dapji.training.report.texts import Language, Text, text

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 26
_COLOURS = 6
"""That the style sheet has; more series are dashed."""
_DRAWN = 600
"""Points of a line, at most: a pixel has no room for more."""
_LISTED = 200
"""Rows of a table, at most."""


class Point(NamedTuple):
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Series:
    name: Text | str
    points: Sequence[Point]
    """By step, not empty."""
    colour: int = 0
    kind: Literal["line", "faint", "marked", "level"] = "line"
    """marked: a dot for each of few points. level: one value, dashed all over the plot; neither in legend nor table."""


def plot(
    identity: str,
    title: Text | str,
    series: Sequence[Series],
    language: Language,
    *,
    zero: bool = False,
) -> Markup:
    """identity: of the element, unlike all others of the page. series: at least one. zero: the axis begins there."""
    values = [point.value for each in series for point in each.points]
    last = max(point.step for each in series for point in each.points)
    first = min(point.step for each in series for point in each.points)
    ticks = nice_ticks(0.0 if zero else min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - first) / max(1, last - first)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))

    drawn = [replace(each, points=_thin(each.points)) for each in series]
    listed = [each for each in series if each.kind != "level"]
    told = [_told(each) for each in listed]
    svg = h(
        "svg",
        {
            "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
            "role": "img",
            "aria-labelledby": f"{identity}-title {identity}-said",
        },
        _element("title", title, language, {"id": f"{identity}-title"}),
        h("desc", {"id": f"{identity}-said"}, *(each.element("span", language) for each in told)),
        *(_grid(tick, y(tick)) for tick in ticks),
        *_step_labels(first, last, x),
        *(_drawn(each, x, y) for each in drawn),
        h("line", {"class": "cursor", "y1": _TOP, "y2": _HEIGHT - _BOTTOM, "visibility": "hidden"}),
    )
    legend = [
        h(
            "li",
            {"class": f"{_class(each)} {each.kind}"},
            _element("span", each.name, language),
            " ",
            h("b", None, number(each.points[-1].value)),
        )
        for each in listed
    ]
    caption = h(
        "figcaption",
        None,
        _element("span", title, language, {"class": "title"}),
        h("span", {"class": "at", "hidden": True}, text("step").element("span", language), " ", h("b")),
        h("ul", {"class": "legend"}, *legend),
    )
    points = [
        [[point.step, _rounded(point.value), number(point.value)] for point in each.points]
        for each in drawn
        if each.kind != "level"
    ]
    data = {"from": first, "to": last, "left": _LEFT / _WIDTH, "right": 1 - _RIGHT / _WIDTH, "series": points}
    return h(
        "figure",
        {"class": "plot", "id": identity, "data-plot": json.dumps(data, separators=(",", ":"))},
        caption,
        svg,
        _table(listed, language),
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Their exponential moving average over about a twenty-fifth of the run, without the bias towards 0 of its
    beginning (as Kingma and Ba 2015 correct it)."""
    keep = 1 - 1 / max(1.0, len(points) / 25)
    found, total, weight = [], 0.0, 0.0
    for point in points:
        total, weight = keep * total + point.value, keep * weight + 1
        found.append(Point(point.step, total / weight))
    return found


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About so many multiples of 1, 2 or 5 times a power of ten, the first and the last of which enclose all values."""
    if high - low <= abs(high) * 1e-9:  # one value
        low, high = (low, high + 1) if low == 0 else (low - abs(low) / 10, high + abs(high) / 10)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [tick * unit for tick in range(first, last + 1)]


def number(value: float) -> str:
    """Four digits that count."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}"


def _told(series: Series) -> Text:
    values = [point.value for point in series.points]
    return text(
        "series.said",
        name=series.name,
        first=number(values[0]),
        last=number(values[-1]),
        low=number(min(values)),
        high=number(max(values)),
    )


def _grid(tick: float, y: float) -> Markup:
    return join(
        [
            h("line", {"class": "grid", "x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": f"{y:.1f}", "y2": f"{y:.1f}"}),
            h("text", {"class": "axis", "x": _LEFT - 8, "y": f"{y + 4:.1f}", "text-anchor": "end"}, number(tick)),
        ]
    )


def _step_labels(first: int, last: int, x: Callable[[float], float]) -> list[Markup]:
    ticks = [tick for tick in nice_ticks(first, last, 5) if first <= tick <= last and tick == int(tick)]
    return [
        h("text", {"class": "axis", "x": f"{x(tick):.1f}", "y": _HEIGHT - 6, "text-anchor": "middle"}, f"{tick:,.0f}")
        for tick in ticks
    ]


def _class(series: Series) -> str:
    dashed = " dashed" if series.colour >= _COLOURS else ""
    return f"s{series.colour % _COLOURS}{dashed}"


def _drawn(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    """series: of few points (`_thin`)."""
    if series.kind == "level":
        at = f"{y(series.points[0].value):.1f}"
        return h("line", {"class": "level", "x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": at, "y2": at})
    places = [f"{x(point.step):.1f},{y(point.value):.1f}" for point in series.points]
    line = h("polyline", {"class": f"{_class(series)} {series.kind}", "points": " ".join(places)})
    few = len(places) == 1 or (series.kind == "marked" and len(places) <= 60)
    dots = [
        h("circle", {"class": _class(series), "cx": cx, "cy": cy, "r": 3.2})
        for cx, _, cy in (place.partition(",") for place in (places if few else []))
    ]
    return join([line, *dots])


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Of many points the smallest and the largest of each stretch, the first and the last."""
    if len(points) <= _DRAWN:
        return points
    size = -(-2 * len(points) // _DRAWN)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i].value), max(stretch, key=lambda i: points[i].value)}
    return [points[i] for i in sorted(kept)]


def _table(series: Sequence[Series], language: Language) -> Markup:
    steps = sorted({point.step for each in series for point in each.points})
    # those of series that have few come first: each evaluation is listed
    few = {point.step for each in series if len(each.points) <= _LISTED // 4 for point in each.points}
    every = -(-len(steps) // _LISTED)
    rows = [step for i, step in enumerate(steps) if i % every == 0 or step in few or step == steps[-1]]
    columns = [{point.step: point.value for point in each.points} for each in series]
    head: list[Child] = [text("step").element("th", language, {"scope": "col"})]
    head += [_element("th", each.name, language, {"scope": "col"}) for each in series]
    body = [
        [
            h("th", {"scope": "row"}, f"{step:,}"),
            *(h("td", None, number(column[step]) if step in column else "") for column in columns),
        ]
        for step in rows
    ]
    note = text("table.every", n=str(every)).element("small", language) if every > 1 else None
    summary = h("summary", None, text("table").element("span", language), " ", note)
    return h("details", None, summary, table(head, body))


def _element(tag: str, name: Text | str, language: Language, attributes: dict[str, object] | None = None) -> Markup:
    return name.element(tag, language, attributes) if isinstance(name, Text) else h(tag, attributes, name)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
