// An answer: as it is written, and as it was.

import { Problem, ask, events } from "./api.js";
import { find, icon, iconButton, make, setLabel } from "./dom.js";
import { number, t } from "./i18n.js";
import { state } from "./state.js";

/** An answer that is being written, and the element that shows it: also while another conversation is looked at. */
export class Writing {
  #controller = new AbortController();
  #reasoning = null;
  #open = null;
  #pending = null; // what has come since the last drawing
  #drawn = 0; // when the next drawing may be
  #stopped = false;

  /** ended: is called when there is nothing more to come. */
  constructor(conversation, parent, ended) {
    this.conversation = conversation;
    this.parent = parent;
    this.ended = ended;
    this.body = make("div", { class: "body" });
    this.status = make("p", { class: "waiting" }, t("waiting"));
    this.element = make("li", { class: "turn assistant writing", "aria-busy": "true" }, this.body, this.status);
    state.writings.set(conversation.id, this);
    this.#run();
  }

  stop() {
    this.#stopped = true;
    this.#controller.abort();
  }

  async #run() {
    const path = `/page/conversations/${this.conversation.id}`;
    let problem = null;
    try {
      const stream = events(`${path}/answers`, { parent: this.parent }, this.#controller.signal);
      for await (const { name, data } of stream) {
        if (name === "done") this.#add(data);
        else if (name === "error") throw new Problem(data.message);
        else this.#show(name, data);
      }
      if (this.turn === undefined) throw new Problem(t("problem.ended"));
    } catch (error) {
      if (this.#stopped) await this.#settle(path);
      else if (error instanceof Problem) problem = error;
      else throw error;
    } finally {
      state.writings.delete(this.conversation.id);
      this.ended(this, problem);
    }
  }

  #show(name, data) {
    if (name === "reasoning") {
      this.#reasoning ??= this.#openReasoning();
      this.#reasoning.append(data.text);
    } else if (name === "content") {
      this.#closeReasoning();
      if (this.#pending === null) {
        this.#pending = { finished: "" };
        setTimeout(() => this.#draw(), this.#drawn - performance.now());
      }
      this.#pending.finished += data.finished;
      this.#pending.open = data.open;
    } else if (name === "call") {
      this.#closeReasoning();
      this.#draw();
      this.body.append(call(data));
    }
    if (data.generated !== undefined) this.status.textContent = progress(data);
  }

  /** Shows what has come. A long block takes its time: a quarter of it at most goes into that, the rest is the reader's. */
  #draw() {
    if (this.#pending === null) return;
    const began = performance.now();
    const { finished, open } = this.#pending;
    this.#pending = null;
    this.#open ??= this.body.appendChild(make("div", { class: "content" })).appendChild(make("div"));
    if (finished) {
      const done = make("div");
      done.innerHTML = finished;
      decorate(done);
      this.#open.before(...done.childNodes);
    }
    this.#open.innerHTML = open;
    decorate(this.#open);
    this.element.getBoundingClientRect(); // has it laid out now, so that its time is known
    const ended = performance.now();
    this.#drawn = ended + 3 * (ended - began);
  }

  #openReasoning() {
    const details = this.body.appendChild(reasoning("", t("reasoning.running")));
    details.open = true;
    return details.lastChild;
  }

  #closeReasoning() {
    const details = this.#reasoning?.parentElement;
    if (!details?.open || details.dataset.closed) return;
    details.dataset.closed = "1"; // once: who opens it again wants to read
    details.open = false;
    details.firstChild.textContent = t("reasoning");
  }

  #add(turn) {
    this.turn = turn;
    this.conversation.turns.push(turn);
    this.conversation.leaf = turn.number;
  }

  /** After a stop: waits until the server has kept what was written, but not for a model that is being opened. */
  async #settle(path) {
    for (let i = 0; i < 20; i++) {
      let known;
      try {
        known = await ask("GET", path);
      } catch {
        return; // it is deleted, or the server is gone
      }
      const turn = known.turns.findLast((each) => each.parent === this.parent);
      if (turn !== undefined && this.conversation.turns.every((each) => each.number !== turn.number)) {
        this.#add(turn);
        return;
      }
      if (!known.answering.includes(this.parent)) return;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }
}

