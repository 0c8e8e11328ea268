// One prompt to several models at once, side by side; every answer names the version that gave it.

import { byId, count, duration, element, fillSelect, hideError, showError } from "./parts.js";
import { ServerError, errorFrom, request, streamed } from "./server.js";

const MOST_COLUMNS = 4;
const state = { columns: [], turns: [], groups: [], nextKey: 1, stop: null, readModels: () => {} };

export function startCompare(readModels) {
  state.readModels = readModels;
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    }
  });
  byId("stop").addEventListener("click", stopAnswers);
  byId("clear").addEventListener("click", clear);
  byId("add-column").addEventListener("click", () => {
    addColumn(nextModel());
    state.columns.at(-1).select.focus();
  });
  for (const id of ["temperature", "max-tokens", "seed", "system"]) byId(id).addEventListener("input", sumUpSettings);
  // A sticky form that grows must not cover the end of what was being read.
  let wasAtEnd = true;
  byId("settings").addEventListener("click", () => (wasAtEnd = isAtEnd()));
  byId("settings").addEventListener("toggle", () => wasAtEnd && toEnd());
  sumUpSettings();
}

export function focusPrompt() {
  if (!byId("view-compare").hidden) byId("prompt").focus();
}

/** Take the models that the server names; the first time, put the base beside the first adapter. */
export function setModels(models) {
  const called = (kind) => models.filter((model) => model.kind === kind).map((model) => model.id);
  const [base] = called("base");
  const others = [...called("alias"), ...called("adapter")];
  state.groups = [["Base", called("base")], ["Names", called("alias")], ["Versions", called("adapter")]];
  byId("base-name").textContent = base ?? "";
  byId("no-adapters").hidden = others.length > 0;
  for (const column of state.columns) fillSelect(column.select, state.groups, column.select.value);
  if (state.columns.length === 0 && base) addColumn(base);
  if (state.columns.length === 1 && state.turns.length === 0 && others.length > 0) addColumn(nextModel());
  showColumns();
}

/** Return a model that no column shows yet, names before versions. */
function nextModel() {
  const shown = state.columns.map((column) => column.select.value);
  const all = [...state.groups[1][1], ...state.groups[2][1], ...state.groups[0][1]];
  return all.find((id) => !shown.includes(id)) ?? all[0];
}

function addColumn(model) {
  if (state.columns.length >= MOST_COLUMNS) return;
  const key = state.nextKey++;
  const select = element("select", { id: `model-${key}`, onfocus: () => state.readModels() });
  fillSelect(select, state.groups, model);
  const label = element("label", { class: "unseen", for: select.id });
  const remove = element("button", { type: "button", class: "quiet icon", onclick: () => removeColumn(key) }, "×");
  const head = element("div", { class: "column-head" }, label, select, remove);
  byId("columns").append(head);
  state.columns.push({ key, select, label, remove, head });
  for (const turn of state.turns) turn.row.append(emptyCell(key));
  showColumns();
}

function removeColumn(key) {
  const at = state.columns.findIndex((column) => column.key === key);
  const [column] = state.columns.splice(at, 1);
  column.head.remove();
  for (const turn of state.turns) {
    turn.answers.get(key)?.abort?.abort();
    turn.answers.delete(key);
    turn.row.querySelector(`[data-column="${key}"]`)?.remove();
  }
  showColumns();
  (state.columns[Math.max(0, at - 1)]?.remove ?? byId("add-column")).focus();
}

function showColumns() {
  const n = state.columns.length;
  byId("view-compare").dataset.columns = n;
  byId("add-column").disabled = n >= MOST_COLUMNS || state.groups.length === 0;
  state.columns.forEach((column, at) => {
    column.label.textContent = `Model of column ${at + 1}`;
    column.remove.setAttribute("aria-label", `Remove column ${at + 1}`);
    column.remove.hidden = n === 1;
  });
}

function emptyCell(key) {
  return element("div", { class: "answer empty", "data-column": key }, "This column was not there yet.");
}

/** Return the settings of the form, or null when one of them is out of bounds; the browser then says which. */
function settings() {
  const fields = ["temperature", "max-tokens", "seed"].map(byId);
  if (fields.some((field) => !field.checkValidity())) {
    byId("settings").open = true;
    fields.find((field) => !field.checkValidity()).reportValidity();
    return null;
  }
  const [temperature, maxTokens, seed] = fields;
  return {
    temperature: temperature.valueAsNumber,
    max_tokens: maxTokens.valueAsNumber,
    ...(seed.value === "" ? {} : { seed: seed.valueAsNumber }),
  };
}

