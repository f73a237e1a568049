// The list of conversations: search, names, export, deletion.

import { ask, askFile } from "./api.js";
import { askText, confirm } from "./dialogs.js";
import { find, icon, iconButton, make } from "./dom.js";
import { saveFile } from "./files.js";
import { number, t } from "./i18n.js";
import { state } from "./state.js";

const NARROW = matchMedia("(max-width: 50rem)"); // as in chat.css

let listed = [];
let more = false;
let latest = 0;
let changed;

/** given: `renamed(id, title)`, `deleted(id)`, `imported(id)`, `failed(problem)`. */
export function startSide(given) {
  changed = given;
  let timer;
  find("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 150);
  });
  find("more").addEventListener("click", () => load(listed.length));
  find("menu").addEventListener("click", () => {
    openDrawer(true);
    find("new").focus();
  });
  NARROW.addEventListener("change", () => openDrawer(false));
  for (const id of ["veil", "list"]) {
    find(id).addEventListener("click", (event) => event.target.closest(".veil, a") && openDrawer(false));
  }
  find("import").addEventListener("click", () => find("pick-import").click());
  find("pick-import").addEventListener("change", importFile);
  find("popup").addEventListener("keydown", moveInPopup);
}

/** On narrow screens the list lies over the rest of the page; whether it was moved. */
export function openDrawer(open) {
  if (document.body.classList.contains("drawer") === (open && NARROW.matches)) return false;
  document.body.classList.toggle("drawer");
  find("menu").setAttribute("aria-expanded", open);
  for (const behind of document.querySelectorAll("main, .bar")) behind.inert = open;
  if (!open) find("menu").focus();
  return true;
}

/** Asks for the list anew. */
export const refresh = () => load(0);

async function load(offset) {
  const search = find("search").value.trim();
  const asked = ++latest;
  try {
    const query = new URLSearchParams({ search, offset });
    const answer = await ask("GET", `/page/conversations?${query}`);
    if (asked !== latest) return; // one has typed on
    const known = new Set(offset ? listed.map((each) => each.id) : []);
    listed = [...(offset ? listed : []), ...answer.conversations.filter((each) => !known.has(each.id))];
    more = answer.more;
    showList();
  } catch (problem) {
    changed.failed(problem);
  }
}

export function showList() {
  const search = find("search").value.trim();
  find("list").replaceChildren(...listed.map(item));
  find("more").hidden = !more;
  let text = "";
  if (listed.length === 0) text = search ? t("search.none", { text: search }) : t("list.none");
  else if (search) text = t("list.found", { n: `${number(listed.length)}${more ? "+" : ""}` });
  find("list-note").textContent = text;
}

/** Marks the one that is shown. */
export function markCurrent() {
  for (const link of find("list").querySelectorAll("a")) {
    if (link.hash === `#${state.conversation.id}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function item(each) {
  const title = each.title || t("untitled");
  const link = make("a", { href: `#${each.id}`, title }, make("span", {}, title));
  if (each.found) link.append(make("small", {}, ...marked(each.found)));
  if (each.id === state.conversation.id) link.setAttribute("aria-current", "page");
  const button = iconButton("more", t("actions", { title }), () => openPopup(each, button), { "aria-haspopup": "menu" });
  return make("li", {}, link, button);
}

/** The text that was found, with what was searched for marked. */
function marked(text) {
  const search = find("search").value.trim().toLowerCase();
  const start = text.toLowerCase().indexOf(search);
  if (search === "" || start < 0) return [text];
  const end = start + search.length;
  return [text.slice(0, start), make("mark", {}, text.slice(start, end)), text.slice(end)];
}

function openPopup(each, button) {
  const popup = find("popup");
  const choose = (work) => async () => {
    popup.hidePopover();
    button.focus();
    try {
      await work(each);
    } catch (problem) {
      changed.failed(problem);
    }
  };
  const choice = (name, label, work) =>
    make("button", { type: "button", role: "menuitem", onclick: choose(work) }, icon(name), label);
  popup.replaceChildren(
    choice("edit", t("rename"), rename),
    choice("save", t("export.markdown"), (one) => exportFile(one, "markdown", "md")),
    choice("save", t("export.json"), (one) => exportFile(one, "json", "json")),
    choice("trash", t("delete"), remove),
  );
  popup.setAttribute("aria-label", button.getAttribute("aria-label"));
  popup.showPopover();
  const place = button.getBoundingClientRect();
  popup.style.left = `${Math.max(8, Math.min(place.left, innerWidth - popup.offsetWidth - 8))}px`;
  popup.style.top = `${Math.min(place.bottom + 4, innerHeight - popup.offsetHeight - 8)}px`;
  popup.firstChild.focus();
}

function moveInPopup(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  const items = [...find("popup").children];
  items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
}

async function rename(each) {
  const title = await askText(t("rename"), t("rename.label"), each.title);
  if (title === null) return;
  await ask("PATCH", `/page/conversations/${each.id}`, { title });
  changed.renamed(each.id, title);
  await refresh();
}

async function exportFile(each, format, suffix) {
  const name = (each.title || t("untitled")).replace(/[\\/:*?"<>|\p{Cc}]/gu, " ");
  saveFile(await askFile(`/page/conversations/${each.id}/export?format=${format}`), `${name}.${suffix}`);
}

async function remove(each) {
  const title = each.title || t("untitled");
  if (!(await confirm(t("delete.ask", { title }), t("delete.note"), t("delete")))) return;
  await ask("DELETE", `/page/conversations/${each.id}`);
  changed.deleted(each.id);
  await refresh();
  find("new").focus();
}

async function importFile() {
  const [file] = find("pick-import").files;
  find("pick-import").value = "";
  try {
    const made = await ask("POST", "/page/import", JSON.parse(await file.text()));
    find("search").value = "";
    changed.imported(made.id);
  } catch (error) {
    changed.failed(new Error(t("file.wrong", { name: file.name, message: error.message })));
  }
}
