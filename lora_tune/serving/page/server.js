// What the page asks of the server: keys, requests, errors in words, answers as they stream.

const STORED = { api: "lora-tune-api-key", admin: "lora-tune-admin-key" };

/** Return a key that was typed in this tab, or an empty string. */
export function keyOf(kind) {
  return sessionStorage.getItem(STORED[kind]) ?? "";
}

/** Keep a key until this tab is closed; an empty one is forgotten. */
export function keepKey(kind, key) {
  if (key) sessionStorage.setItem(STORED[kind], key);
  else sessionStorage.removeItem(STORED[kind]);
}

/** A request that failed: what happened, and one thing to do about it. */
export class ServerError extends Error {
  constructor(message, { hint = "", code = "", status = 0 } = {}) {
    super(message);
    Object.assign(this, { hint, code, status });
  }
}

/** Return the error that an OpenAI-style body describes. */
export function errorFrom(body, status = 0, retryAfter = null) {
  const told = body?.error ?? {};
  const message = told.message || `The server answered with status ${status}.`;
  const wait = retryAfter ? `Try again in ${retryAfter} s.` : "";
  return new ServerError(message, { hint: told.hint || wait, code: told.code ?? "", status });
}

async function failed(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not JSON, as from a proxy in between: the status has to do.
  }
  return errorFrom(body, response.status, response.headers.get("Retry-After"));
}

/** Ask the server; throws ServerError, or AbortError when the signal says so. */
export async function request(method, path, { body, key = "api", signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (keyOf(key)) headers.Authorization = `Bearer ${keyOf(key)}`;
  const asked = { method, headers, signal, cache: "no-store", credentials: "omit", redirect: "error" };
  if (body !== undefined) asked.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, asked);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", { hint: "See whether it still runs, then try again." });
  }
  if (!response.ok) throw await failed(response);
  return response;
}

/** Ask for a JSON value; null when the answer has no body. */
export async function ask(method, path, options) {
  const response = await request(method, path, options);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

function parsed(event) {
  try {
    return JSON.parse(event);
  } catch {
    throw new ServerError("The server sent what is no answer.", { hint: "Is something between this page and the server?" });
  }
}

/** Return the data of each server-sent event, as it arrives, up to `[DONE]`. */
export async function* streamed(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((ended) => ended.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || data.length === 0) continue;
        const event = data.join("\n");
        data = [];
        if (event === "[DONE]") return;
        yield parsed(event);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
