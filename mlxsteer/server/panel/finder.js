// The search for features: by words of labels, tokens and snippets, page by page.

import { getFeatures } from "./api.js";
import { button, byId, debounced, el } from "./dom.js";
import * as features from "./features.js";

const PAUSE = 250; // ms without a key until the words are searched for
const PROMOTED = 5; // tokens that stand for a feature without a label
let running = null;

/** Listen to the field, and to features that come into use. */
export function start() {
  byId("feature-words").addEventListener("input", debounced(() => search(), PAUSE));
  byId("more-features").addEventListener("click", more);
  features.follow(refresh);
}

/** Find what the field says. */
export async function search() {
  const found = await ask(0);
  if (!found) return;
  byId("found").replaceChildren(...found.features.map(item));
  show(found);
}

async function more() {
  const before = byId("found").childElementCount;
  const found = await ask(before);
  if (!found) return;
  byId("found").append(...found.features.map(item));
  show(found);
  byId("found").children[before]?.querySelector("button").focus();
}

/** What the server finds; nothing where it could not, or other words were typed meanwhile. */
async function ask(offset) {
  running?.abort();
  const mine = (running = new AbortController());
  byId("found").setAttribute("aria-busy", true);
  note("Searching…");
  try {
    return await getFeatures(words(), offset, mine.signal);
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return null;
    byId("found").replaceChildren();
    byId("more-features").hidden = true;
    note(el("span", { class: "bad" }, error.message), " ", button("Try again", search));
    return null;
  } finally {
    if (mine === running) byId("found").setAttribute("aria-busy", false);
  }
}

const words = () => byId("feature-words").value.trim();
const note = (...said) => byId("feature-note").replaceChildren(...said);

function show({ saes, without_index: lacking, more }) {
  byId("more-features").hidden = !more;
  const count = byId("found").childElementCount;
  const said = [];
  if (!saes.length) said.push("This model has no dictionary of features. Train one, or take one in: mlxsteer sae --help");
  else if (count) said.push(`${more ? "The first " : ""}${count} ${count === 1 ? "feature" : "features"}.`);
  else if (saes.length > lacking.length) said.push(words() ? `No feature matches “${words()}”.` : "No feature fires.");
  for (const name of lacking) said.push(`${name} cannot be searched yet: mlxsteer sae index ${name}`);
  note(said.join(" "));
}

// --- one feature -----------------------------------------------------------------------------------

function item({ name, label, detected, density, promoted, snippets }) {
  const tokens = promoted.map((token) => token.trim()).filter(Boolean).slice(0, PROMOTED).join(" ");
  const toggle = button("Add", () => flip(toggle, name), { data: { feature: name } });
  toggle.about = `${name}, ${label ?? tokens}`;
  press(toggle);
  const facts = [`fires on ${share(density)} of states`];
  if (label) facts.push(`label held in ${share(detected)} of tests`, `promotes ${tokens}`);
  return el("li", {},
    el("div", { class: "head" },
      el("span", { class: "what", title: name }, el("b", {}, name.slice(name.indexOf("/") + 1)), " ",
        label ?? el("i", {}, `promotes ${tokens || "nothing"}`)),
      toggle),
    el("p", { class: "facts" }, facts.join(" · ")),
    snippets.length ? el("p", { class: "snippet" }, ...excerpt(tellingOf(snippets))) : "");
}

/** The first snippet with one of the words; the strongest where none has it. */
function tellingOf(snippets) {
  const sought = words().toLowerCase().split(/\s+/).filter(Boolean);
  const holds = ({ before, token, after }) =>
    sought.some((word) => `${before}${token}${after}`.toLowerCase().includes(word));
  return snippets.find(holds) ?? snippets[0];
}

const excerpt = ({ before, token, after }) =>
  [before, el("mark", {}, token.trim() ? token : token.includes("\n") ? "↵" : "␣"), after];

const share = (value) => `${Number((100 * value).toPrecision(2))}%`;

async function flip(toggle, name) {
  if (features.has(name)) return features.drop(name);
  try {
    await features.add(name);
  } catch (error) {
    note(el("span", { class: "bad" }, error.message));
  }
}

const refresh = () => byId("found").querySelectorAll("[data-feature]").forEach(press);

function press(toggle) {
  const used = features.has(toggle.dataset.feature);
  toggle.textContent = used ? "Remove" : "Add";
  toggle.setAttribute("aria-label", `${toggle.textContent} ${toggle.about}`);
}
