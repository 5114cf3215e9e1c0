// One column, or two side by side, each with its own steering: what is set, none, or a preset.

import { Conversation } from "./chat.js";
import { byId, el } from "./dom.js";
import * as presets from "./presets.js";
import * as steering from "./steering.js";

const SET = "set";
const NONE = "none";
const columns = [];
let whenChanged = () => {};

/** The conversations on the page. */
export const all = () => columns.map((column) => column.conversation);

/** Show the first column. `changed` is called when an answer begins or is over. */
export function start(changed) {
  whenChanged = changed;
  add(SET);
  byId("compare").addEventListener("click", toggle);
  steering.follow(retell);
  presets.follow(() => {
    columns.forEach(offer);
    retell();
  });
}

function toggle() {
  const two = columns.length === 1;
  if (two) {
    add(NONE);
    columns[1].conversation.copy(columns[0].conversation);
  } else {
    const { conversation } = columns.pop();
    conversation.clear();
    conversation.box.remove();
    columns[0].source.value = SET;
  }
  byId("compare").setAttribute("aria-pressed", two);
  byId("columns").classList.toggle("two", two);
  retell();
}

function add(source) {
  const column = { source: el("select", { "aria-label": "Steering of this column" }), shown: el("code") };
  column.conversation = new Conversation(byId("columns"), () => textOf(column), () => whenChanged());
  column.conversation.head.append(column.source, column.shown);
  column.source.addEventListener("change", retell);
  columns.push(column);
  offer(column);
  column.source.value = source;
}

function offer({ source }) {
  const before = source.value;
  const saved = Object.keys(presets.all()).map((name) => el("option", { value: `=${name}` }, name));
  source.replaceChildren(
    el("option", { value: SET }, "The sliders"), el("option", { value: NONE }, "Unsteered"), ...saved);
  source.value = before;
  if (source.selectedIndex < 0) source.value = SET; // the preset is gone
}

function textOf({ source }) {
  if (source.value === SET) return steering.text();
  return source.value === NONE ? "" : (presets.all()[source.value.slice(1)] ?? "");
}

function retell() {
  for (const column of columns) {
    const text = textOf(column);
    column.shown.textContent = column.source.value === NONE ? "" : text || "none";
    column.shown.title = text;
    column.conversation.resteer(text);
  }
}
