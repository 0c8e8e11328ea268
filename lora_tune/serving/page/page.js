// The page's frame: which view is shown, the keys, and what the server serves.

import { openAdapters, refreshAdapters, startAdapters } from "./adapters.js";
import { focusPrompt, setModels, startCompare, stopAnswers } from "./compare.js";
import { byId, hideError, showError } from "./parts.js";
import { ask, keepKey, keyOf } from "./server.js";

const VIEWS = ["compare", "adapters"];

function shownView() {
  return location.hash === "#adapters" ? "adapters" : "compare";
}

function showView() {
  const shown = shownView();
  for (const view of VIEWS) {
    byId(`view-${view}`).hidden = view !== shown;
    const link = byId(`to-${view}`);
    if (view === shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = shown === "adapters" ? "Adapters – lora-tune" : "Compare – lora-tune";
  openAdapters(shown === "adapters");
  if (shown === "compare") readModels();
}

/** Ask what can be asked, and tell the columns; an error is shown once, above everything. */
async function readModels() {
  try {
    const { data } = await ask("GET", "v1/models");
    hideError(byId("page-error"));
    byId("enter-key").hidden = true;
    setModels(data);
  } catch (error) {
    showError(byId("page-error"), error);
    byId("enter-key").hidden = error.status !== 401;
  }
}

function openKeys() {
  byId("api-key").value = keyOf("api");
  byId("admin-key").value = keyOf("admin");
  byId("keys").showModal();
}

function keepKeys(event) {
  event.preventDefault();
  keepKey("api", byId("api-key").value.trim());
  keepKey("admin", byId("admin-key").value.trim());
  byId("keys").close();
  readModels();
  refreshAdapters();
}

function forgetKeys() {
  for (const id of ["api-key", "admin-key"]) byId(id).value = "";
  byId("keys-form").requestSubmit();
}

function onKey(event) {
  if (event.key === "Escape" && !document.querySelector("dialog[open]") && stopAnswers()) event.preventDefault();
}

startCompare(readModels);
startAdapters({ onChange: readModels, onKeysWanted: openKeys });
byId("open-keys").addEventListener("click", openKeys);
byId("enter-key").addEventListener("click", openKeys);
byId("keys-form").addEventListener("submit", keepKeys);
byId("forget-keys").addEventListener("click", forgetKeys);
for (const button of document.querySelectorAll("dialog [data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId(shownView() === "compare" ? "prompt" : "load-source").focus();
});
window.addEventListener("hashchange", showView);
document.addEventListener("keydown", onKey);
showView();
focusPrompt();
