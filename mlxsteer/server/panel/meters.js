// Readings of every token: which vectors are read, tokens coloured by one of them, and a tip.

import { button, byId, debounced, el, say } from "./dom.js";
import { signed } from "./grammar.js";

const MOST = 8; // the server's limit
const chosen = new Set();
const readings = new WeakMap(); // token element -> {vector: reading}
let pointed = null;

/** Vectors to be read at each token. */
export const names = () => [...chosen];

/** Read a vector no longer. */
export const drop = (name) => chosen.has(name) && flip(name);

/** A button that says whether a vector is read. */
export function toggle(name) {
  const made = button("meter", () => flip(name), { class: "meter", data: { meter: name } });
  made.title = `Read ${name} at every token of the next answers`;
  made.setAttribute("aria-label", `Meter of ${name}`);
  made.setAttribute("aria-pressed", chosen.has(name));
  return made;
}

/** Keep what was read at a token (its last, where a piece of text took several). */
export function attach(token, read) {
  if (!read?.length) return;
  readings.set(token, read.at(-1));
  token.classList.add("read");
  repaint();
}

/** Listen to the pointer and the keyboard over answers, and to the choice of colours. */
export function start() {
  const columns = byId("columns");
  columns.addEventListener("pointerover", (event) => point(event.target.closest(".read")));
  columns.addEventListener("pointerleave", () => point(null));
  columns.addEventListener("scroll", () => point(null), true);
  columns.addEventListener("focusin", (event) => event.target.matches(".text") && walk(event.target, 0));
  columns.addEventListener("focusout", () => point(null));
  columns.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.matches(".text")) return;
    event.preventDefault();
    walk(event.target, step);
  });
  byId("colour").addEventListener("change", paint);
}

function flip(name) {
  if (!chosen.delete(name)) {
    if (chosen.size === MOST) return say(`At most ${MOST} vectors are read at a time.`);
    chosen.add(name);
  }
  for (const made of document.querySelectorAll(".meter")) {
    made.setAttribute("aria-pressed", chosen.has(made.dataset.meter));
  }
  offer(chosen.has(name) ? name : byId("colour").value);
}

/** The vectors that tokens can be coloured by: those read now, and those of earlier answers. */
function offer(wanted) {
  const known = new Set(chosen);
  for (const token of document.querySelectorAll(".read")) {
    for (const name of Object.keys(readings.get(token))) known.add(name);
  }
  const options = [...known].map((name) => el("option", { value: name }, name));
  byId("colour").replaceChildren(...options, el("option", { value: "" }, "nothing"));
  byId("colour").value = known.has(wanted) ? wanted : "";
  byId("legend").hidden = !known.size;
  paint();
}

// --- colours -----------------------------------------------------------------------------------

const repaint = debounced(paint, 60);

/** Colours reach from the 5th to the 95th percentile of what is shown, so columns compare. */
function paint() {
  const name = byId("colour").value;
  const tokens = [...document.querySelectorAll(".read")];
  const values = tokens.map((token) => readings.get(token)[name]);
  const known = values.filter(Number.isFinite).sort((a, b) => a - b);
  const low = known[Math.floor(0.05 * (known.length - 1))];
  const high = known[Math.ceil(0.95 * (known.length - 1))];
  tokens.forEach((token, index) => {
    const share = (values[index] - low) / (high - low);
    const level = Number.isFinite(share) ? 2 * Math.max(0, Math.min(1, share)) - 1 : 0;
    token.style.setProperty("--more", `${Math.round(60 * Math.max(0, level))}%`);
    token.style.setProperty("--less", `${Math.round(60 * Math.max(0, -level))}%`);
  });
  const legend = byId("legend");
  legend.classList.toggle("off", !known.length);
  legend.querySelector(".less").textContent = known.length ? signed(round(low)) : "";
  legend.querySelector(".more").textContent = known.length ? signed(round(high)) : "the next answer is read";
}

const round = (value) => Number(value.toPrecision(2));

// --- the tip -----------------------------------------------------------------------------------

function walk(text, step) {
  const tokens = [...text.querySelectorAll(".read")];
  if (!tokens.length) return;
  const at = Math.max(0, tokens.indexOf(pointed)) + step;
  const token = tokens[Math.max(0, Math.min(tokens.length - 1, at))];
  token.scrollIntoView({ block: "nearest" });
  point(token);
  const read = Object.entries(readings.get(token));
  say(`${token.textContent}: ${read.map(([name, value]) => `${name} ${signed(round(value))}`).join(", ")}`);
}

function point(token) {
  if (token === pointed) return;
  pointed?.classList.remove("pointed");
  pointed = token;
  const tip = byId("tip");
  tip.hidden = !token;
  if (!token) return;
  token.classList.add("pointed");
  const lines = Object.entries(readings.get(token)).map(([name, value]) =>
    el("div", {}, el("span", {}, name), el("b", {}, signed(round(value)))));
  tip.replaceChildren(...lines);
  place(tip, token.getClientRects()[0] ?? token.getBoundingClientRect());
}

function place(tip, { left, top, bottom }) {
  const size = tip.getBoundingClientRect();
  const above = top - size.height - 6;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - size.width - 4))}px`;
  tip.style.top = `${above > 4 ? above : bottom + 6}px`;
}
