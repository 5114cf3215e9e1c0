// One slider: its elements, its keys, and how it shows what is set of its vector.

import { el } from "./dom.js";
import { shown, signed } from "./grammar.js";
import * as meters from "./meters.js";
import * as steering from "./steering.js";

const REACH = 5;
const STEP = { fine: 0.1, key: 0.5, page: 1 }; // of a reach of 5; smaller reaches scale them
const NOTE = "Arrow keys move by 0.5, with Shift by 0.1; Home and double-click: 0.";

export class Row {
  /** `title`: what it is called on the page; `foot`: what stands below it in place of the poles. */
  constructor(vector, title = [vector.name], foot = null) {
    this.vector = vector;
    this.reach = vector.op === "project" ? 1 : REACH;
    const id = `slider-${vector.name.replace(/\s/g, "_")}`;
    this.range = el("input", {
      type: "range", id, min: -this.reach, max: this.reach, step: (STEP.fine * this.reach) / REACH, value: 0,
      title: NOTE, "aria-describedby": `${id}-note`,
    });
    this.readout = el("output", { htmlFor: id });
    const badges = vector.safe_max === null ? [el("span", { class: "badge", title: vector.verdict }, "uncalibrated")] : [];
    const beside = foot ? [] : [...badges, meters.toggle(vector.name)];
    this.box = el(
      "div",
      { class: "row", data: { name: vector.name } },
      el("div", { class: "head" }, el("label", { htmlFor: id, title: factsOf(vector) }, ...title), ...beside, this.readout),
      this.range,
      foot ? el("div", { class: "foot" }, ...badges, ...foot) : poles(vector),
      el("p", { class: "unseen", id: `${id}-note` }, factsOf(vector)),
    );
    this.mark();
    this.listen();
    this.refresh();
  }

  /** Where on the track answers are known to stay coherent. */
  mark() {
    const { vector, reach, box } = this;
    const share = (value) => `${(50 * (value + reach)) / reach}%`;
    box.classList.toggle("unsure", vector.safe_max === null);
    box.style.setProperty("--from", share(Math.max(-reach, vector.safe_min ?? -reach)));
    box.style.setProperty("--to", share(Math.min(reach, vector.safe_max ?? reach)));
  }

  listen() {
    const { vector, range, reach } = this;
    const to = (value) => steering.set(vector.name, Math.max(-reach, Math.min(reach, Number(shown(value)))));
    range.addEventListener("input", () => to(range.valueAsNumber));
    range.addEventListener("dblclick", () => to(0));
    range.addEventListener("keydown", (event) => {
      const moved = byKey(event, range.valueAsNumber, reach);
      if (moved === null) return;
      event.preventDefault();
      to(moved);
    });
  }

  /** Show the steering in force. */
  refresh() {
    const { box, range, readout, reach, vector } = this;
    const amount = steering.amountOf(vector.name);
    const more = steering.hasMore(vector.name);
    range.value = amount;
    readout.value = signed(amount) + (more ? " …" : "");
    const label = amount < 0 ? vector.negative_label : vector.positive_label;
    range.setAttribute("aria-valuetext", `${signed(amount)}${amount && label ? `, ${label}` : ""}`);
    box.classList.toggle("active", amount !== 0 || more);
    box.classList.toggle("beyond", amount < (vector.safe_min ?? -reach) || amount > (vector.safe_max ?? reach));
    const share = 50 + (50 * Math.max(-reach, Math.min(reach, amount))) / reach;
    box.style.setProperty("--low", `${Math.min(50, share)}%`);
    box.style.setProperty("--high", `${Math.max(50, share)}%`);
  }
}

const poles = ({ negative_label: less, positive_label: more }) =>
  el("div", { class: "poles", "aria-hidden": "true" }, el("span", {}, less ?? "less"), el("span", {}, more ?? "more"));

function factsOf(vector) {
  const said = vector.evaluation?.sentence;
  return [vector.description, vector.verdict, said && `Evaluated: ${said}.`].filter(Boolean).join(" ");
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
