// Starts the page: views, theme, models, dialogs, keys.

import { listModels, onKeyNeeded, setKey } from "./api.js";
import { newChat, regenerate, startChat, stop } from "./chat.js";
import { $, announce, el, store } from "./dom.js";
import { Board } from "./board.js";
import { buildSettings, resetSettings } from "./settings.js";

const board = new Board();

// -- views --------------------------------------------------------------------------------------------------------

const VIEWS = ["chat", "server"];

function openView(name, focus = false) {
  for (const view of VIEWS) {
    const chosen = view === name;
    $(`view-${view}`).hidden = !chosen;
    $(`tab-${view}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${view}`).tabIndex = chosen ? 0 : -1;
  }
  for (const id of ["new-chat", "open-settings"]) $(id).hidden = name !== "chat";
  if (focus) $(`tab-${name}`).focus();
  history.replaceState(null, "", name === "chat" ? location.pathname : `#${name}`);
  if (name === "server") board.start();
  else board.stop();
}

for (const [index, view] of VIEWS.entries()) {
  $(`tab-${view}`).addEventListener("click", () => openView(view));
  $(`tab-${view}`).addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") openView(VIEWS[1 - index], true);
  });
}

// -- theme --------------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const system = matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  const theme = store.get("theme", "auto");
  document.documentElement.dataset.theme = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
  $("theme").setAttribute("aria-label", `Theme: ${theme === "auto" ? "as the system" : theme}`);
  $("theme").title = $("theme").getAttribute("aria-label");
}

$("theme").addEventListener("click", () => {
  store.set("theme", THEMES[(THEMES.indexOf(store.get("theme", "auto")) + 1) % THEMES.length]);
  applyTheme();
  announce($("theme").title);
});
system.addEventListener("change", applyTheme);
applyTheme();

// -- settings -----------------------------------------------------------------------------------------------------

function openSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
  (open ? $("system") : $("open-settings")).focus();
}

$("open-settings").addEventListener("click", () => openSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => openSettings(false));
$("reset-settings").addEventListener("click", resetSettings);
$("change-key").addEventListener("click", async () => {
  const given = await askForKey(false);
  if (given !== null) {
    setKey(given.key, given.keep);
    loadModels();
  }
});
$("new-chat").addEventListener("click", newChat);
$("open-help").addEventListener("click", () => $("help").showModal());

// -- the API key --------------------------------------------------------------------------------------------------

function askForKey(refused) {
  $("key-text").textContent = refused ? "The server refused this key." : "This server asks for an API key.";
  $("key").value = "";
  const dialog = $("key-dialog");
  dialog.returnValue = "cancel";
  dialog.showModal();
  $("key").focus();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const key = $("key").value.trim();
        resolve(dialog.returnValue === "ok" && key ? { key, keep: $("key-keep").checked } : null);
      },
      { once: true },
    );
  });
}

// Enter in the field means "Use", although "Cancel" is the form's first button.
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("key-dialog").close("ok");
});
onKeyNeeded(askForKey);

// -- models -------------------------------------------------------------------------------------------------------

async function loadModels() {
  const select = $("model");
  try {
    const models = await listModels();
    const chosen = store.get("model");
    select.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
    if (models.some(({ id }) => id === chosen)) select.value = chosen;
    select.disabled = models.length < 2;
  } catch (error) {
    select.replaceChildren(el("option", { value: "" }, "no models"));
    select.title = error.message;
  }
}

$("model").addEventListener("change", () => store.set("model", $("model").value));

// -- keys ---------------------------------------------------------------------------------------------------------

const typing = (node) => node.matches("input, textarea, select, [contenteditable]");

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const alt = { r: regenerate, n: newChat, s: () => openSettings($("settings").hidden), 1: () => openView("chat"), 2: () => openView("server") };
  const action = event.altKey && !event.ctrlKey && !event.metaKey ? alt[event.code.replace(/^(Key|Digit)/, "").toLowerCase()] : null;
  if (action) action();
  else if (event.key === "Escape") stop();
  else if (event.key === "/" && !typing(event.target) && !$("view-chat").hidden) $("composer-text").focus();
  else if (event.key === "?" && !typing(event.target)) $("help").showModal();
  else return;
  event.preventDefault();
});

buildSettings();
startChat();
openView(location.hash === "#server" ? "server" : "chat");
if (location.hash !== "#server") $("composer-text").focus();
loadModels();
