// Every route of the server, from its own description, with a place to try it.

import { ask } from "./api.js";
import { startPage } from "./bar.js";
import { find, make } from "./dom.js";
import { t } from "./i18n.js";
import { startNavigation } from "./navigate.js";

const NAMES = { openai: "OpenAI", anthropic: "Anthropic", ollama: "Ollama", page: "Dapji", rest: "Dapji" };

let description = null;

function show() {
  document.title = `${t("docs")} · Dapji`;
  if (description === null) return;
  const groups = new Map();
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const name = NAMES[operation.tags[0]] ?? NAMES.rest;
      groups.set(name, [...(groups.get(name) ?? []), { path, method, operation }]);
    }
  }
  const order = [...new Set(Object.values(NAMES))].filter((name) => groups.has(name));
  find("routes").replaceChildren(
    ...order.flatMap((name) => [make("h2", {}, name), ...groups.get(name).map(route)]),
  );
}

function route({ path, method, operation }) {
  const inside = make("div", { class: "inside" });
  const details = make(
    "details",
    { class: "route" },
    make(
      "summary",
      {},
      make("span", { class: "method" }, method.toUpperCase()),
      make("code", {}, path),
      make("span", { class: "note", lang: "en" }, operation.summary),
    ),
    inside,
  );
  details.addEventListener("toggle", () => {
    if (details.open && !inside.hasChildNodes()) fill(inside, path, method, operation);
  });
  return details;
}

function fill(inside, path, method, operation) {
  const parameters = (operation.parameters ?? []).map((each) => ({ ...each, note: each.in }));
  const content = operation.requestBody?.content ?? {};
  const schema = resolved(content["application/json"]?.schema ?? content["multipart/form-data"]?.schema ?? {});
  const required = schema.required ?? [];
  const fields = Object.entries(schema.properties ?? {}).map(([name, each]) => ({
    name,
    schema: each,
    required: required.includes(name),
  }));
  const rows = [...parameters, ...fields].map((field) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, make("code", {}, field.name)),
      make("td", {}, typeName(field.schema)),
      make("td", {}, field.required ? t("required") : defaultOf(field.schema)),
      make("td", { lang: "en" }, resolved(field.schema).description ?? field.note ?? ""),
    ),
  );
  const head = ["field", "type", "default", "note"].map((key) => make("th", { scope: "col" }, t(key)));
  if (rows.length) {
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
    inside.append(make("div", { class: "wide-table", tabindex: 0, role: "region", "aria-label": t("fields") }, table));
  }
  if (content["multipart/form-data"] === undefined) inside.append(trial(path, method, fields));
}

/** A request that may be changed and sent. */
function trial(path, method, fields) {
  const address = make("input", { type: "text", value: path, spellcheck: "false", "aria-label": t("address") });
  const example = Object.fromEntries(fields.filter((field) => field.required).map((field) => [field.name, sample(field.schema)]));
  const body = fields.length
    ? make("textarea", { rows: 6, spellcheck: "false", "aria-label": t("body") }, JSON.stringify(example, null, 2))
    : null;
  const answer = make("pre", { role: "status", tabindex: 0, "aria-label": t("answer"), hidden: true });
  const send = async (event) => {
    event.preventDefault();
    answer.hidden = false;
    answer.textContent = "…";
    try {
      const sent = body === null ? undefined : JSON.parse(body.value);
      answer.textContent = JSON.stringify(await ask(method.toUpperCase(), address.value, sent), null, 2);
    } catch (error) {
      answer.textContent = error.message;
    }
  };
  const actions = make("div", { class: "actions" }, make("button", { type: "submit", class: "primary" }, t("send")));
  return make("form", { class: "try", onsubmit: send }, address, body, actions, answer);
}

function resolved(schema) {
  let found = schema;
  while (found?.$ref) found = description.components.schemas[found.$ref.split("/").at(-1)];
  return found ?? {};
}

function typeName(schema, depth = 0) {
  const found = resolved(schema);
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (found.const !== undefined) return JSON.stringify(found.const);
  const choices = found.anyOf ?? found.oneOf;
  if (choices) return [...new Set(choices.map((each) => typeName(each, depth)))].join(" | ");
  if (found.type === "array") {
    const item = found.items && depth < 2 ? typeName(found.items, depth + 1) : t("value");
    return item.includes(" | ") ? `(${item})[]` : `${item}[]`;
  }
  if (found.title && found.type === "object") return found.title;
  return [found.type ?? t("value")].flat().join(" | ");
}

function defaultOf(schema) {
  return schema.default === undefined || schema.default === null ? "" : JSON.stringify(schema.default);
}

/** A value of the type, to begin with. */
function sample(schema, depth = 0) {
  const found = resolved(schema);
  if (found.enum) return found.enum[0];
  if (found.const !== undefined) return found.const;
  const choices = found.anyOf ?? found.oneOf;
  if (choices) return sample(choices[0], depth);
  if (found.type === "array") return depth > 3 ? [] : [sample(found.items ?? {}, depth + 1)];
  if (found.type === "object") {
    const properties = found.properties ?? {};
    return Object.fromEntries((found.required ?? []).map((name) => [name, depth > 3 ? null : sample(properties[name], depth + 1)]));
  }
  if (found.type === "integer" || found.type === "number") return 16;
  return found.type === "boolean" ? false : "Hi";
}

startPage();
startNavigation();
document.addEventListener("languagechange", show);
try {
  description = await ask("GET", "/openapi.json");
} catch (error) {
  find("problem").textContent = error.message;
}
show();
