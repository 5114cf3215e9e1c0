// The page: wires its parts together, and owns the question field, the key dialog and the drawer.

import { whenKeyIsNeeded } from "./api.js";
import * as compare from "./compare.js";
import * as create from "./create.js";
import { byId, say } from "./dom.js";
import * as features from "./features.js";
import * as finder from "./finder.js";
import * as meters from "./meters.js";
import * as presets from "./presets.js";
import * as sliders from "./sliders.js";
import * as status from "./status.js";
import * as steering from "./steering.js";
import * as tabs from "./tabs.js";

const RETRY = 3000; // ms until a server that was not there is tried again
let served = null;

// --- asking --------------------------------------------------------------------------------------

const running = () => compare.all().some((conversation) => conversation.running);

function stop() {
  for (const conversation of compare.all()) conversation.stop();
}

/** The fields of a request that the form holds. */
function options() {
  const given = new FormData(byId("options"));
  const temperature = Number(given.get("temperature"));
  const seed = given.get("seed") || Math.floor(Math.random() * 2 ** 31);
  return {
    model: served.model,
    system: given.get("system").trim(),
    temperature,
    max_tokens: Number(given.get("max_tokens")) || 512,
    meter: meters.names(),
    ...(temperature > 0 && { seed: Number(seed) }),
    ...(given.has("think") && { chat_template_kwargs: { enable_thinking: true } }),
  };
}

function ask(event) {
  event?.preventDefault();
  const field = byId("question");
  const question = field.value.trim();
  if (!question || running() || !served || !byId("options").reportValidity()) return;
  field.value = "";
  fit();
  const asked = options();
  for (const conversation of compare.all()) conversation.ask(question, asked);
}

function refresh() {
  byId("send").hidden = running();
  byId("stop").hidden = !running();
}

/** The field grows with what is typed. */
function fit() {
  const field = byId("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
}

function listenToQuestions() {
  byId("ask").addEventListener("submit", ask);
  byId("stop").addEventListener("click", stop);
  byId("question").addEventListener("input", fit);
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
  });
  byId("clear").addEventListener("click", () => {
    for (const conversation of compare.all()) conversation.clear();
    byId("question").focus();
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (running()) stop();
    else drawer(false);
  });
}

// --- the steering text -----------------------------------------------------------------------------

function problemOf(name) {
  if (features.isFeature(name)) return features.problem(name);
  return sliders.has(name) ? "" : `There is no vector called “${name}” for this model.`;
}

function listenToSteering() {
  const field = byId("steer");
  const note = byId("steer-note");
  const tell = () => {
    note.textContent = steering.names().map(problemOf).find(Boolean) ?? "";
  };
  features.follow(tell);
  steering.follow((text) => {
    if (document.activeElement !== field) field.value = text;
    const count = steering.names().length;
    byId("open").textContent = count ? `Sliders (${count})` : "Sliders";
    tell();
  });
  field.addEventListener("input", () => {
    try {
      steering.setText(field.value);
      tell();
    } catch (error) {
      note.textContent = error.message;
    }
  });
  field.addEventListener("blur", () => !note.textContent && (field.value = steering.text()));
  byId("reset").addEventListener("click", () => {
    steering.setText("");
    field.value = note.textContent = "";
  });
  byId("copy").addEventListener("click", copy);
}

async function copy() {
  const field = byId("steer");
  try {
    await navigator.clipboard.writeText(steering.text());
  } catch {
    field.select(); // no clipboard without https on another machine: ⌘C does it
    return;
  }
  byId("copy").textContent = "Copied";
  say("Copied");
  setTimeout(() => (byId("copy").textContent = "Copy"), 1200);
}

// --- the key and the drawer ------------------------------------------------------------------------

function askForKey() {
  const dialog = byId("key");
  const form = dialog.querySelector("form");
  form.reset();
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? form.elements.key.value.trim() : null), { once: true });
    dialog.returnValue = "";
    form.querySelector("[value=cancel]").onclick = () => dialog.close("");
  });
}

function drawer(open) {
  document.body.classList.toggle("drawn", open);
  byId("open").setAttribute("aria-expanded", open);
}

// --- the start -------------------------------------------------------------------------------------

const loadSliders = () => sliders.load(create.ofSet);

async function made(name) {
  await loadSliders();
  byId("tab-vectors").click();
  sliders.show(name);
}

/** Features are searched for when they are first looked at. */
function look(part) {
  if (part === "features" && !byId("found").childElementCount) finder.search();
}

async function begin() {
  if (!served) {
    served = await status.start(() => begin().catch(failed));
    document.title = `${served.model} · mlxsteer`;
    byId("think").hidden = !served.can_think;
    presets.start(served.model);
    steering.setText(served.steer);
  }
  await loadSliders();
  await features.load(served.model);
  await create.resume();
}

function failed(error) {
  if (error.status === 401) return status.fail("API key needed", "Enter it", () => begin().catch(failed));
  status.fail(error.status ? error.message : "Server not reached");
  setTimeout(() => begin().catch(failed), RETRY);
}

whenKeyIsNeeded(askForKey);
meters.start();
sliders.start();
features.start();
finder.start();
tabs.start(document.querySelector("[role=tablist]"), look);
create.start(made);
listenToQuestions();
listenToSteering();
compare.start(refresh);
byId("open").addEventListener("click", () => drawer(!document.body.classList.contains("drawn")));
begin().catch(failed);
