"""What the benchmarks share in telling their results: sections of documents, tables, plots.

Knows nothing of what was measured. Plots want matplotlib: pip install --group benchmarks
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"

INK, FAINT = "#1f2328", "#d1d9e0"
"""Of text and of grid lines; drawn in these, and replaced by variables that follow the reader's theme."""
COLOURS = ("#2f81f7", "#db6d28", "#3fb950", "#a371f7", "#e5534b", "#c69026", "#39c5cf", "#bf4b8a", "#8b949e")
"""Of middling lightness, so that they can be read on white and on black."""
_THEME = f"""<style>
:root {{ --ink: {INK}; --faint: {FAINT}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6edf3; --faint: #3d444d; }} }}
</style>"""


def run(
    parser: ArgumentParser,
    data: Path,
    measure: Callable[[Namespace, dict[str, Any]], Iterable[None]],
    draw: Callable[[dict[str, Any]], None],
) -> None:
    """A benchmark from its command line on; adds --json and --draw to the parser's options.

    measure puts figures into the results so far and yields whenever they are worth keeping in `data`; draw tells them.
    """
    parser.add_argument("--json", action="store_true", help="the results so far on stdout; writes no document")
    parser.add_argument("--draw", action="store_true", help="tables and plots from the results so far")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(data.read_text()) if data.exists() else {}
    for _ in () if arguments.draw else measure(arguments, results):
        data.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        draw(results)


def replace_section(document: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- name -->` and `<!-- /name -->`, which stand on lines of their own.

    Raises ValueError where the document has not exactly one such pair.
    """
    before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    old = document.read_text(encoding="utf-8")
    if old.count(before) != 1 or old.count(after) != 1 or old.index(before) > old.index(after):
        raise ValueError(f"{document}: wants one {before.strip()} with one {after.strip()} after it, each on a line")
    start, end = old.index(before) + len(before), old.index(after)
    document.write_text(f"{old[:start]}{text.strip()}\n{old[end:]}", encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; every row has as many cells as the header."""
    lines = [header, ["---"] * len(header), *rows]
    assert all(len(line) == len(header) for line in lines)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@contextmanager
def chart(path: Path, *, title: str, x: str, y: str, width: float = 7.5, height: float = 4.2) -> Iterator[Axes]:
    """Axes to draw on, of width x height inches; written to `path` as SVG, in the colours of the reader's theme."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": path.name,  # the same data, the same file
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": FAINT,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    } | dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    )
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.set_axisbelow(True)
        yield axes
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = path.read_text(encoding="utf-8")
    start = svg.index(">", svg.index("<svg")) + 1
    body = svg[start:].replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    lines = (svg[:start] + "\n" + _THEME + body).splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


def lines(path: Path, *, title: str, x: str, y: str, series: Mapping[str, Mapping[int, float]]) -> None:
    """One line for each name, over x (powers of two, labelled where there is a point); llama.cpp's are dashed.

    Two names that are alike up to their last word (", Dapji", ", llama.cpp") share a colour.
    """
    from matplotlib.ticker import NullLocator

    subjects = list(dict.fromkeys(name.rpartition(", ")[0] for name in series))
    with chart(path, title=title, x=x, y=y) as axes:
        for name, points in series.items():
            subject, _, program = name.rpartition(", ")
            dashed = program.startswith("llama")
            axes.plot(
                list(points),
                list(points.values()),
                color=COLOURS[subjects.index(subject)],
                linestyle="--" if dashed else "-",
                marker="D" if dashed else "o",
                markerfacecolor="none" if dashed else None,
                markersize=5,
                label=name,
            )
        ticks = sorted({value for points in series.values() for value in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(ylim=(0, None))
        axes.legend()
