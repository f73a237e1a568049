// How a conversation is answered: the model, and a dialog for all else. What is chosen is saved at once.

import { ask } from "./api.js";
import { showDialog } from "./dialogs.js";
import { find, make } from "./dom.js";
import { number, t } from "./i18n.js";
import { modelOf, state } from "./state.js";

const LARGEST = 2 ** 53 - 1;
let failed;

/** fail: is told what could not be saved. */
export function startSettings(fail) {
  failed = fail;
  find("model").addEventListener("change", () => {
    set("model", find("model").value);
    try {
      localStorage.setItem("model", find("model").value);
    } catch {
      // A browser that keeps nothing: the next conversation begins with the server's first model.
    }
  });
  find("open-settings").addEventListener("click", open);
}

/** Where a new conversation starts from. */
export function firstSettings() {
  let model = null;
  try {
    model = localStorage.getItem("model");
  } catch {
    // As above.
  }
  return state.models.some(({ id }) => id === model) ? { model } : {};
}

export function showModels() {
  const chosen = modelOf(state.conversation);
  const names = state.models.map(({ id }) => id);
  if (chosen !== undefined && !names.includes(chosen)) names.push(chosen); // not served any more: an answer says so
  find("model").replaceChildren(...names.map((name) => make("option", { value: name, selected: name === chosen }, name)));
}

async function set(name, value) {
  const { conversation } = state;
  const { [name]: _, ...settings } = conversation.settings;
  conversation.settings = value === null || value === "" ? settings : { ...settings, [name]: value };
  if (conversation.id === null) return; // it is sent when the conversation begins
  try {
    await ask("PATCH", `/page/conversations/${conversation.id}`, { settings: conversation.settings });
  } catch (problem) {
    failed(problem);
  }
}

/** What may be chosen for a model. Opens it. */
async function choicesOf(model) {
  if (!state.choices.has(model)) {
    state.choices.set(model, await ask("GET", `/page/models/${encodeURIComponent(model)}`));
  }
  return state.choices.get(model);
}

async function open() {
  const model = modelOf(state.conversation);
  const rest = make("div", { class: "fields" }, make("p", { class: "note", role: "status" }, t("opening", { model })));
  const fields = make("form", { class: "fields", onsubmit: (event) => event.preventDefault() }, textField("system", 4), rest);
  const dialog = showDialog(t("settings"), make("p", { class: "note" }, t("settings.note")), fields);
  dialog.classList.add("settings");
  try {
    const { context, defaults, thinking } = await choicesOf(model);
    rest.replaceChildren(
      make(
        "div",
        { class: "pair" },
        numberField("temperature", 0, 100, { placeholder: number(defaults.temperature, 2) }),
        numberField("top_p", 0, 1, { placeholder: number(defaults.top_p, 2) }),
        numberField("max_tokens", 1, context, { whole: true, values: { context: number(context) } }),
        numberField("seed", 0, LARGEST, { whole: true }),
      ),
      ...(thinking.length ? [choiceField("thinking", thinking)] : []),
      textField("tools", 5, parseTools, (tools) => JSON.stringify(tools, null, 2)),
    );
  } catch (problem) {
    rest.replaceChildren(make("p", { class: "problem", role: "alert" }, problem.message));
  }
}

function field(name, input, values = {}) {
  input.id = `set-${name}`;
  const wrong = make("span", { class: "problem", role: "alert", id: `wrong-${name}` });
  input.setAttribute("aria-describedby", `note-${name} wrong-${name}`);
  const key = `${name}.note`;
  const note = name === "thinking" ? null : make("span", { class: "note", id: `note-${name}` }, t(key, values));
  return make("div", { class: "field" }, make("label", { for: input.id }, t(name)), input, note, wrong);
}

/** read: makes {value} or {wrong} of the text; write: the text of a value. */
function textField(name, rows, read = (text) => ({ value: text }), write = (value) => value) {
  const box = make("textarea", { rows, spellcheck: "false" });
  const value = state.conversation.settings[name];
  box.value = value === undefined ? "" : write(value);
  return onChange(field(name, box), box, () => read(box.value), name);
}

function numberField(name, from, to, { whole = false, placeholder = "", values = {} }) {
  // No input of type number: with it, arrow keys could not leave the field, and what is wrong could not be read.
  const box = make("input", { type: "text", inputmode: "decimal", autocomplete: "off", placeholder });
  box.value = state.conversation.settings[name] ?? "";
  const read = () => {
    if (box.value.trim() === "") return { value: null };
    const value = Number(box.value.replace(",", "."));
    const right = value >= from && value <= to && (!whole || Number.isInteger(value));
    return right ? { value } : { wrong: t("number.wrong", { from: number(from), to: number(to) }) };
  };
  return onChange(field(name, box, values), box, read, name);
}

function choiceField(name, choices) {
  const chosen = state.conversation.settings[name];
  const option = (value) => make("option", { value: String(value), selected: value === chosen }, t(`${name}.${value}`));
  const select = make("select", {}, make("option", { value: "" }, t(`${name}.default`)), ...choices.map(option));
  const read = () => ({ value: choices.find((value) => String(value) === select.value) ?? null });
  return onChange(field(name, select), select, read, name);
}

/** Saves what `read` gives, {value} or {wrong}, whenever the input has changed. */
function onChange(made, input, read, name) {
  input.addEventListener("change", () => {
    const { value, wrong = "" } = read();
    made.querySelector(".problem").textContent = wrong;
    input.setAttribute("aria-invalid", wrong !== "");
    if (wrong === "") set(name, value);
  });
  return made;
}

function parseTools(text) {
  if (text.trim() === "") return { value: null };
  try {
    const tools = JSON.parse(text);
    if (Array.isArray(tools)) return { value: tools };
  } catch {
    // Said below.
  }
  return { wrong: t("tools.wrong") };
}
