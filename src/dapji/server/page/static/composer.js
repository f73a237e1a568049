// The box in which one writes, and the files that go with the message.

import { find, icon, iconButton, make } from "./dom.js";
import { readText } from "./files.js";
import { t } from "./i18n.js";
import { state } from "./state.js";
import { editLast } from "./thread.js";

const TOUCH = matchMedia("(pointer: coarse)"); // whose keyboards have no Shift+Enter

let files = [];

/** send: gets the text and the files; gives whether they were taken. stop: ends the answer. */
export function startComposer(send, stop) {
  const box = find("box");
  const submit = async () => {
    if (state.writings.has(state.conversation.id)) return;
    const [text, added] = [box.value, files];
    if (!text.trim() && added.length === 0) return;
    fill("");
    files = [];
    showFiles();
    if (await send(text, added)) return;
    fill(text);
    files = added;
    showFiles();
  };
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  find("stop").addEventListener("click", stop);
  box.addEventListener("input", grow);
  box.addEventListener("keydown", (event) => {
    // While a syllable is composed, Enter ends it. Safari has then ended the composition, and tells by 229.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey && !TOUCH.matches) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && box.value === "" && editLast()) {
      event.preventDefault();
      event.stopPropagation();
    }
  });
  find("attach").addEventListener("click", () => find("pick").click());
  find("pick").addEventListener("change", () => {
    add(find("pick").files);
    find("pick").value = "";
  });
  acceptDrops();
}

/** Puts a text into the box. */
export function fill(text) {
  find("box").value = text;
  grow();
}

export function note(message) {
  find("composer-note").textContent = message;
}

/** The button to stop takes the place of that to send while an answer is written. */
export function showRunning() {
  const running = state.writings.has(state.conversation.id);
  const focused = document.activeElement === find("stop") || document.activeElement === find("send");
  find("stop").hidden = !running;
  find("send").hidden = running;
  if (focused) find(running ? "stop" : "send").focus();
}

/** Fits the box to its text: styles bound how high it becomes. */
function grow() {
  const box = find("box");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

async function add(list) {
  note("");
  for (const file of list) {
    try {
      const used = files.reduce((sum, each) => sum + new Blob([each.text]).size, 0);
      const read = await readText(file, used);
      files = [...files, read]; // of now: others may have been added meanwhile
    } catch (error) {
      note(error.message);
    }
  }
  showFiles();
  find("box").focus();
}

export function showFiles() {
  const items = files.map((file) => {
    const remove = () => {
      files = files.filter((each) => each !== file);
      showFiles();
      find("box").focus();
    };
    return make("li", {}, icon("file"), file.name, iconButton("close", t("file.remove", { name: file.name }), remove));
  });
  find("files").replaceChildren(...items);
}

function acceptDrops() {
  const drop = find("drop");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    drop.hidden = document.querySelector("dialog[open]") !== null;
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) drop.hidden = true;
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    const wanted = !drop.hidden;
    drop.hidden = true;
    if (wanted) add(event.dataTransfer.files);
  });
}
