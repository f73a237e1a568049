"""The page: of one run, or of several beside each other. One file that holds all that it shows.

What models and files say is text and stays so (`markup`); beside that, a policy lets nothing run but the page's own
script, and nothing be loaded (W3C, Content Security Policy 3).
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any, TypeAlias

from dapji import __version__
from dapji.evaluation.bootstrap import Difference, Score
from dapji.evaluation.result import Result
from dapji.proof.lineage import DataFile, Lineage, Parent
from dapji.training.report.curves import curves
from dapji.training.report.markup import Child, Markup, h, join, table
from dapji.training.report.plot import number
from dapji.training.report.runs import RunRecord
from dapji.training.report.texts import TEXTS, Language, Text, text

_RELOAD = 30
"""Seconds after which the page of a run that goes on loads itself again."""
_LONGEST = 2000
"""Characters of a text that are shown."""
_TOLD = frozenset({"model", "output", "data.train", "data.evaluate", "method.name", "lora.rank"})
"""Settings that are told beside the others."""
_ITEMS = 100
"""Items of an evaluation that are shown, at most."""


Show: TypeAlias = Callable[[float], str]
"""How numbers are written."""


def page(runs: Sequence[RunRecord], results: Sequence[Result], language: Language) -> str:
    """runs: at least one."""
    return _Page(language).whole(runs, results)


class _Page:
    def __init__(self, language: Language) -> None:
        self._language: Language = language

    def whole(self, runs: Sequence[RunRecord], results: Sequence[Result]) -> str:
        style, script = (_static(name) for name in ("report.css", "report.js"))
        script = f"const TEXTS = {json.dumps(TEXTS, ensure_ascii=False)};\n{script}"
        policy = (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'"
        )
        running = any(run.state == "running" for run in runs)
        title = runs[0].name if len(runs) == 1 else text("title.several", n=str(len(runs))).said(self._language)
        head = h(
            "head",
            None,
            h("meta", {"charset": "utf-8"}),
            h("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
            h("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
            h("meta", {"name": "color-scheme", "content": "light dark"}),
            # with a script there is a button that stops it (WCAG 2.2.1)
            h("noscript", None, h("meta", {"http-equiv": "refresh", "content": _RELOAD})) if running else None,
            h("title", None, f"{title} · Dapji"),
            h("style", None, Markup(style)),
        )
        body = h(
            "body",
            None,
            self._bar(running),
            h("main", None, *(self._one(runs[0], results) if len(runs) == 1 else self._several(runs, results))),
            h("footer", None, self._t("p", "made.by", version=__version__)),
            h("script", None, Markup(script)),
        )
        return f"<!doctype html>\n{h('html', {'lang': self._language}, head, body)}\n"

    def _bar(self, running: bool) -> Markup:
        # What needs the script is shown by it.
        return h(
            "header",
            {"class": "bar"},
            h("span", {"class": "brand"}, "Dapji"),
            self._t("button", "reload", {"type": "button", "id": "reload", "data-seconds": _RELOAD, "hidden": True})
            if running
            else None,
            self._t("button", "language.other", {"type": "button", "id": "language", "hidden": True}),
            self._t("button", "theme", {"type": "button", "id": "theme", "hidden": True}),
        )

    # One run

    def _one(self, run: RunRecord, results: Sequence[Result]) -> Iterable[Child]:
        yield h("h1", None, run.name)
        yield h("p", {"class": "note"}, f"{run.recipe.model} · {_method(run.recipe)} · ", self._trains(run))
        yield from self._state(run)
        yield h("dl", {"class": "tiles"}, *self._tiles(run))
        yield self._t("h2", "plots")
        yield self._t("p", "plots.note", {"class": "note"})
        yield self._plots([run])
        if results:
            yield from self._results(results)
        if run.samples:
            yield self._t("h2", "samples")
            yield self._t("p", "samples.note", {"class": "note"})
            yield h("div", {"class": "cards"}, *(self._sample(group) for group in _by_sample(run.samples)))
        if run.start["shown"]:
            yield self._t("h2", "examples")
            prompts = run.recipe.method.examples == "prompts"
            yield self._t("p", "examples.prompts" if prompts else "examples.note", {"class": "note"})
            yield h("div", {"class": "cards"}, *(self._example(shown) for shown in run.start["shown"]))
        yield self._t("h2", "about")
        yield self._facts(run)
        yield self._t("h2", "lineage")
        if run.lineage is None:
            yield self._t("p", "lineage.none", {"class": "note"})
        else:
            yield self._lineage(run.lineage)

    def _state(self, run: RunRecord) -> Iterable[Child]:
        step, steps = run.step, run.start["steps"]
        values = {"step": f"{step:,}", "steps": f"{steps:,}"}
        state = f"state.{run.state}"
        if run.state == "running" and step:
            values["left"] = _clock(run.seconds / step * (steps - step))
        elif run.state == "running":
            state = "state.begun"
        yield self._t("p", state, {"class": f"state {run.state}"}, **values)
        if run.state != "done":
            yield h("progress", {"max": steps, "value": step, "aria-label": f"{step} / {steps}"})

    def _trains(self, run: RunRecord) -> Markup:
        trained, parameters = _count(run.start["trained"]), _count(run.start["parameters"])
        if run.recipe.lora is None:
            return self._t("span", "trains.all", n=trained)
        return self._t("span", "trains.adapter", rank=str(run.recipe.lora.rank), n=trained, all=parameters)

    def _tiles(self, run: RunRecord) -> Iterable[Markup]:
        before, after = run.held_out
        if after is not None:
            note = None if before is None else text("from", value=number(before))
            yield self._tile("held.out", number(after), note)
        elif before is not None:
            yield self._tile("held.out", number(before), text("untrained"))
        elif run.steps:
            best = min(run.steps, key=lambda line: float(line["loss"]))
            least = text("least", value=number(best["loss"]), step=f"{best['step']:,}")
            yield self._tile("training.loss", number(run.steps[-1]["loss"]), least)
        examples = text("examples.seen", n=f"{run.start['samples']:,}")
        yield self._tile("trained.tokens", f"{run.trained_tokens:,}", examples)
        yield self._tile("time", _clock(run.seconds), text("time.note"))
        if run.steps:
            yield self._tile("speed", number(run.trained_tokens / run.seconds), text("speed.note"))
            yield self._tile("memory", _bytes(run.memory or 0), text("memory.note"))

    def _tile(self, key: str, value: str, note: Text | None) -> Markup:
        small = None if note is None else note.element("small", self._language)
        return h("div", None, self._t("dt", key), h("dd", None, value, small))

    def _plots(self, runs: Sequence[RunRecord]) -> Markup:
        found = curves(runs, self._language)
        return h("div", {"class": "plots"}, *found) if found else self._t("p", "nothing.yet", {"class": "note"})

    def _example(self, shown: Mapping[str, Any]) -> Markup:
        sides = [text("example.chosen"), text("example.rejected")]
        tokens, learned, end = f"{shown['tokens']:,}", f"{shown['learned']:,}", shown["end"]
        if not shown["learned"]:
            told = [text("example.prompt", tokens=tokens)]
        else:
            ended = text("example.no.end") if end is None else text("example.end", end=end)
            told = [text("example.head", learned=learned, tokens=tokens), ended]
        parts: list[Child] = []
        for number_, pieces in enumerate(shown["sequences"]):
            if len(shown["sequences"]) == len(sides):
                parts.append(sides[number_].element("h4", self._language))
            marked = [
                h("mark", None, *self._cut(piece)) if learns else join(self._cut(piece)) for piece, learns in pieces
            ]
            parts.append(h("p", {"class": "said"}, *marked))
        head = h("h3", None, shown["where"])
        note = h("p", {"class": "note"}, *_between(", ", (each.element("span", self._language) for each in told)))
        return h("section", {"class": "card"}, head, note, *parts)

    def _sample(self, answers: Sequence[Mapping[str, Any]]) -> Markup:
        """Of one question, in the order of steps."""
        runs = _same_answers(answers)
        rows = [self._answer(run) for run in runs]
        if len(rows) > 5:
            between = self._t("summary", "sample.between", n=str(len(rows) - 3))
            rows = [*rows[:1], h("li", None, h("details", None, between, h("ol", None, *rows[1:-2]))), *rows[-2:]]
        return h("section", {"class": "card"}, *self._question(answers[0]), h("ol", {"class": "answers"}, *rows))

    def _question(self, sample: Mapping[str, Any]) -> Iterable[Child]:
        yield h("h3", {"class": "said"}, *self._cut(sample["prompt"]))
        if sample["expected"] is not None:
            label = self._t("span", "sample.expected", {"class": "label"})
            yield h("p", {"class": "said expected"}, label, *self._cut(sample["expected"]))

    def _answer(self, same: Sequence[Mapping[str, Any]]) -> Markup:
        first, last = same[0]["step"], same[-1]["step"]
        label = (
            text("sample.step", n=f"{first:,}")
            if first == last
            else text("sample.steps", first=f"{first:,}", last=f"{last:,}")
        )
        return h("li", None, label.element("span", self._language, {"class": "label"}), self._said(same[0]))

    def _said(self, sample: Mapping[str, Any]) -> Markup:
        answer, expected = sample["answer"], sample["expected"]
        equal = expected is not None and answer.strip() == expected.strip()
        badge = self._t("span", "sample.equal", {"class": "badge"}) if equal else None
        cut = None if sample["ended"] else self._t("span", "sample.cut", {"class": "badge quiet"})
        shown = self._cut(answer) if answer.strip() else [self._t("i", "sample.empty")]
        return h("span", {"class": "said"}, *shown, *([" ", badge] if badge else []), *([" ", cut] if cut else []))

    def _facts(self, run: RunRecord) -> Markup:
        recipe, start = run.recipe, run.start
        samples = f"{start['samples']:,}"
        left_out = text("examples.left.out", n=samples, invalid=f"{start['invalid']:,}")
        rows: list[tuple[str, Child]] = [
            ("fact.model", recipe.model),
            ("fact.method", _method(recipe)),
            ("fact.trains", self._trains(run)),
            ("fact.examples", left_out.element("span", self._language) if start["invalid"] else samples),
        ]
        if start["fill"] is not None:
            full = text("windows.full", window=f"{recipe.data.window:,}", fill=f"{start['fill']:.0%}")
            rows.append(("fact.windows", full.element("span", self._language)))
        changed = [
            h("div", None, h("dt", None, key), h("dd", None, _value(value)))
            for key, value in run.changed.items()
            if key not in _TOLD
        ]
        rows.append(("fact.changed", h("dl", {"class": "settings"}, *changed)))
        if run.lineage is None:
            rows.append(("fact.files", self._files(start["files"])))
        return h("dl", {"class": "facts"}, *(join([self._t("dt", key), h("dd", None, value)]) for key, value in rows))

    def _files(self, named: Mapping[str, Sequence[Mapping[str, str]]]) -> Markup:
        rows = [
            h(
                "li",
                None,
                self._t("span", f"files.{name}", {"class": "label"}),
                each["file"],
                " ",
                self._hash(each["sha256"]),
            )
            for name, of in named.items()
            for each in of
        ]
        return h("ul", {"class": "plain"}, *rows)

    def _hash(self, value: str) -> Markup:
        return h("code", {"class": "hash"}, f"sha256 {value}")

    def _lineage(self, lineage: Lineage) -> Markup:
        """What it was made of, and that in turn."""
        parents = [
            join([self._t("dt", f"lineage.{parent.role}"), h("dd", None, self._parent(parent))])
            for parent in lineage.parents
        ]
        data = h("ul", {"class": "plain"}, *(h("li", None, *self._data_file(each)) for each in lineage.data))
        versions = ", ".join(f"{name} {value}" for name, value in lineage.versions.items())
        return h(
            "dl",
            {"class": "facts"},
            *parents,
            join([self._t("dt", "lineage.data"), h("dd", None, data)]) if lineage.data else None,
            join([self._t("dt", "lineage.versions"), h("dd", None, versions)]),
        )

    def _parent(self, parent: Parent) -> Markup:
        files = [h("li", None, name, self._hash(value)) for name, value in parent.files.items()]
        head = h("p", None, parent.model, *self._licence(parent.licence))
        return join([head, h("ul", {"class": "plain"}, *files), self._before(parent.lineage)])

    def _data_file(self, file: DataFile) -> Iterable[Child]:
        yield self._t("span", f"files.{file.use}", {"class": "label"})
        yield file.file
        yield from self._licence(file.licence)
        yield self._hash(file.sha256)
        yield self._before(file.lineage)

    def _before(self, lineage: Lineage | None) -> Markup | None:
        if lineage is None:
            return None
        made = self._t("p", "lineage.made", {"class": "note"}, kind=lineage.kind)
        return h("div", {"class": "origin"}, made, self._lineage(lineage))

    def _licence(self, name: str | None) -> Iterable[Child]:
        if name is not None:
            yield " "
            yield self._t("span", "lineage.licence", {"class": "note"}, name=name)

    # Evaluations

    def _results(self, results: Sequence[Result]) -> Iterable[Child]:
        yield self._t("h2", "evaluations")
        for result in results:
            show = _percent if result.kind == "exam" else number
            yield h(
                "section",
                {"class": "card"},
                h("h3", None, result.file),
                self._t("p", "evaluation.of", {"class": "note"}, kind=result.kind, n=f"{result.score.n:,}"),
                h("dl", {"class": "tiles"}, *self._scores(result, show)),
                self._groups(result, show),
                self._items(result),
            )

    def _scores(self, result: Result, show: Show) -> Iterable[Markup]:
        yield self._score("score", result.score, show)
        if result.before is not None:
            yield self._score("before", result.before, show)
        if (change := result.difference) is not None:
            rows = text("evaluation.changed", better=f"{change.better:,}", worse=f"{change.worse:,}")
            p = text("evaluation.p", p=number(change.p))
            yield self._score("difference", change, show, rows, p)

    def _score(self, key: str, score: Score | Difference, show: Show, *notes: Text) -> Markup:
        if score.low is not None and score.high is not None:
            notes = (text("evaluation.interval", low=show(score.low), high=show(score.high)), *notes)
        small = [note.element("small", self._language) for note in notes]
        return h("div", None, self._t("dt", f"evaluation.{key}"), h("dd", None, show(score.value), *small))

    def _groups(self, result: Result, show: Show) -> Markup | None:
        if not result.groups:
            return None
        before = result.before is not None
        keys = ["group", "n", "score", *(["before", "difference"] if before else [])]
        rows = []
        for field, values in result.groups.items():
            for name, found in values.items():
                scores = [found.score, *([found.before, found.difference] if before else [])]
                cells = ["" if score is None else show(score.value) for score in scores]
                label = h("th", {"scope": "row"}, f"{field}: {name}")
                rows.append([label, *(h("td", None, cell) for cell in (f"{found.score.n:,}", *cells))])
        return table([self._head(f"evaluation.{key}") for key in keys], rows)

    def _items(self, result: Result) -> Markup | None:
        if not result.items:
            return None
        before = result.before is not None
        keys = ["row", "question", "expected", "answer", *(["before.answer"] if before else [])]
        shown = sorted(result.items, key=lambda item: (item.score, -(item.before_score or 0), item.row))[:_ITEMS]
        rows = []
        for item in shown:
            expected = "\n".join(f"{check}: {_value(value)}" for check, value in item.expected.items())
            cells = [self._cut(item.question), self._cut(expected), self._scored(item.answer, item.score)]
            if before:
                cells.append(self._scored(item.before_answer or "", item.before_score or 0.0))
            rows.append(
                [h("th", {"scope": "row"}, str(item.row)), *(h("td", {"class": "said"}, *cell) for cell in cells)]
            )
        more = len(result.items) - len(shown)
        note = self._t("p", "evaluation.more", {"class": "note"}, n=f"{more:,}", file=result.file) if more else None
        items = table([self._head(f"evaluation.{key}") for key in keys], rows)
        return h("details", None, self._t("summary", "evaluation.items"), items, note)

    def _scored(self, answer: str, score: float) -> Iterable[Child]:
        right = score > 0
        badge = self._t(
            "span", "evaluation.right" if right else "evaluation.wrong", {"class": "badge" if right else "badge quiet"}
        )
        return [badge, " ", *self._cut(answer)]

    # Several runs

    def _several(self, runs: Sequence[RunRecord], results: Sequence[Result]) -> Iterable[Child]:
        yield self._t("h1", "title.several", n=str(len(runs)))
        yield self._overview(runs)
        keys = sorted({key for run in runs for key in run.changed} - {"output"})
        differ = [key for key in keys if len({_value(_setting(run, key)) for run in runs}) > 1]
        if differ:
            yield self._t("h2", "differ")
            head = [self._head("setting"), *(h("th", {"scope": "col"}, run.name) for run in runs)]
            yield table(
                head,
                [
                    [h("th", {"scope": "row"}, key), *(h("td", None, _value(_setting(run, key))) for run in runs)]
                    for key in differ
                ],
            )
        yield self._t("h2", "plots")
        yield self._t("p", "plots.note", {"class": "note"})
        yield self._plots(runs)
        if results:
            yield from self._results(results)
        last = [sample for run in runs for sample in self._last_samples(run)]
        if last:
            yield self._t("h2", "samples")
            yield self._t("p", "samples.several", {"class": "note"})
            questions: dict[tuple[str, str | None], list[tuple[str, Mapping[str, Any]]]] = {}
            for name, sample in last:
                questions.setdefault((sample["prompt"], sample["expected"]), []).append((name, sample))
            yield h("div", {"class": "cards"}, *(self._last_answers(answers) for answers in questions.values()))

    def _last_answers(self, answers: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
        """Of several runs, by their names, to one question."""
        rows = [h("li", None, h("span", {"class": "label"}, name), self._said(sample)) for name, sample in answers]
        question = self._question(answers[0][1])
        return h("section", {"class": "card"}, *question, h("ol", {"class": "answers"}, *rows))

    def _overview(self, runs: Sequence[RunRecord]) -> Markup:
        keys = ["run", "state", "held.out", "training.loss", "trained.tokens", "time", "speed", "memory"]
        rows = []
        for run in runs:
            held_out = " → ".join("–" if loss is None else number(loss) for loss in run.held_out)
            values = {"step": f"{run.step:,}", "steps": f"{run.start['steps']:,}"}
            cells: list[Child] = [text(f"state.short.{run.state}", **values).element("span", self._language), held_out]
            if run.steps:
                loss = number(run.steps[-1]["loss"])
                speed, memory = (
                    number(run.trained_tokens / run.seconds),
                    _bytes(run.memory or 0),
                )
                cells += [loss, f"{run.trained_tokens:,}", _clock(run.seconds), speed, memory]
            else:
                cells += ["–"] * 5
            rows.append([h("th", {"scope": "row"}, run.name), *(h("td", None, cell) for cell in cells)])
        return table([self._head(key) for key in keys], rows)

    def _last_samples(self, run: RunRecord) -> list[tuple[str, Mapping[str, Any]]]:
        return [(run.name, group[-1]) for group in _by_sample(run.samples)]

    # Parts

    def _t(self, tag: str, key: str, attributes: Mapping[str, object] | None = None, /, **values: str | Text) -> Markup:
        return text(key, **values).element(tag, self._language, attributes)

    def _head(self, key: str) -> Markup:
        return self._t("th", key, {"scope": "col"})

    def _cut(self, said: str) -> Iterable[Child]:
        if len(said) <= _LONGEST:
            return [said]
        left_out = self._t("small", "cut", n=f"{len(said) - _LONGEST:,}")
        return [said[: _LONGEST // 2], " … ", left_out, " … ", said[-_LONGEST // 2 :]]


def _static(name: str) -> str:
    return files("dapji.training.report").joinpath("static", name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'"


def _by_sample(samples: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(sample["sample"], []).append(sample)
    return list(groups.values())


def _same_answers(answers: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Those after one another that say the same."""
    found: list[list[Mapping[str, Any]]] = []
    for answer in answers:
        if found and found[-1][-1]["answer"] == answer["answer"]:
            found[-1].append(answer)
        else:
            found.append([answer])
    return found


def _setting(run: RunRecord, key: str) -> Any:
    value: Any = run.recipe
    if key == "method.name":
        return _method(run.recipe)
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def _method(recipe: Any) -> str:
    return str(type(recipe.method).__struct_config__.tag)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _between(separator: str, parts: Iterable[Markup]) -> list[Child]:
    found: list[Child] = []
    for part in parts:
        found += [separator, part] if found else [part]
    return found


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _count(value: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return str(value)


def _bytes(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