function sumUpSettings() {
  const parts = [`temperature ${byId("temperature").value}`, `at most ${byId("max-tokens").value} tokens`];
  if (byId("seed").value) parts.push(`seed ${byId("seed").value}`);
  if (byId("system").value.trim()) parts.push("own system message");
  byId("settings-summary").textContent = parts.join(" · ");
}

async function send() {
  const prompt = byId("prompt").value;
  const asked = settings();
  if (state.stop || !asked || state.columns.length === 0) return;
  if (!prompt.trim()) {
    byId("prompt").focus();
    return;
  }
  const turn = newTurn(prompt);
  byId("prompt").value = "";
  state.turns.push(turn);
  const columns = [...state.columns];
  await running(() => Promise.all(columns.map((column) => answer(turn, column, asked))));
  nameEqualAnswers(turn, columns);
}

/** Do something that Stop and Escape can end. */
async function running(work) {
  const stop = new AbortController();
  state.stop = stop;
  const keepFocus = document.activeElement === byId("send") ? byId("stop") : null;
  showRunning(true);
  keepFocus?.focus();
  try {
    await work();
  } finally {
    if (state.stop === stop) {
      const hadFocus = document.activeElement === byId("stop");
      state.stop = null;
      showRunning(false);
      if (hadFocus) byId("prompt").focus();
    }
  }
}

function showRunning(isRunning) {
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  byId("clear").hidden = state.turns.length === 0;
  byId("intro").hidden = state.turns.length > 0;
}

/** Stop every answer that is being made; return whether there was one. */
export function stopAnswers() {
  if (!state.stop) return false;
  state.stop.abort();
  return true;
}

function clear() {
  stopAnswers();
  state.turns = [];
  byId("turns").replaceChildren();
  showRunning(false);
  byId("prompt").focus();
}

function newTurn(prompt) {
  const row = element("div", { class: "answers" });
  const said = element("p", { class: "said" }, element("span", { class: "unseen" }, "You: "), prompt);
  const item = element("li", { class: "turn" }, said, row);
  byId("turns").append(item);
  toEnd();
  return { prompt, row, answers: new Map() };
}

/** Return the conversation of one column up to a turn; an answer that failed leaves its prompt out too. */
function messagesFor(turn, column) {
  const messages = [];
  const system = byId("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const before of state.turns.slice(0, state.turns.indexOf(turn))) {
    const given = before.answers.get(column.key);
    if (!given || given.failed || !given.text) continue;
    messages.push({ role: "user", content: before.prompt }, { role: "assistant", content: given.text });
  }
  return [...messages, { role: "user", content: turn.prompt }];
}

/** Ask one column's model, and show its answer as it comes; never throws. */
async function answer(turn, column, asked) {
  const given = newAnswer(turn, column);
  const onStop = () => given.abort.abort();
  state.stop.signal.addEventListener("abort", onStop);
  const body = { model: given.model, messages: messagesFor(turn, column), stream: true, stream_options: { include_usage: true }, ...asked };
  try {
    const response = await request("POST", "v1/chat/completions", { body, signal: given.abort.signal });
    for await (const event of streamed(response)) take(given, event);
    if (!given.finish) throw new ServerError("The connection ended before the answer did.", { hint: "Send the prompt again." });
  } catch (error) {
    if (given.abort.signal.aborted) given.finish = "stopped";
    else fail(given, error, () => retry(turn, column));
  }
  close(given);
}

function retry(turn, column) {
  const asked = settings();
  if (state.stop || !asked || !state.columns.includes(column)) return;
  running(() => answer(turn, column, asked)).then(() => nameEqualAnswers(turn, state.columns));
  byId("stop").focus();
}

