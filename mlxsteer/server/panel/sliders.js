// One slider for each vector of the model: grouped, searchable, in step with the steering text.

import { getVectors } from "./api.js";
import { button, byId, debounced, el } from "./dom.js";
import { Row } from "./row.js";
import * as steering from "./steering.js";

let found = { vectors: [], unreadable: [], sets: [] };
const rows = new Map();

/** Whether there is a vector of that name. */
export const has = (name) => rows.has(name);

/** Read the vectors and show them. `make(set)` makes one of a set. */
export async function load(make) {
  found = await getVectors();
  rows.clear();
  const groups = Map.groupBy(found.vectors, (vector) => vector.group);
  const shownGroups = [...groups].map(([name, vectors]) => group(name, vectors));
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

function group(name, vectors) {
  const box = el("details", { open: true, class: "group" });
  const made = vectors.map((vector) => {
    const row = new Row(vector);
    rows.set(vector.name, row);
    return row.box;
  });
  box.append(el("summary", {}, name, el("span", { class: "count" }, String(vectors.length))), ...made);
  return box;
}

function refresh() {
  for (const row of rows.values()) row.refresh();
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
