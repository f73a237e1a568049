// The server, asked with the user's key where it wants one: `ask` for JSON, `events` for a stream. Every page asks
// through these two.

import { showDialog } from "./dialogs.js";
import { make } from "./dom.js";
import { t } from "./i18n.js";

/** What the server says is wrong. status 0: it was not reached. */
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The JSON of the answer. Throws Problem, and AbortError where `signal` ends it. */
export async function ask(method, path, body) {
  return (await answered(method, path, body)).json();
}

/** The body of the answer, to be kept as a file. */
export async function askFile(path) {
  return (await answered("GET", path)).blob();
}

/** The events of a stream, each {name, data}. Throws as `ask`. */
export async function* events(path, body, signal) {
  const reader = (await answered("POST", path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Problem(t("problem.ended"));
    }
    if (part.done) return;
    const ready = (text + part.value).split("\n\n");
    text = ready.pop();
    for (const event of ready) {
      if (event.startsWith(":")) continue; // says only that the stream lives
      const [name, data] = event.split("\n");
      yield { name: name.slice("event: ".length), data: JSON.parse(data.slice("data: ".length)) };
    }
  }
}

async function answered(method, path, body, signal) {
  for (;;) {
    const key = storedKey();
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Problem(t("problem.network"));
    }
    if (answer.ok) return answer;
    if (answer.status === 401) {
      await askKey(key);
      continue;
    }
    let message = `${answer.status} ${answer.statusText}`;
    try {
      message = (await answer.json()).error.message;
    } catch {
      // Something between us and the server has answered in its own words.
    }
    throw new Problem(message, answer.status);
  }
}

function storedKey() {
  return sessionStorage.getItem("key") ?? localStorage.getItem("key");
}

let asking = null;

/** Waits for another key than `refused`. One dialog, however many requests wait for it. */
function askKey(refused) {
  if (refused !== storedKey()) return Promise.resolve();
  asking ??= new Promise((resolve) => {
    const input = make("input", { type: "password", autocomplete: "off", required: true, id: "key" });
    const keep = make("input", { type: "checkbox" });
    const submit = (event) => {
      event.preventDefault();
      for (const storage of [sessionStorage, localStorage]) storage.removeItem("key");
      (keep.checked ? localStorage : sessionStorage).setItem("key", input.value.trim());
      asking = null;
      dialog.close();
      resolve();
    };
    const form = make(
      "form",
      { onsubmit: submit },
      make("p", {}, t("key.note")),
      refused === null ? null : make("p", { class: "problem", role: "alert" }, t("key.wrong")),
      make("label", { for: "key" }, t("key.label")),
      input,
      make("label", { class: "check" }, keep, t("key.keep")),
      make("div", { class: "actions" }, make("button", { type: "submit", class: "primary" }, t("key.use"))),
    );
    const dialog = showDialog(t("key.title"), form);
    dialog.querySelector("header button").remove(); // there is nothing to see without a key
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    input.focus();
  });
  return asking;
}
