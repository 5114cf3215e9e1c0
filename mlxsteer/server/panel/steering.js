// The steering in force on this page: its terms, and who wants to know when they change.

import { format, parse } from "./grammar.js";

const followers = new Set();
let terms = [];
let current = "";

/** The line, as it is sent. */
export const text = () => current;

/** Call `act` whenever the line changes. */
export const follow = (act) => followers.add(act);

/** Names in use. */
export const names = () => terms.map((term) => term.name);

/** Take a whole line. Throws an Error that says what is wrong with it. */
export function setText(line) {
  take(parse(line));
}

/** What a slider shows of a vector: its first term with a strength; 0 without one. */
export const amountOf = (name) => terms.find((term) => isSlider(term, name))?.amount ?? 0;

/** Terms of the vector that no slider can show: raw doses, and second ones. */
export const hasMore = (name) => {
  const all = terms.filter((term) => term.name === name);
  return all.length > 1 || all.some((term) => term.unit || term.suffix);
};

/** Move a slider. At 0 a plain term leaves the line. */
export function set(name, amount) {
  const at = terms.findIndex((term) => isSlider(term, name));
  const changed = [...terms];
  if (at < 0) changed.push({ name, amount, unit: "", suffix: "" });
  else changed[at] = { ...terms[at], amount };
  take(changed.filter((term) => term.amount !== 0 || term.suffix || term.unit));
}

/** Take all terms of a vector out. */
export const drop = (name) => take(terms.filter((term) => term.name !== name));

/** Let what is set of one vector be set of another. */
export const rename = (name, other) =>
  take(terms.map((term) => (term.name === name ? { ...term, name: other } : term)));

const isSlider = (term, name) => term.name === name && !term.unit;

function take(changed) {
  const line = format(changed);
  terms = changed;
  if (line === current) return;
  current = line;
  for (const act of followers) act(current);
}
