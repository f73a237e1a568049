// Modal dialogs, made when they are opened and gone when they are closed; the browser keeps focus inside and gives it back.

import { iconButton, make } from "./dom.js";
import { t } from "./i18n.js";

let count = 0;

/** Opens a dialog and gives its element; `close` on it closes it. */
export function showDialog(title, ...children) {
  const id = `dialog-${++count}`;
  const dialog = make(
    "dialog",
    { "aria-labelledby": id },
    make("header", {}, make("h2", { id }, title), iconButton("close", t("close"), () => dialog.close())),
    ...children,
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Whether the user agrees. */
export function confirm(title, note, action) {
  return new Promise((resolve) => {
    let agreed = false;
    const agree = () => {
      agreed = true;
      dialog.close();
    };
    const dialog = showDialog(
      title,
      make("p", {}, note),
      make(
        "div",
        { class: "actions" },
        make("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, t("cancel")),
        make("button", { type: "button", class: "danger", onclick: agree }, action),
      ),
    );
    dialog.addEventListener("close", () => resolve(agreed));
  });
}

/** What the user writes; null where they do not. */
export function askText(title, label, value) {
  return new Promise((resolve) => {
    let written = null;
    const input = make("input", { type: "text", maxlength: 200, value, "aria-label": label });
    const submit = (event) => {
      event.preventDefault();
      written = input.value;
      dialog.close();
    };
    const save = make("button", { type: "submit", class: "primary" }, t("save"));
    const dialog = showDialog(title, make("form", { onsubmit: submit }, input, make("div", { class: "actions" }, save)));
    dialog.addEventListener("close", () => resolve(written));
    input.select();
  });
}
