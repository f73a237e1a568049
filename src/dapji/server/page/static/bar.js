// What the top bars of all pages share: the buttons for language, theme and help. A page has a <header class="bar">, loads
// early.js and base.css, and calls `startPage` once; it gets icons and texts where its HTML asks for them.

import { find, icon, iconButton, make, placeIcons } from "./dom.js";
import { language, setLanguage, t, translate } from "./i18n.js";

/** help: what a button with a question mark opens; none without it. */
export function startPage(help = null) {
  const bar = document.querySelector(".bar");
  const languages = make("button", {
    type: "button",
    class: "quiet text",
    "data-t": "language.other",
    id: "language",
    onclick: () => setLanguage(language() === "ko" ? "en" : "ko"),
  });
  const theme = iconButton("sun", t("theme"), switchTheme, { id: "theme", "data-t-label": "theme" });
  bar.append(languages, theme);
  if (help !== null) bar.append(iconButton("help", t("help"), help, { id: "help", "data-t-label": "help" }));
  const other = () => languages.setAttribute("lang", language() === "ko" ? "en" : "ko");
  document.addEventListener("languagechange", other);
  other();
  new MutationObserver(showTheme).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  showTheme();
  placeIcons();
  translate();
}

function switchTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // A browser that keeps nothing: the choice holds as long as the page.
  }
}

function showTheme() {
  find("theme").replaceChildren(icon(document.documentElement.dataset.theme === "dark" ? "sun" : "moon"));
}
