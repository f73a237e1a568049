// Before anything is drawn: the theme and the language that were chosen, else those of the system. Every page loads it
// first, as a plain script. `document.documentElement` has both, in `data-theme` and `lang`.
(() => {
  const read = (name) => {
    try {
      return localStorage.getItem(name);
    } catch {
      return null; // a browser that keeps nothing
    }
  };
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => read("theme") ?? (dark.matches ? "dark" : "light");
  root.dataset.theme = theme();
  dark.addEventListener("change", () => {
    root.dataset.theme = theme();
  });
  const system = navigator.languages.map((tag) => tag.slice(0, 2)).find((tag) => tag === "ko" || tag === "en");
  root.lang = read("language") ?? system ?? "en";
})();
