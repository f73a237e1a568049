// The operator's page: asks the server how it is every few seconds while somebody looks.

import { ask } from "./api.js";
import { startPage } from "./bar.js";
import { find, make } from "./dom.js";
import { number, t } from "./i18n.js";
import { startNavigation } from "./navigate.js";
import { Plot } from "./plot.js";

const [SHORTEST, LONGEST] = [300, 3600]; // seconds that plots show

const bytes = (value) => (value >= 1e9 ? `${number(value / 1e9, 2)} GB` : `${number(value / 1e6)} MB`);
const rate = (value) => number(value, value < 10 && value > 0 ? 1 : 0);
const seconds = (value) => t("seconds", { n: number(value, value < 10 ? 2 : 0) });

const PLOTS = [
  new Plot("plot.speed", [
    { name: "generated", of: (sample) => sample.generated, show: rate },
    { name: "prompt", of: (sample) => sample.prompt, show: rate },
  ]),
  new Plot("plot.queue", [
    { name: "running", of: (sample) => sample.running, show: rate },
    { name: "queued", of: (sample) => sample.waiting, show: rate },
  ]),
  new Plot("plot.first", [{ name: "first.token", of: (sample) => sample.first_token, show: seconds }]),
  new Plot("plot.memory", [{ name: "resident", of: (sample) => sample.memory, show: bytes }]),
];

let told = null;
let samples = [];

async function refresh() {
  try {
    const last = samples.at(-1)?.time ?? 0;
    told = await ask("GET", `/page/status?since=${last}`);
    samples = [...samples, ...told.samples].filter(({ time }) => time > told.now - LONGEST);
    find("problem").textContent = "";
  } catch (error) {
    find("problem").textContent = error.message;
  }
  show();
}

function show() {
  document.title = `${t("status")} · Dapji`;
  if (told === null) return;
  const { machine, memory, queue, totals } = told;
  find("about").textContent = t("status.about", {
    version: told.version,
    processor: machine.processor ?? "?",
    processors: number(machine.processors),
    time: duration(told.now - told.started),
  });
  find("tiles").replaceChildren(
    tile("running", number(queue.running), t("of.most", { n: number(queue.max_running) })),
    tile("queued", number(queue.waiting), t("of.most", { n: number(queue.max_waiting) })),
    tile("generated", rate(samples.at(-1)?.generated ?? 0), t("sum.of", { n: number(totals.generated_tokens) })),
    tile("prompt", rate(samples.at(-1)?.prompt ?? 0), t("sum.of", { n: number(totals.prompt_tokens) })),
    tile(
      "memory",
      memory.resident === null ? "–" : bytes(memory.resident),
      machine.memory === null ? "" : t("of.machine", { n: bytes(machine.memory) }),
    ),
    tile("requests", number(totals.requests), t("refused.failed", { refused: number(totals.refused), failed: number(totals.failed) })),
  );
  const head = ["model", "state", "users", "memory", "size"];
  find("models").replaceChildren(
    make("thead", {}, make("tr", {}, ...head.map((key, i) => make("th", { scope: "col", class: i > 1 ? "number" : null }, t(key))))),
    make("tbody", {}, ...told.models.map(row)),
  );
  const span = Math.min(LONGEST, Math.max(SHORTEST, told.now - (samples[0]?.time ?? told.now)));
  for (const plot of PLOTS) plot.draw(samples, told.now, span);
}

function tile(name, value, note) {
  return make("div", {}, make("dt", {}, t(name)), make("dd", {}, value, make("small", {}, note)));
}

function row(model) {
  const state = !model.open ? t("closed") : model.users || model.idle === null ? t("open") : t("open.idle", { time: duration(model.idle) });
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, model.id),
    make("td", {}, state),
    make("td", { class: "number" }, number(model.users)),
    make("td", { class: "number" }, model.memory ? bytes(model.memory) : "–"),
    make("td", { class: "number" }, bytes(model.size)),
  );
}

function duration(passed) {
  const minutes = Math.floor(passed / 60);
  if (minutes < 1) return t("duration.seconds", { n: number(Math.floor(passed)) });
  if (minutes < 60) return t("duration.minutes", { n: number(minutes) });
  return t("duration.hours", { hours: number(Math.floor(minutes / 60)), minutes: number(minutes % 60) });
}

startPage();
startNavigation();
document.addEventListener("languagechange", show);
find("plots").append(...PLOTS.map((plot) => plot.element));
show();
for (;;) {
  if (!document.hidden) await refresh();
  await new Promise((resolve) => setTimeout(resolve, (told?.interval ?? 5) * 1000));
}
