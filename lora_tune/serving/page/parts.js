// Small parts that every view is built of. Text only ever becomes text: nothing here reads markup.

/** Return a new element; attributes named `on…` are listeners, null and false ones are left out. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Show an error with its hint in a box made for it. */
export function showError(box, error) {
  box.replaceChildren(
    element("strong", {}, error.message),
    element("span", {}, error.hint ?? ""),
  );
  box.hidden = false;
}

export function hideError(box) {
  box.hidden = true;
  box.replaceChildren();
}

/** Return the choices of a select, in named groups; what was chosen stays chosen, also when it is gone. */
export function fillSelect(select, groups, chosen) {
  const known = groups.some(([, values]) => values.includes(chosen));
  const option = (value) => element("option", { value }, value);
  select.replaceChildren(
    ...groups.filter(([, values]) => values.length > 0).map(([label, values]) => element("optgroup", { label }, values.map(option))),
  );
  if (!known && chosen) select.append(element("option", { value: chosen }, `${chosen} (not there now)`));
  if (chosen) select.value = chosen;
}

/** Return a duration in words: `84 ms`, `1.3 s`. */
export function duration(milliseconds) {
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  return `${(milliseconds / 1000).toFixed(milliseconds < 10000 ? 1 : 0)} s`;
}

export function count(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

/** Return a moment, given in seconds since 1970, as a person says it. */
export function ago(seconds, now = Date.now() / 1000) {
  const past = Math.max(0, now - seconds);
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return new Date(seconds * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

/** Return a share as a percentage without needless digits. */
export function percent(share) {
  return `${+(share * 100).toFixed(1)} %`;
}

/** Rebuild a part of the page and keep the keyboard where it was: on the element with the same `data-key`. */
export function rebuild(box, children) {
  const key = box.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  box.replaceChildren(...children);
  if (key) (box.querySelector(`[data-key="${CSS.escape(key)}"]`) ?? box.querySelector("button"))?.focus();
}
