// One slider for each vector of the model: grouped, searchable, in step with the steering text.

import { getVectors } from "./api.js";
import { button, byId, debounced, el } from "./dom.js";
import { shown, signed } from "./grammar.js";
import * as steering from "./steering.js";

const REACH = 5;
const STEP = { fine: 0.1, key: 0.5, page: 1 }; // of a reach of 5; smaller reaches scale them
const NOTE = "Arrow keys move by 0.5, with Shift by 0.1; Home and double-click: 0.";

let found = { vectors: [], unreadable: [], sets: [] };
const rows = new Map();

/** {vectors, unreadable, sets} as the server listed them last. */
export const listed = () => found;

/** Names of `names` that no vector has. */
export const unknown = (names) => names.filter((name) => !rows.has(name));

/** Read the vectors and show them. `meters` says which are read; `make(set)` makes one of a set. */
export async function load(meters, make) {
  found = await getVectors();
  rows.clear();
  const groups = Map.groupBy(found.vectors, (vector) => vector.group);
  const shownGroups = [...groups].map(([name, vectors]) => group(name, vectors, meters));
  byId("sliders").replaceChildren(...shownGroups, ...rest(make));
  search();
  refresh();
}

/** Bring a vector's slider into view and give it the focus. */
export function show(name) {
  const row = rows.get(name);
  if (!row) return;
  byId("search").value = "";
  search();
  row.box.closest("details").open = true;
  row.box.classList.add("new");
  row.range.focus();
  row.box.scrollIntoView({ block: "center" });
}

/** Listen to the search field and to the steering. */
export function start() {
  byId("search").addEventListener("input", debounced(search, 80));
  steering.follow(refresh);
}

function group(name, vectors, meters) {
  const box = el("details", { open: true, class: "group" });
  const made = vectors.map((vector) => {
    const row = rowOf(vector, meters);
    rows.set(vector.name, row);
    return row.box;
  });
  box.append(el("summary", {}, name, el("span", { class: "count" }, String(vectors.length))), ...made);
  return box;
}

function rowOf(vector, meters) {
  const reach = vector.op === "project" ? 1 : REACH;
  const id = `slider-${vector.name}`;
  const range = el("input", {
    type: "range", id, min: -reach, max: reach, step: (STEP.fine * reach) / REACH, value: 0,
    title: NOTE, "aria-describedby": `${id}-note`,
  });
  const readout = el("output", { htmlFor: id });
  const box = el(
    "div",
    { class: "row", data: { name: vector.name } },
    el("div", { class: "head" },
      el("label", { htmlFor: id, title: factsOf(vector) }, vector.name),
      ...badges(vector), meters.toggle(vector.name), readout),
    range,
    el("div", { class: "poles", "aria-hidden": "true" },
      el("span", {}, vector.negative_label ?? "less"), el("span", {}, vector.positive_label ?? "more")),
    el("p", { class: "unseen", id: `${id}-note` }, factsOf(vector)),
  );
  mark(box, vector, reach);
  listen(range, vector.name, reach);
  return { vector, box, range, readout, reach };
}

/** Where on the track answers are known to stay coherent. */
function mark(box, vector, reach) {
  const share = (value) => `${(50 * (value + reach)) / reach}%`;
  box.classList.toggle("unsure", vector.safe_max === null);
  box.style.setProperty("--from", share(Math.max(-reach, vector.safe_min ?? -reach)));
  box.style.setProperty("--to", share(Math.min(reach, vector.safe_max ?? reach)));
}

function badges(vector) {
  if (vector.safe_max !== null) return [];
  return [el("span", { class: "badge", title: vector.verdict }, "uncalibrated")];
}

function factsOf(vector) {
  const said = vector.evaluation?.sentence;
  return [vector.description, vector.verdict, said && `Evaluated: ${said}.`].filter(Boolean).join(" ");
}

function listen(range, name, reach) {
  const to = (value) => steering.set(name, Math.max(-reach, Math.min(reach, Number(shown(value)))));
  range.addEventListener("input", () => to(range.valueAsNumber));
  range.addEventListener("dblclick", () => to(0));
  range.addEventListener("keydown", (event) => {
    const moved = byKey(event, range.valueAsNumber, reach);
    if (moved === null) return;
    event.preventDefault();
    to(moved);
  });
}

/** Where a key takes a slider from `value`; null for keys that are none of its. */
function byKey({ key, shiftKey, altKey, ctrlKey, metaKey }, value, reach) {
  if (altKey || ctrlKey || metaKey) return null;
  const unit = reach / REACH;
  const step = (shiftKey ? STEP.fine : STEP.key) * unit;
  if (key === "ArrowRight" || key === "ArrowUp") return value + step;
  if (key === "ArrowLeft" || key === "ArrowDown") return value - step;
  if (key === "PageUp") return value + STEP.page * unit;
  if (key === "PageDown") return value - STEP.page * unit;
  if (key === "Home" || key === "0") return 0;
  return key === "End" ? reach : null;
}

function refresh() {
  for (const [name, { box, range, readout, reach, vector }] of rows) {
    const amount = steering.amountOf(name);
    range.value = amount;
    readout.value = signed(amount) + (steering.hasMore(name) ? " …" : "");
    const label = amount < 0 ? vector.negative_label : vector.positive_label;
    range.setAttribute("aria-valuetext", `${signed(amount)}${amount && label ? `, ${label}` : ""}`);
    box.classList.toggle("active", amount !== 0 || steering.hasMore(name));
    box.classList.toggle("beyond", amount < (vector.safe_min ?? -reach) || amount > (vector.safe_max ?? reach));
    const share = 50 + (50 * Math.max(-reach, Math.min(reach, amount))) / reach;
    box.style.setProperty("--low", `${Math.min(50, share)}%`);
    box.style.setProperty("--high", `${Math.max(50, share)}%`);
  }
}

function search() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const { vector, box } of rows.values()) {
    const about = [vector.name, vector.description, vector.group, vector.positive_label,
      vector.negative_label, ...vector.tags].join(" ").toLowerCase();
    box.hidden = !words.every((word) => about.includes(word));
  }
  for (const box of byId("sliders").querySelectorAll(".group")) {
    box.hidden = !box.querySelector(".row:not([hidden])");
  }
  const none = words.length > 0 && [...rows.values()].every(({ box }) => box.hidden);
  byId("sliders").classList.toggle("none", none);
}

/** What is no slider: sets that could become one, and files that cannot be used. */
function rest(make) {
  const made = [el("p", { class: "nothing" }, "No slider matches.")];
  if (!rows.size) {
    made.push(el("p", { class: "note" }, "There are no vectors for this model yet. Make one below, or one of your own."));
  }
  if (found.sets.length) {
    const chips = found.sets.map((name) => button(name, () => make(name), { title: `Make “${name}” for this model` }));
    made.push(el("details", { class: "sets", open: !rows.size },
      el("summary", {}, "More, ready to be made", el("span", { class: "count" }, String(found.sets.length))),
      el("div", { class: "chips" }, ...chips)));
  }
  for (const { name, error } of found.unreadable) {
    made.push(el("p", { class: "note bad" }, `${name}: ${error}`));
  }
  return made;
}
