// Named steering texts that this browser keeps, for each model its own.

import { button, byId, el, kept } from "./dom.js";
import * as steering from "./steering.js";

const store = kept("mlxsteer.presets", {});
const followers = new Set();
let model = "";

/** {name: steering text} of the served model. */
export const all = () => store.read()[model] ?? {};

/** Call `act` whenever they change. */
export const follow = (act) => followers.add(act);

/** Show those of a model. */
export function start(served) {
  model = served;
  draw();
}

function keep(changed) {
  store.write({ ...store.read(), [model]: changed });
  draw();
}

function draw() {
  const chips = Object.entries(all()).map(([name, text]) =>
    el("span", { class: "chip" },
      button(name, () => steering.setText(text), { title: text || "no steering" }),
      button("×", () => drop(name), { class: "drop", "aria-label": `Forget ${name}`, title: `Forget ${name}` })));
  byId("presets").replaceChildren(...chips, button("Save preset…", name, { class: "quiet" }));
  for (const act of followers) act();
}

function drop(name) {
  const { [name]: _, ...others } = all();
  keep(others);
}

/** Ask for a name where the button was. */
function name() {
  const input = el("input", { type: "text", maxLength: 40, required: true, placeholder: "name", "aria-label": "Name of the preset" });
  const form = el("form", { class: "naming" }, input, el("button", { type: "submit" }, "Save"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const given = input.value.trim();
    if (given) keep({ ...all(), [given]: steering.text() });
  });
  input.addEventListener("keydown", (event) => event.key === "Escape" && draw());
  byId("presets").lastElementChild.replaceWith(form);
  input.focus();
}