/** The body of an answer that has ended. */
export function answerBody(turn) {
  const body = make("div", { class: "body" });
  if (turn.reasoning) body.append(reasoning(turn.reasoning, t("reasoning")));
  if (turn.html) {
    const content = make("div", { class: "content" });
    content.innerHTML = turn.html;
    decorate(content);
    body.append(content);
  }
  for (const each of turn.calls ?? []) body.append(call(each));
  const end = turn.finish === undefined || turn.finish === "stop" ? null : t(`finish.${turn.finish}`, { message: turn.error });
  if (end !== null) body.append(make("p", { class: turn.finish === "failed" ? "problem" : "note" }, end));
  return body;
}

/** What an answer took: model, tokens, speed, context. */
export function figures(turn) {
  const usage = turn.usage;
  const line = make("div", { class: "figures" });
  if (turn.model) line.append(make("span", {}, turn.model));
  if (!usage) return line;
  line.append(make("span", {}, t("tokens", { n: number(usage.generated) })));
  if (usage.seconds > 0) line.append(make("span", { class: "speed" }, t("speed", { n: speed(usage) })));
  const used = usage.prompt + usage.generated;
  const meter = make("meter", { min: 0, max: usage.context, value: used, high: usage.context * 0.9, "aria-hidden": "true" });
  const text = t("context", { percent: number((100 * used) / usage.context) });
  const detail = t("context.detail", { used: number(used), context: number(usage.context) });
  line.append(make("span", { class: "context", title: detail }, meter, text));
  return line;
}

function progress(data) {
  const tokens = t("tokens", { n: number(data.generated) });
  return data.seconds > 0 ? `${tokens} · ${t("speed", { n: speed(data) })}` : tokens;
}

function speed({ generated, seconds }) {
  const value = (generated - 1) / seconds;
  return number(value, value < 100 ? 1 : 0);
}

function reasoning(text, summary) {
  return make("details", { class: "reasoning" }, make("summary", {}, summary), make("div", {}, text));
}

function call({ name, arguments: written }) {
  let shown = written;
  try {
    shown = JSON.stringify(JSON.parse(written), null, 2);
  } catch {
    // The model wrote no JSON: that is what is shown.
  }
  const title = make("div", { class: "title" }, icon("tool"), t("call", { name }));
  return make("div", { class: "call" }, title, make("pre", { tabindex: "0", "aria-label": t("call", { name }) }, shown));
}

/** Adds to the HTML of an answer what only the page can: names for what scrolls, and buttons to copy code. */
function decorate(content) {
  for (const block of content.querySelectorAll(".code")) {
    const language = block.dataset.language;
    const pre = block.querySelector("pre");
    makeScrollable(pre, language ? t("code.of", { language }) : t("code"));
    const button = iconButton("copy", t("copy.code"), () => copy(pre.textContent, button));
    block.prepend(make("div", { class: "title" }, make("span", {}, language), button));
  }
  for (const table of content.querySelectorAll(".table")) makeScrollable(table, t("table"));
}

function makeScrollable(element, label) {
  element.tabIndex = 0;
  element.setAttribute("role", "region");
  element.setAttribute("aria-label", label);
}

/** Copies a text, and lets the button say so. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers let pages use the clipboard over HTTPS and on this machine only; elsewhere the old way is left.
    const area = make("textarea", { class: "hidden" });
    area.value = text;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.getAttribute("aria-label");
  button.replaceChildren(icon("check"));
  setLabel(button, t("copied"));
  find("announce").textContent = t("copied");
  setTimeout(() => {
    button.replaceChildren(icon("copy"));
    setLabel(button, label);
  }, 1500);
}
