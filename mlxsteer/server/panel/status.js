// The line about the model: what it is, its memory, its load, and whether the server is there.

import { getStatus } from "./api.js";
import { button, byId, el } from "./dom.js";

const PACE = 2500;

/** Show the line, and keep it true. `back` is called when the server is there again. */
export async function start(back) {
  let gone = false;
  const first = await getStatus();
  show(first);
  setInterval(async () => {
    if (document.hidden) return;
    try {
      show(await getStatus(true));
      if (gone) back();
      gone = false;
    } catch (error) {
      gone = true;
      fail(error.status ? error.message : "Server not reached");
    }
  }, PACE);
  return first;
}

/** Say what is wrong in place of the line, with a button if there is something to do. */
export function fail(message, action, act) {
  const actions = action ? [button(action, act)] : [];
  byId("status").replaceChildren(el("b", { class: "bad" }, message), ...actions);
}

function show(status) {
  const { running, prefilling, queued } = status;
  const busy = running + prefilling;
  const facts = [
    [`${status.n_layers} layers`, "rare"],
    [`${size(status.active_memory)} in use`, ""],
    [`peak ${size(status.peak_memory)}`, "rare"],
    [status.context_length && `context ${status.context_length.toLocaleString("en")}`, "rare"],
    [busy ? `${busy} writing${queued ? `, ${queued} waiting` : ""}, ${status.tokens_per_second.toFixed(0)} tokens/s` : "idle", ""],
  ];
  const shown = facts.filter(([text]) => text).map(([text, kind]) => el("span", { class: kind }, text));
  byId("status").replaceChildren(el("b", {}, status.model), ...shown);
}

function size(bytes) {
  const gib = bytes / 2 ** 30;
  return gib >= 1 ? `${gib.toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
}
