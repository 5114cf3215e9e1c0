// Features in use: a slider for each one that was added or that the steering line names, and the
// choice between adding to it and clamping it. Those that were added are kept by this browser.

import { getVector } from "./api.js";
import { button, byId, debounced, el, kept, say } from "./dom.js";
import * as meters from "./meters.js";
import { Row } from "./row.js";
import * as steering from "./steering.js";

const PREFIX = "sae/";
const CLAMP = "/clamp";
const SETTLE = 300; // ms that a line must rest before the features in it are looked up
const HINT = 1; // the strength that a feature begins with
const store = kept("mlxsteer.features", {});
const rows = new Map(); // name -> row
const added = new Set(); // names that outlive the page
const problems = new Map(); // name in the line -> why it has no slider
const followers = new Set();
let model = null;

const plain = (name) => (name.endsWith(CLAMP) ? name.slice(0, -CLAMP.length) : name);

/** Whether a name in steering text means a feature. */
export const isFeature = (name) => name.startsWith(PREFIX);

/** Why there is no slider for a feature in the line; nothing where there is, or it is looked for. */
export const problem = (name) => problems.get(name);

/** Whether a feature has a slider, to add to it or to clamp it. */
export const has = (name) => rows.has(name) || rows.has(name + CLAMP);

/** Call `act` whenever sliders come or go. */
export const follow = (act) => followers.add(act);

/** Listen to the steering. */
export function start() {
  steering.follow(() => {
    for (const row of rows.values()) row.refresh();
  });
  steering.follow(debounced(() => adopt(), SETTLE));
}

/** Show the features that were added for the served model, and those of the line. */
export async function load(served) {
  model = served;
  for (const name of store.read()[model] ?? []) added.add(name);
  await Promise.all([...added].map((name) => find(name).catch((error) => lost(name, error))));
  await adopt();
}

/** Give a feature a slider, and a hint of strength. ApiError when it cannot be had. */
export async function add(name) {
  await find(name);
  added.add(name);
  keep();
  if (steering.amountOf(name) === 0) steering.set(name, HINT);
  say(`${name} has a slider now, at ${HINT}.`);
}

/** Take a feature's sliders away, and the feature out of the steering. */
export function drop(name) {
  for (const gone of [plain(name), plain(name) + CLAMP]) {
    forget(gone);
    steering.drop(gone);
  }
  meters.drop(plain(name));
  keep();
  say(`${plain(name)} is removed.`);
}

// --- rows ------------------------------------------------------------------------------------------

async function find(name) {
  if (rows.has(name)) return;
  const vector = await getVector(name);
  if (rows.has(name)) return; // another look was faster
  rows.set(name, rowOf(vector));
  byId("in-use").append(rows.get(name).box);
  tell();
}

function rowOf(vector) {
  const { name, description } = vector;
  const title = [el("b", {}, plain(name).slice(PREFIX.length)), " ", el("span", { class: "about" }, description)];
  const clamp = button("clamp", () => turn(name), {
    "aria-pressed": name.endsWith(CLAMP), class: "clamp",
    "aria-label": `Clamp ${plain(name)}`,
    title: "Set the feature to a value, in place of adding to it",
  });
  const away = () => {
    drop(name);
    byId("feature-words").focus();
  };
  const remove = button("×", away, { class: "quiet drop", "aria-label": `Remove ${plain(name)}`, title: "Remove this slider" });
  return new Row(vector, title, [clamp, meters.toggle(plain(name)), remove]);
}

/** From adding to clamping, or back, at the same strength. */
async function turn(name) {
  const other = name.endsWith(CLAMP) ? plain(name) : name + CLAMP;
  const before = rows.get(name);
  try {
    const vector = await getVector(other);
    if (rows.get(name) !== before || rows.has(other)) return;
    rows.set(other, rowOf(vector));
    if (added.has(name)) added.add(other);
    before.box.replaceWith(rows.get(other).box);
    forget(name);
    steering.rename(name, other);
    keep();
    rows.get(other).box.querySelector(".clamp").focus();
  } catch (error) {
    before.box.querySelector(".note")?.remove();
    before.box.append(el("p", { class: "note bad", role: "alert" }, error.message));
  }
}

function forget(name) {
  rows.get(name)?.box.remove();
  rows.delete(name);
  added.delete(name);
}

/** A feature that was added is not there: forget it if it is gone for good. */
function lost(name, error) {
  if (error.status !== 404) throw error;
  forget(name);
  keep();
}

/** Look up the features in the line that have no slider; drop those that were only typed on the way. */
async function adopt() {
  const named = steering.names().filter(isFeature);
  const strangers = [...new Set(named)].filter((name) => !rows.has(name));
  problems.clear();
  if (strangers.length) {
    for (const name of [...rows.keys()]) if (!added.has(name) && !named.includes(name)) forget(name);
  }
  await Promise.all(strangers.map((name) => find(name).catch((error) => problems.set(name, error.message))));
  tell();
}

function keep() {
  store.write({ ...store.read(), [model]: [...added] });
  tell();
}

function tell() {
  byId("features-count").textContent = rows.size || "";
  for (const act of followers) act();
}
