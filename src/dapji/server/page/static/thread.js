// The turns of the branch that is shown, and what can be done with each.

import { answerBody, copy, figures } from "./answer.js";
import { find, icon, iconButton, make } from "./dom.js";
import { language, t } from "./i18n.js";
import { branch, newestLeaf, state, versions } from "./state.js";

let actions;
let following = true; // what is written: as long as the end is seen

/** given: `edit(turn, text)`, `again(parent)`, `choose(leaf)`, `example(text)`. */
export function startThread(given) {
  actions = given;
  const scroll = find("scroll");
  const look = () => {
    following = atEnd();
    find("down").hidden = following;
  };
  scroll.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(scroll);
  new MutationObserver(() => (following ? toEnd() : look())).observe(find("thread"), {
    childList: true,
    subtree: true,
    characterData: true,
  });
  find("down").addEventListener("click", () => toEnd());
}

/** Draws what has changed. problem: why the last turn has no answer. */
export function showThread(problem = null) {
  const { conversation } = state;
  const turns = branch(conversation);
  const writing = state.writings.get(conversation.id);
  const title = conversation.title || t("new");
  document.title = conversation.id === null ? "Dapji" : `${title} · Dapji`;
  find("heading").textContent = title;
  find("empty").hidden = turns.length > 0;
  const items = turns.map(item);
  const last = turns.at(-1);
  if (writing && last?.number === writing.parent) items.push(writing.element);
  else if (last?.role === "user") items.push(unanswered(last, problem));
  place(items);
  showExamples();
}

/** Of a turn: the one that is there, where nothing of it has changed, so that nobody loses what they opened or marked. */
function item(turn) {
  const all = versions(state.conversation, turn);
  const shows = `${state.conversation.id} ${turn.number} ${all.length} ${language()}`;
  const known = document.querySelector(`#thread > [data-shows="${shows}"]`);
  if (known !== null) return known;
  const made = turn.role === "user" ? message(turn) : answer(turn);
  made.dataset.shows = shows;
  made.dataset.turn = turn.number;
  return made;
}

function place(items) {
  const thread = find("thread");
  let at = thread.firstChild;
  for (const each of items) {
    if (each === at) at = at.nextSibling;
    else thread.insertBefore(each, at);
  }
  while (at !== null) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function showExamples() {
  const buttons = [1, 2, 3, 4].map((i) => {
    const text = t(`example.${i}`);
    return make("li", {}, make("button", { type: "button", onclick: () => actions.example(text) }, text));
  });
  find("examples").replaceChildren(...buttons);
}

function message(turn) {
  const files = (turn.files ?? []).map((file) => make("li", {}, fileDetails(file)));
  const bubble = make(
    "div",
    { class: "bubble" },
    files.length ? make("ul", { class: "files" }, ...files) : null,
    turn.content ? make("div", { class: "text" }, turn.content) : null,
  );
  const item = make("li", { class: "turn user" }, spoken("you"), bubble);
  item.append(
    make(
      "div",
      { class: "tools" },
      switcher(turn),
      iconButton("edit", t("edit"), () => editMessage(turn, item), { class: "quiet edit" }),
      copyButton(turn.content ?? ""),
    ),
  );
  return item;
}

function fileDetails(file) {
  const content = make("pre", { tabindex: "0", "aria-label": file.name }, file.text);
  return make("details", { class: "file" }, make("summary", {}, icon("file"), file.name), content);
}

function answer(turn) {
  return make(
    "li",
    { class: "turn assistant" },
    spoken("answer"),
    answerBody(turn),
    make(
      "div",
      { class: "tools" },
      switcher(turn),
      copyButton(turn.content ?? ""),
      iconButton("again", t("again"), () => actions.again(turn.parent), { class: "quiet again" }),
      figures(turn),
    ),
  );
}

/** Who speaks, for those who do not see it. */
const spoken = (who) => make("h2", { class: "hidden" }, t(who));

function copyButton(text) {
  const button = iconButton("copy", t("copy"), () => copy(text, button));
  return button;
}

function switcher(turn) {
  const all = versions(state.conversation, turn);
  if (all.length < 2) return null;
  const i = all.indexOf(turn);
  const to = (step) => () => {
    const other = all[i + step];
    actions.choose(newestLeaf(state.conversation, other.number));
    const item = document.querySelector(`[data-turn="${other.number}"]`);
    const buttons = [...item.querySelectorAll(".versions button")];
    (buttons[step < 0 ? 0 : 1].disabled ? buttons[step < 0 ? 1 : 0] : buttons[step < 0 ? 0 : 1]).focus();
  };
  const label = t("branch.of", { i: i + 1, n: all.length });
  return make(
    "div",
    { class: "versions", role: "group", "aria-label": label },
    iconButton("left", t("branch.before"), to(-1), { disabled: i === 0 }),
    make("span", { "aria-hidden": "true" }, `${i + 1}/${all.length}`),
    iconButton("right", t("branch.next"), to(1), { disabled: i === all.length - 1 }),
  );
}

function unanswered(turn, problem) {
  const elsewhere = state.conversation.answering.includes(turn.number);
  const text = elsewhere ? t("writing") : (problem?.message ?? t("unanswered"));
  return make(
    "li",
    { class: "turn assistant" },
    make("p", { class: problem ? "problem" : "note", role: problem ? "alert" : null }, text),
    elsewhere ? null : make("button", { type: "button", class: "retry", onclick: () => actions.again(turn.number) }, t("retry")),
  );
}

function editMessage(turn, item) {
  const box = make("textarea", { "aria-label": t("edit.label"), rows: 3 });
  box.value = turn.content ?? "";
  const end = () => {
    showThread();
    document.querySelector(`[data-turn="${turn.number}"] .edit`)?.focus();
  };
  const submit = (event) => {
    event.preventDefault();
    if (box.value.trim() || turn.files) actions.edit(turn, box.value);
  };
  const form = make(
    "form",
    { class: "editing", onsubmit: submit },
    box,
    make(
      "div",
      { class: "actions" },
      make("button", { type: "button", onclick: end }, t("cancel")),
      make("button", { type: "submit", class: "primary" }, t("edit.send")),
    ),
  );
  form.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      end();
    } else if (event.key === "Enter" && !event.shiftKey && event.target === box) {
      submit(event);
    }
  });
  delete item.dataset.shows;
  item.replaceChildren(form);
  box.focus();
  box.setSelectionRange(box.value.length, box.value.length);
}

/** Edits the last message of the branch; whether there is one. */
export function editLast() {
  const buttons = document.querySelectorAll("#thread .edit");
  buttons[buttons.length - 1]?.click();
  return buttons.length > 0;
}

export function toEnd() {
  const scroll = find("scroll");
  scroll.scrollTop = scroll.scrollHeight;
}

function atEnd() {
  const scroll = find("scroll");
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
}
