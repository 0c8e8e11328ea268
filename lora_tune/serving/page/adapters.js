// What is loaded and what each name means, for who has the admin key.

import { ago, byId, count, element, fillSelect, hideError, percent, rebuild, showError } from "./parts.js";
import { ask, keyOf } from "./server.js";

const EVERY_MS = 3000;
const TOLD_MS = 10000;
const MOST_SHARES = 8;
const VERDICTS = {
  equal: ["good", "✓ probes equal", "Its golden probes gave the recorded tokens through this engine."],
  close: ["good", "✓ probes close", "Its golden probes gave the recorded tokens within rounding."],
  unverified: ["warn", "! unverified", "It has no passport, so nothing could be compared."],
};
const state = { told: null, seen: "", timer: 0, isBusy: false, onChange: () => {}, alias: "", unload: "" };

export function startAdapters({ onChange, onKeysWanted }) {
  state.onChange = onChange;
  byId("want-admin-key").addEventListener("click", onKeysWanted);
  byId("load-form").addEventListener("submit", (event) => {
    event.preventDefault();
    loadFromForm();
  });
  byId("new-alias").addEventListener("click", () => openAlias(""));
  byId("alias-form").addEventListener("submit", applyAlias);
  byId("alias-rows").addEventListener("input", showSum);
  byId("forget-alias").addEventListener("click", forgetAlias);
  byId("add-share").addEventListener("click", () => {
    addShare("", 0);
    spreadShares();
    byId("alias-rows").lastElementChild.querySelector("select").focus();
  });
  byId("unload-form").addEventListener("submit", applyUnload);
}

/** Keep the view fresh while it is shown. */
export function openAdapters(isShown) {
  clearInterval(state.timer);
  if (!isShown) return;
  refreshAdapters();
  state.timer = setInterval(() => {
    if (!document.hidden) refreshAdapters();
  }, EVERY_MS);
}

export async function refreshAdapters() {
  const hasKey = keyOf("admin") !== "";
  byId("admin-wanted").hidden = hasKey;
  byId("admin").hidden = !hasKey;
  if (!hasKey || byId("view-adapters").hidden) return;
  try {
    const told = await ask("GET", "v1/adapters", { key: "admin" });
    hideError(byId("admin-error"));
    show(told);
  } catch (error) {
    showError(byId("admin-error"), error);
  }
}

function show(told) {
  const seen = JSON.stringify([told, Math.floor(Date.now() / 60000)]);
  if (seen === state.seen || state.isBusy) return;
  Object.assign(state, { told, seen });
  rebuild(byId("aliases"), told.aliases.map(aliasRow));
  rebuild(byId("loaded"), told.adapters.map(adapterRow));
  rebuild(byId("registry"), told.registry.map(registryRow));
  byId("sources").replaceChildren(...told.registry.map(({ id }) => element("option", { value: id })));
  byId("no-aliases").hidden = told.aliases.length > 0;
  byId("no-loaded").hidden = told.adapters.length > 0;
  byId("no-registry").hidden = told.registry.length > 0;
  byId("new-alias").disabled = told.adapters.length === 0;
}

function button(text, key, onclick, name) {
  return element("button", { type: "button", class: "quiet", "data-key": key, "aria-label": name, onclick }, text);
}

function fact(term, ...value) {
  return element("div", {}, element("dt", {}, term), element("dd", {}, ...value));
}

function aliasRow({ alias, target, shadow }) {
  const shares = Object.entries(target);
  const targets = shares.map(([id, share]) => element("span", { class: "share" }, element("code", {}, id), shares.length > 1 ? ` ${percent(share)}` : ""));
  return element("li", {},
    element("h3", {}, alias),
    element("dl", {}, fact("Answers with", targets), shadow ? fact("Shadow", element("code", {}, shadow)) : ""),
    element("div", { class: "actions" },
      button("Change", `change ${alias}`, () => openAlias(alias), `Change what ${alias} answers with`),
      button("Roll back", `back ${alias}`, (event) => rollBack(alias, event.target), `Roll ${alias} back to what it was before`)));
}

