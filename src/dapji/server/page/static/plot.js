// A plot over time, drawn as SVG in the page's own colours. Its newest values stand beside its title, and what it says
// is told to those who do not see it.

import { make } from "./dom.js";
import { language, number, t } from "./i18n.js";

const SVG = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, BOTTOM] = [144, 56, 18];

/** title: a key of the texts. series: each {name, of, show}, a key, the value of a sample or null, and how it is written. */
export class Plot {
  constructor(title, series) {
    this.title = title;
    this.series = series;
    this.caption = make("span");
    this.legend = make("span", { class: "legend" });
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("role", "img");
    this.element = make("figure", { class: "plot" }, make("figcaption", {}, this.caption, this.legend), this.svg);
    this.element.addEventListener("pointermove", (event) => this.point(event));
    this.element.addEventListener("pointerleave", () => this.point(null));
    this.samples = [];
    this.pointed = null;
  }

  /** samples: by time, each with a `time`; span: seconds of the x axis, up to `now`. */
  draw(samples, now, span) {
    this.samples = samples;
    const width = this.svg.clientWidth;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const known = (of) => samples.map(of).filter((value) => value !== null);
    const most = niceAbove(Math.max(...this.series.flatMap(({ of }) => known(of)), 0));
    this.x = (time) => LEFT + (width - LEFT) * (1 - (now - time) / span);
    const y = (value) => (HEIGHT - BOTTOM) * (1 - value / most);
    const parts = [0, 0.5, 1].flatMap((share) => [
      shape("line", { class: "grid", x1: LEFT, x2: width, y1: y(most * share), y2: y(most * share) }),
      label(LEFT - 6, Math.max(10, y(most * share) + 3), this.series[0].show(most * share), "end"),
    ]);
    for (const share of [1, 0.5, 0]) {
      const minutes = number((span * share) / 60, span < 600 && share === 0.5 ? 1 : 0);
      const anchor = share === 1 ? "start" : share ? "middle" : "end";
      parts.push(label(this.x(now - span * share), HEIGHT - 3, share ? t("minutes.ago", { n: minutes }) : t("now"), anchor));
    }
    this.series.forEach(({ of }, i) => {
      for (const run of runs(samples, of)) {
        const points = run.map((sample) => `${this.x(sample.time).toFixed(1)},${y(of(sample)).toFixed(1)}`);
        if (points.length === 1) points.push(points[0]);
        parts.push(shape("polyline", { points: points.join(" "), class: i ? "second" : "first" }));
      }
    });
    this.cursor = shape("line", { class: "cursor", y1: 0, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.svg.replaceChildren(...parts, this.cursor);
    this.tell();
  }

  /** Shows the values of the sample under the pointer, else the newest. */
  point(event) {
    if (event === null || !this.samples.length) this.pointed = null;
    else {
      const box = this.svg.getBoundingClientRect();
      const at = event.clientX - box.left;
      const distance = (sample) => Math.abs(this.x(sample.time) - at);
      this.pointed = this.samples.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best)).time;
    }
    this.tell();
  }

  tell() {
    const sample = this.samples.find(({ time }) => time === this.pointed) ?? this.samples.at(-1);
    const pointed = sample !== undefined && sample.time === this.pointed;
    this.caption.textContent = t(this.title) + (pointed ? `, ${new Date(sample.time * 1000).toLocaleTimeString(language())}` : "");
    const values = this.series.map(({ name, of, show }) => {
      const value = sample === undefined ? null : of(sample);
      return `${t(name)} ${value === null ? "–" : show(value)}`;
    });
    this.legend.replaceChildren(...values.map((text) => make("span", {}, text)));
    this.svg.setAttribute("aria-label", `${t(this.title)}: ${values.join(", ")}`);
    if (this.cursor === undefined) return;
    this.cursor.setAttribute("visibility", pointed ? "visible" : "hidden");
    if (pointed) for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(sample.time));
  }
}

/** 1, 2 or 5 times a power of ten, at least `value`. */
function niceAbove(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((nice) => nice >= value);
}

/** The stretches in which every sample has a value. */
function runs(samples, of) {
  const found = [[]];
  for (const sample of samples) {
    if (of(sample) === null) found.push([]);
    else found.at(-1).push(sample);
  }
  return found.filter((run) => run.length);
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function label(x, y, text, anchor) {
  const made = shape("text", { class: "axis", x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}
