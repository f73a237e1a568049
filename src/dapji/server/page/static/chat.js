// The chat: what its parts do together.

import { Writing } from "./answer.js";
import { ask } from "./api.js";
import { startPage } from "./bar.js";
import { fill, note, showFiles, showRunning, startComposer } from "./composer.js";
import { showDialog } from "./dialogs.js";
import { find, make } from "./dom.js";
import { t } from "./i18n.js";
import { startNavigation } from "./navigate.js";
import { firstSettings, showModels, startSettings } from "./settings.js";
import { markCurrent, openDrawer, refresh, showList, startSide } from "./side.js";
import { begun, state } from "./state.js";
import { showThread, startThread, toEnd } from "./thread.js";

function start() {
  startPage(showHelp);
  startNavigation();
  startComposer(send, stop);
  startSettings(fail);
  startThread({ edit, again: write, choose, example });
  startSide({
    renamed(id, title) {
      if (id !== state.conversation.id) return;
      state.conversation.title = title;
      showThread();
    },
    deleted(id) {
      state.writings.get(id)?.stop();
      if (id === state.conversation.id) location.hash = "";
    },
    async imported(id) {
      await refresh();
      location.hash = id;
    },
    failed: fail,
  });
  find("new").addEventListener("click", beginNew);
  addEventListener("hashchange", show);
  document.addEventListener("languagechange", () => {
    showThread();
    showList();
    showFiles();
  });
  document.addEventListener("keydown", shortcut);
  load();
}

async function load() {
  try {
    const { data } = await ask("GET", "/v1/models");
    state.models = data;
    state.limits = data[0].limits;
    await Promise.all([refresh(), show()]);
  } catch (problem) {
    fail(problem);
  }
}

/** Shows the conversation that the address names. */
async function show() {
  const id = location.hash.slice(1);
  note("");
  openDrawer(false);
  if (id === "") {
    state.conversation = { ...begun(), settings: firstSettings() };
  } else if (id !== state.conversation.id) {
    try {
      const known = await ask("GET", `/page/conversations/${encodeURIComponent(id)}`);
      if (id !== location.hash.slice(1)) return; // one has gone on
      state.conversation = known;
    } catch (problem) {
      history.replaceState(null, "", "/");
      state.conversation = { ...begun(), settings: firstSettings() };
      fail(problem);
    }
    const writing = state.writings.get(id);
    if (writing) {
      writing.conversation = state.conversation;
      state.conversation.leaf = writing.parent;
    } else if (state.conversation.answering.length > 0) {
      setTimeout(lookAgain, 1000, id);
    }
  }
  redraw();
  toEnd();
  focusBox();
}

/** At a conversation that is answered elsewhere, or still is after a reload. */
async function lookAgain(id) {
  if (id !== state.conversation.id || state.writings.has(id)) return;
  try {
    state.conversation = await ask("GET", `/page/conversations/${encodeURIComponent(id)}`);
  } catch (problem) {
    fail(problem);
    return;
  }
  if (state.conversation.answering.length > 0) setTimeout(lookAgain, 1000, id);
  redraw();
}

function redraw(problem = null) {
  showThread(problem);
  showModels();
  showRunning();
  markCurrent();
}

/** Whether the message was taken; what comes of it shows in the thread. */
async function send(content, files) {
  note("");
  const { conversation } = state;
  try {
    if (conversation.id === null) {
      const { id } = await ask("POST", "/page/conversations", { settings: conversation.settings });
      conversation.id = id;
      history.replaceState(null, "", `#${id}`);
    }
    await say(conversation, conversation.leaf, content, files);
    return true;
  } catch (problem) {
    fail(problem);
    return false;
  }
}

async function say(conversation, parent, content, files = []) {
  const turn = await ask("POST", `/page/conversations/${conversation.id}/turns`, { parent, content, files });
  conversation.turns.push(turn);
  write(turn.number);
}

/** Has a user's turn answered. */
function write(parent) {
  const { conversation } = state;
  if (state.writings.has(conversation.id)) return;
  conversation.leaf = parent;
  new Writing(conversation, parent, ended);
  redraw();
  toEnd();
  focusBox();
  refresh().then(() => {
    const title = find("list").querySelector(`a[href="#${conversation.id}"] span`)?.textContent;
    if (title !== undefined) conversation.title = title;
    if (conversation === state.conversation) showTitle(conversation);
  });
}

function showTitle({ title }) {
  document.title = `${title} · Dapji`;
  find("heading").textContent = title;
}

function ended(writing, problem) {
  if (writing.conversation !== state.conversation) return;
  redraw(problem);
  if (writing.turn === undefined) return;
  const text = document.querySelector(`[data-turn="${writing.turn.number}"] .content`)?.textContent ?? "";
  const said = t(writing.turn.finish === "stopped" ? "answer.stopped" : "answer.finished");
  find("announce").textContent = `${said} ${text}`;
}

function stop() {
  state.writings.get(state.conversation.id)?.stop();
}

async function edit(turn, content) {
  try {
    await say(state.conversation, turn.parent, content, turn.files);
  } catch (problem) {
    fail(problem);
  }
}

async function choose(leaf) {
  const { conversation } = state;
  conversation.leaf = leaf;
  showThread();
  try {
    await ask("PATCH", `/page/conversations/${conversation.id}`, { leaf });
  } catch (problem) {
    fail(problem);
  }
}

function example(text) {
  fill(text);
  find("box").focus();
}

function beginNew() {
  if (location.hash === "") show();
  else location.hash = "";
  find("box").focus();
}

/** Where there is no touch screen whose keyboard would cover the page. */
function focusBox() {
  if (matchMedia("(any-pointer: coarse)").matches || document.querySelector("dialog[open]")) return;
  find("box").focus();
}

function fail(problem) {
  note(problem.message);
}

function shortcut(event) {
  if (event.defaultPrevented || event.isComposing) return;
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  const inText = event.target.matches("input, textarea, select");
  if (control && !event.shiftKey && key === "k") {
    event.preventDefault();
    openDrawer(true);
    find("search").focus();
  } else if (control && event.shiftKey && key === "o") {
    event.preventDefault();
    beginNew();
  } else if (key === "escape" && document.querySelector("dialog[open], :popover-open") === null) {
    if (!openDrawer(false)) stop();
  } else if (key === "?" && !inText && !control) {
    showHelp();
  }
}

function showHelp() {
  const control = /Mac|iP/.test(navigator.platform) ? "⌘" : "Ctrl";
  const rows = [
    ["send", "Enter"],
    ["line", "Shift+Enter"],
    ["stop", "Esc"],
    ["search", `${control}+K`],
    ["new", `${control}+Shift+O`],
    ["edit", t("up")],
    ["move", t("arrows")],
    ["help", "?"],
  ];
  const parts = rows.flatMap(([name, keys]) => [make("dt", {}, make("kbd", {}, keys)), make("dd", {}, t(`shortcut.${name}`))]);
  showDialog(t("help"), make("dl", { class: "shortcuts" }, ...parts));
}

start();