function adapterRow({ id, digest, verdict, in_flight: inFlight, loaded_at: loadedAt, rank, aliases }) {
  const [kind, words, meaning] = VERDICTS[verdict] ?? ["warn", verdict, ""];
  return element("li", {},
    element("h3", {}, id, element("small", { title: `sha256 ${digest}` }, digest.slice(0, 12))),
    element("dl", {},
      fact("Verdict", element("span", { class: `badge ${kind}`, title: meaning }, words)),
      fact("Names", aliases.length ? aliases.join(", ") : "none"),
      fact("In flight", String(inFlight)),
      fact("Rank", String(rank)),
      fact("Loaded", ago(loadedAt))),
    element("div", { class: "actions" }, button("Unload", `unload ${id}`, () => openUnload(id), `Unload ${id}`)));
}

function registryRow({ id, digest, loaded }) {
  const load = (event) => doing(event.target, "Loading…", () => loadVersion(id, {}));
  return element("li", {},
    element("h3", {}, id, digest ? element("small", { title: `sha256 ${digest}` }, digest.slice(0, 12)) : ""),
    element("div", { class: "actions" },
      loaded ? element("span", { class: "badge good" }, "✓ loaded") : button("Load", `load ${id}`, load, `Load ${id} without pointing a name at it`)));
}

async function loadVersion(source, options) {
  const adapter = await ask("POST", "v1/adapters", { body: { source, point: false, ...options }, key: "admin" });
  return `${adapter.id} is loaded; its probes: ${adapter.verdict}.`;
}

async function loadFromForm() {
  const name = byId("load-name").value.trim();
  const options = { point: byId("load-point").checked, ...(name ? { name } : {}) };
  const done = await doing(byId("load-send"), "Loading…", () => loadVersion(byId("load-source").value.trim(), options));
  if (done) byId("load-form").reset();
}

/** Do one thing with a busy button, and tell how it went; return whether it went well. */
async function doing(pressed, busyText, work) {
  if (state.isBusy) return false;
  state.isBusy = true;
  const text = pressed.textContent;
  pressed.textContent = busyText;
  pressed.setAttribute("aria-disabled", "true");
  hideError(byId("action-error"));
  byId("action-done").textContent = "";
  try {
    tell(await work());
    return true;
  } catch (error) {
    showError(byId("action-error"), error);
    return false;
  } finally {
    pressed.textContent = text;
    pressed.removeAttribute("aria-disabled");
    state.isBusy = false;
    await refreshAdapters();
    state.onChange();
  }
}

/** Say what was done, for a while. */
function tell(text) {
  byId("action-done").textContent = text;
  setTimeout(() => {
    if (byId("action-done").textContent === text) byId("action-done").textContent = "";
  }, TOLD_MS);
}

function words(pointer) {
  const shares = Object.entries(pointer.target);
  return shares.map(([id, share]) => (shares.length > 1 ? `${id} (${percent(share)})` : id)).join(" and ");
}

function rollBack(alias, pressed) {
  return doing(pressed, "Rolling back…", async () => {
    const pointer = await ask("POST", `v1/aliases/${encodeURIComponent(alias)}/rollback`, { key: "admin" });
    return `${alias} answers with ${words(pointer)} again.`;
  });
}

function openAlias(alias) {
  const pointer = state.told.aliases.find((one) => one.alias === alias);
  state.alias = alias;
  byId("alias-title").textContent = alias ? `What ${alias} answers with` : "New alias";
  byId("alias-name").value = alias;
  byId("alias-name-label").hidden = alias !== "";
  byId("forget-alias").hidden = alias === "";
  byId("alias-rows").replaceChildren();
  const versions = state.told.adapters.map(({ id }) => id);
  const shares = Object.entries(pointer?.target ?? { [versions[0]]: 1 });
  for (const [id, share] of shares) addShare(id, share);
  fillSelect(byId("alias-shadow"), [["Versions", versions]], pointer?.shadow ?? "");
  byId("alias-shadow").prepend(element("option", { value: "" }, "none"));
  byId("alias-shadow").value = pointer?.shadow ?? "";
  hideError(byId("alias-error"));
  showSum();
  byId("alias").showModal();
  (alias ? byId("alias-rows").querySelector("select") : byId("alias-name")).focus();
}

/** Return the versions that a name may mean: an adapter's own name means that adapter's versions alone. */
function targetsOf(alias) {
  const own = state.told.adapters.filter((adapter) => adapter.name === alias);
  return (own.length > 0 ? own : state.told.adapters).map(({ id }) => id);
}