function newAnswer(turn, column) {
  const model = column.select.value;
  const id = `fingerprint-${column.key}-${state.turns.length}`;
  const words = document.createTextNode("");
  const parts = {
    version: element("button", { type: "button", class: "version", "aria-expanded": "false", "aria-controls": id, hidden: true }),
    fingerprint: element("p", { class: "fingerprint", id, hidden: true }),
    asked: element("span", { class: "asked" }, model),
    text: element("div", { class: "text", "aria-live": "polite", "aria-busy": "true" }, words),
    error: element("div", { class: "error", role: "alert", hidden: true }),
    again: element("button", { type: "button", class: "quiet", hidden: true }, "Try again"),
    figures: element("p", { class: "figures" }, "waiting for the first token"),
  };
  parts.version.addEventListener("click", () => {
    parts.fingerprint.hidden = !parts.fingerprint.hidden;
    parts.version.setAttribute("aria-expanded", String(!parts.fingerprint.hidden));
  });
  const head = element("p", { class: "answer-head" }, parts.version, parts.asked);
  const cell = element("article", { class: "answer streaming", "data-column": column.key, "aria-label": `Answer of ${model}` },
    head, parts.fingerprint, parts.text, parts.error, parts.again, parts.figures);
  const old = turn.row.querySelector(`[data-column="${column.key}"]`);
  if (old) old.replaceWith(cell);
  else turn.row.append(cell);
  const given = { model, cell, words, ...parts, text: "", textBox: parts.text, abort: new AbortController(), began: performance.now() };
  Object.assign(given, { first: 0, last: 0, nPieces: 0, usage: null, finish: null, failed: false });
  turn.answers.set(column.key, given);
  return given;
}

/** Take one chunk of a stream. */
function take(given, event) {
  if (event.error) throw errorFrom(event);
  if (event.model) name(given, event.model, event.system_fingerprint ?? "");
  if (event.usage) given.usage = event.usage;
  const choice = event.choices?.[0];
  if (!choice) return;
  if (choice.delta?.content) add(given, choice.delta.content);
  if (choice.finish_reason) given.finish = choice.finish_reason;
}

/** Say which version answers: what the server resolved, not what was asked for. */
function name(given, version, fingerprint) {
  if (given.version.textContent === version) return;
  given.version.textContent = version;
  given.version.title = `system_fingerprint ${fingerprint}`;
  given.version.classList.toggle("base", version === state.groups[0][1][0]);
  given.version.hidden = false;
  given.fingerprint.textContent = fingerprint;
  given.asked.textContent = version === given.model ? "" : `asked as ${given.model}`;
}

function add(given, piece) {
  const follow = isAtEnd();
  given.last = performance.now();
  given.first ||= given.last;
  given.nPieces += 1;
  given.text += piece;
  given.words.appendData(piece);
  given.figures.textContent = `${duration(given.first - given.began)} to first token · ${rate(given, given.nPieces)}`;
  if (follow) toEnd();
}

function isAtEnd() {
  const page = document.documentElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < 80;
}

function toEnd() {
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
}

/** Return tokens a second, from the first token to the last. */
function rate(given, nTokens) {
  const seconds = (given.last - given.first) / 1000;
  return nTokens > 1 && seconds > 0 ? `${((nTokens - 1) / seconds).toFixed(1)} tokens/s` : "";
}

function fail(given, error, again) {
  given.failed = true;
  const told = error instanceof ServerError ? error : new ServerError("The connection broke off.", { hint: "Send the prompt again." });
  showError(given.error, told);
  given.again.hidden = false;
  given.again.addEventListener("click", again);
  if (told.code === "model_not_found") state.readModels();
}

function close(given) {
  const nTokens = given.usage?.completion_tokens ?? given.nPieces;
  const figures = [given.first ? `${duration(given.first - given.began)} to first token` : "", rate(given, nTokens)];
  if (!given.failed || nTokens > 0) figures.push(count(nTokens, "token"));
  if (given.finish === "length") figures.push("cut at the most tokens");
  if (given.finish === "stopped") figures.push("stopped");
  given.figures.textContent = figures.filter(Boolean).join(" · ");
  if (!given.failed && !given.text) given.textBox.replaceChildren(element("em", {}, given.finish === "stopped" ? "Stopped before it began." : "An empty answer."));
  if (given.failed) given.asked.textContent = given.version.hidden ? given.model : given.asked.textContent;
  else hideError(given.error);
  given.cell.classList.remove("streaming");
  given.textBox.setAttribute("aria-busy", "false");
}

/** Mark answers that are the first column's word for word: an adapter that changes nothing shows at once. */
function nameEqualAnswers(turn, columns) {
  const [first, ...others] = columns.map((column) => turn.answers.get(column.key));
  for (const given of others) {
    if (!first || !given || given.failed || first.failed || !given.text || given.text !== first.text) continue;
    given.figures.append(` · same words as ${first.version.textContent || first.model}`);
  }
}
