"""Tables and plots of docs/performance.md from what cpu.py measured (benchmarks/data/cpu.json)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from report import COLOURS, DOCUMENT, INK, ROOT, chart, lines, replace_section, table

DATA = ROOT / "benchmarks" / "data" / "cpu.json"
PLOTS = DOCUMENT.parent

Results = Mapping[str, Any]


def draw(results: Results) -> None:
    """Replace the sections speed, vectors and lengths, and their plots; what has not been measured stays."""
    if results["speed"]:
        replace_section(DOCUMENT, "speed", f"{_speed(results['speed'])}\n\n{_bytes(results['speed'])}")
        _roofline(results["speed"])
    if results.get("vectors"):
        replace_section(DOCUMENT, "vectors", _speed(results["vectors"]))
    if results["lengths"]:
        replace_section(DOCUMENT, "lengths", _lengths(results["lengths"]))
        for part, file, unit, scale in (
            ("prompt", "prompt-length", "tokens per second", 1),
            ("decode", "decode-depth", "tokens per second", 1),
            ("memory", "memory-context", "MB", 1e-6),
        ):
            series: dict[str, dict[int, float]] = {}
            for name, points in results["lengths"].items():
                for program, label in (("dapji", "Dapji"), ("peer", "llama.cpp")):
                    series[f"{name}, {label}"] = {
                        int(length): scale * median(point[part][program]) for length, point in points.items()
                    }
            title = {
                "prompt": "Reading a prompt",
                "decode": "Writing behind a prompt",
                "memory": "Peak memory of the process",
            }[part]
            lines(PLOTS / f"{file}.svg", title=title, x="tokens of the prompt", y=unit, series=series)


def _ratio(part: Results) -> float:
    return median(part["dapji"]) / median(part["peer"])


def _speed(speed: Results) -> str:
    rows = []
    for name, model in speed.items():
        for what in ("prompt", "decode"):
            part = model[what]
            ours, theirs = median(part["dapji"]), median(part["peer"])
            used = ours * part["operations"] / model["int8_peak"] if what == "prompt" else _bandwidth(model, ours)
            rows.append(
                (name, f"{what} {part['tokens']}", f"{ours:.1f}", f"{theirs:.1f} ({part['flags']})",
                 f"{_ratio(part):.2f}", f"{used:.0%}")
            )  # fmt: skip
    bandwidth, peak = (median(model[key] for model in speed.values()) for key in ("read_bandwidth", "int8_peak"))
    threads = sorted({model["threads"] for model in speed.values()})
    return (
        table(["model", "", "Dapji", "llama.cpp at its best", "ratio", "share of the limit"], rows)
        + f"\n\nTokens per second, {'/'.join(map(str, threads))} threads. Measured beside them: "
        f"{bandwidth / 1e9:.1f} GB/s read, {peak / 1e9:.0f} Gop/s in 8-bit dot products."
    )


def _bandwidth(model: Results, rate: float) -> float:
    """The share of the read bandwidth that this many tokens per second take."""
    return rate * model["decode"]["bytes"] / model["read_bandwidth"]


def _bytes(speed: Results) -> str:
    rows = []
    for name, model in speed.items():
        work, decode = model["work"], model["decode"]
        read = decode["bytes"] * median(decode["dapji"]) / 1e9
        rows.append(
            (name, f"{work['weight_bytes'] / 1e6:,.1f}", f"{work['cache_bytes'] / 1e3:.1f}",
             f"{decode['bytes'] / 1e6:,.1f}", f"{read:.1f}")
        )  # fmt: skip
    header = ["model", "weights, MB", "each earlier token, kB", "a decoded token, MB", "Dapji reads, GB/s"]
    return table(header, rows)


def _lengths(lengths: Results) -> str:
    rows = []
    for name, points in lengths.items():
        for length, point in points.items():
            cells: list[str] = [name, f"{int(length):,}"]
            for what in ("prompt", "decode"):
                part = point[what]
                cells += [f"{median(part['dapji']):.1f}", f"{median(part['peer']):.1f}", f"{_ratio(part):.2f}"]
            cells += [f"{median(point['memory'][program]) / 1e6:,.0f}" for program in ("dapji", "peer")]
            rows.append(cells)
    header = ["model", "tokens", "prompt: Dapji", "llama.cpp", "ratio", "decode behind it: Dapji", "llama.cpp", "ratio",
              "peak MB: Dapji", "llama.cpp"]  # fmt: skip
    return table(header, rows)


def _roofline(speed: Results) -> None:
    """Operations per byte of weights (and cache) against operations per second; both programs have the same work."""
    bandwidth, peak = (median(model[key] for model in speed.values()) / 1e9 for key in ("read_bandwidth", "int8_peak"))
    low, ridge, high = 1, peak / bandwidth, 4096
    lowest = peak
    with chart(
        PLOTS / "roofline.svg", title="Work done beside what the machine allows", height=5.2,
        x="operations per byte read", y="billions of operations per second",
    ) as axes:  # fmt: skip
        for (name, model), colour in zip(speed.items(), COLOURS, strict=False):
            work, prompt, decode = model["work"], model["prompt"], model["decode"]
            each = work["operations"] + work["head_operations"]
            for part, operations, intensity in (
                (prompt, prompt["operations"], prompt["operations"] * prompt["tokens"] / work["weight_bytes"]),
                (decode, each, each / decode["bytes"]),
            ):
                for program, marker, face in (("dapji", "o", colour), ("peer", "D", "none")):
                    rate = operations * median(part[program]) / 1e9
                    lowest = min(lowest, rate)
                    axes.plot(
                        [intensity], [rate], marker=marker, color=colour, markerfacecolor=face, linestyle="none",
                        label=name if part is prompt and program == "dapji" else None,
                    )  # fmt: skip
        for marker, face, label in (("o", INK, "Dapji"), ("D", "none", "llama.cpp")):
            axes.plot([], [], marker=marker, color=INK, markerfacecolor=face, linestyle="none", label=label)
        axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color=INK, linewidth=1.2)
        axes.text(high, peak * 1.05, f"8-bit dot products: {peak:.0f}", ha="right", va="bottom")
        axes.text(ridge * 0.9, peak * 1.05, f"memory: {bandwidth:.1f} GB/s", ha="right", va="bottom")
        axes.text(low * 1.1, lowest * 0.7, "answers", style="italic")
        axes.text(high * 0.9, lowest * 0.7, "prompts", style="italic", ha="right")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlim=(low, high), ylim=(lowest * 0.6, peak * 1.4))
        axes.set_xticks(ticks := [1, 4, 16, 64, 256, 1024, 4096], [f"{tick:,}" for tick in ticks])
        axes.set_yticks(ticks := [tick for tick in (20, 50, 100, 200, 500, 1000) if tick > lowest * 0.6], ticks)
        axes.minorticks_off()
        axes.legend(loc="center", bbox_to_anchor=(0.5, 0.4))