function addShare(id, share) {
  const at = byId("alias-rows").childElementCount + 1;
  const versions = targetsOf(state.alias);
  const chosen = [...byId("alias-rows").querySelectorAll("select")].map((select) => select.value);
  const select = element("select", { "aria-label": `Version ${at}` });
  fillSelect(select, [["Loaded versions", versions]], id || versions.find((one) => !chosen.includes(one)) || versions[0]);
  const field = element("input", { type: "number", min: "0.01", max: "100", step: "any", required: true, "aria-label": `Share of version ${at} in percent` });
  field.value = +(share * 100).toFixed(4);
  const remove = element("button", { type: "button", class: "quiet icon", "aria-label": `Take version ${at} out` }, "×");
  const row = element("div", { class: "share-row" }, select, element("span", { class: "percent" }, field, "%"), remove);
  remove.addEventListener("click", () => {
    row.remove();
    spreadShares();
    byId("add-share").focus();
  });
  byId("alias-rows").append(row);
}

function shareRows() {
  return [...byId("alias-rows").children].map((row) => ({ row, id: row.querySelector("select").value, field: row.querySelector("input") }));
}

/** Give every version the same share; the last takes what rounding leaves. */
function spreadShares() {
  const rows = shareRows();
  const each = Math.floor(100 / rows.length);
  rows.forEach(({ field }, at) => {
    field.value = at === rows.length - 1 ? 100 - each * at : each;
  });
  showSum();
}

function showSum() {
  const rows = shareRows();
  const isSplit = rows.length > 1;
  for (const { row } of rows) {
    row.querySelector(".percent").hidden = !isSplit;
    row.querySelector("button").hidden = !isSplit;
  }
  const sum = rows.reduce((total, { field }) => total + (field.valueAsNumber || 0), 0);
  const isRight = Math.abs(sum - 100) < 0.001;
  const isTwice = new Set(rows.map(({ id }) => id)).size < rows.length;
  byId("alias-sum").textContent = !isSplit ? "" : isTwice ? "One version stands here twice." : isRight ? "The shares sum to 100 %." : `The shares sum to ${+sum.toFixed(3)} %; they must sum to 100 %.`;
  byId("alias-sum").classList.toggle("wrong", isSplit && (!isRight || isTwice));
  byId("add-share").disabled = rows.length >= Math.min(MOST_SHARES, targetsOf(state.alias).length);
  return !isSplit || (isRight && !isTwice);
}

async function applyAlias(event) {
  event.preventDefault();
  if (!showSum()) return;
  const alias = byId("alias-name").value.trim();
  const rows = shareRows();
  const meant = rows.length > 1 ? { split: Object.fromEntries(rows.map(({ id, field }) => [id, field.valueAsNumber / 100])) } : { target: rows[0].id };
  const body = { ...meant, shadow: byId("alias-shadow").value || null };
  try {
    const pointer = await ask("PUT", `v1/aliases/${encodeURIComponent(alias)}`, { body, key: "admin" });
    byId("alias").close();
    hideError(byId("action-error"));
    tell(`${alias} answers with ${words(pointer)} from now on.`);
  } catch (error) {
    showError(byId("alias-error"), error);
  }
  await refreshAdapters();
  state.onChange();
}

async function forgetAlias() {
  const alias = state.alias;
  byId("alias").close();
  await doing(byId("new-alias"), "Removing…", async () => {
    await ask("DELETE", `v1/aliases/${encodeURIComponent(alias)}`, { key: "admin" });
    return `${alias} is no name any more; what it pointed to stays loaded.`;
  });
  byId("new-alias").focus();
}

function openUnload(id) {
  const adapter = state.told.adapters.find((one) => one.id === id);
  state.unload = id;
  byId("unload-title").textContent = `Unload ${id}?`;
  byId("unload-words").textContent = adapter.in_flight
    ? `${count(adapter.in_flight, "answer")} in flight will be finished first; new requests for it are refused.`
    : "Requests for it are refused from then on. The registry keeps it: it can be loaded again.";
  byId("unload").showModal();
}

function applyUnload(event) {
  event.preventDefault();
  byId("unload").close();
  const pressed = document.querySelector(`[data-key="${CSS.escape(`unload ${state.unload}`)}"]`);
  doing(pressed, "Unloading…", async () => {
    await ask("DELETE", `v1/adapters/${encodeURIComponent(state.unload)}`, { key: "admin" });
    return `${state.unload} is unloaded.`;
  });
}
