// What the page can do beyond being read: another language, another theme, values under the pointer. TEXTS are there
// already. Elements say which text they show in `data-t`: its key, or [key, values], of which texts are such lists too.

const root = document.documentElement;
const kept = {
  get(name) {
    try {
      return localStorage.getItem(name);
    } catch {
      return null; // a browser that keeps nothing
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(name, value);
    } catch {
      // so it lasts as long as the page is open
    }
  },
};

function said([key, values]) {
  return TEXTS[root.lang][key].replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return Array.isArray(value) ? said(value) : value;
  });
}

function speak(language) {
  if (!(language in TEXTS) || language === root.lang) return;
  root.lang = language;
  for (const element of document.querySelectorAll("[data-t]")) {
    const given = element.dataset.t;
    element.textContent = said(given.startsWith("[") ? JSON.parse(given) : [given, {}]);
  }
}

const languageButton = document.getElementById("language");
languageButton.addEventListener("click", () => {
  speak(root.lang === "ko" ? "en" : "ko");
  kept.set("language", root.lang);
});

const themeButton = document.getElementById("theme");
const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
themeButton.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  kept.set("theme", root.dataset.theme);
});

if (["light", "dark"].includes(kept.get("theme"))) root.dataset.theme = kept.get("theme");
speak(kept.get("language"));
languageButton.hidden = themeButton.hidden = false;

// The page of a run that goes on: loaded again, until somebody wants to read in peace.

const reloadButton = document.getElementById("reload");
if (reloadButton !== null) {
  const wanted = () => kept.get("reload") !== "no";
  const tell = () => reloadButton.setAttribute("aria-pressed", wanted());
  reloadButton.addEventListener("click", () => {
    kept.set("reload", wanted() ? "no" : "yes");
    tell();
  });
  tell();
  reloadButton.hidden = false;
  setInterval(() => wanted() && location.reload(), reloadButton.dataset.seconds * 1000);
}

// Plots: the values of the step under the pointer, or, with the arrow keys, of one step after another.

for (const figure of document.querySelectorAll(".plot")) {
  const { from, to, left, right, series } = JSON.parse(figure.dataset.plot);
  const svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const at = figure.querySelector(".at");
  const values = [...figure.querySelectorAll(".legend b")];
  const newest = values.map((value) => value.textContent);
  const steps = [...new Set(series.flatMap((points) => points.map(([step]) => step)))].sort((a, b) => a - b);
  let shown = null;

  const show = (step) => {
    shown = step;
    at.hidden = step === null;
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    values.forEach((value, i) => {
      const point = step === null ? null : nearest(series[i], step);
      value.textContent = point === null ? newest[i] : point[2];
    });
    if (step === null) return;
    at.lastElementChild.textContent = step.toLocaleString("en");
    const x = svg.viewBox.baseVal.width * (left + ((right - left) * (step - from)) / Math.max(1, to - from));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - left) / (right - left);
    const step = from + share * (to - from);
    show(steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best)));
  });
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.tabIndex = 0;
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const place = shown === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(shown);
    show(steps[Math.min(steps.length - 1, Math.max(0, place + move))]);
  });
}

function nearest(points, step) {
  return points.reduce((best, each) => (Math.abs(each[0] - step) < Math.abs(best[0] - step) ? each : best));
}
