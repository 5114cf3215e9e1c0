// Vectors of one's own: two instructions in, progress, then a slider.

import { cancelJob, getJob, getJobs, makeVector } from "./api.js";
import { button, byId, el, say } from "./dom.js";

const PACE = 700; // ms between two looks at a job
const watched = new Set();
let whenMade = async () => {};

/** Listen to the form. `made(name)` is called when a vector is done. */
export function start(made) {
  whenMade = made;
  const dialog = byId("maker");
  const form = dialog.querySelector("form");
  byId("make").addEventListener("click", () => {
    tell("");
    dialog.showModal();
  });
  form.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const given = new FormData(form);
    const body = { name: given.get("name"), positive: given.get("positive"), negative: given.get("negative"), calibrate: given.has("calibrate") };
    if (!(await begin(body, tell))) return;
    form.reset();
    dialog.close();
  });
}

/** Show the jobs that run already. */
export async function resume() {
  for (const job of await getJobs()) if (!over(job) && !watched.has(job.id)) watch(job);
}

/** Make the vector of a contrast set. */
export const ofSet = (name) => begin({ name }, (message) => card(name).fail(message));

const tell = (message) => (byId("maker").querySelector(".note").textContent = message);

async function begin(body, failed) {
  try {
    watch(await makeVector(body));
    return true;
  } catch (error) {
    failed(error.message);
    return false;
  }
}

const over = ({ state }) => !["queued", "running"].includes(state);

async function watch(job) {
  watched.add(job.id);
  const shown = card(job.name, () => cancelJob(job.id).catch((error) => shown.fail(error.message)));
  while (!over(job)) {
    shown.show(job);
    await new Promise((done) => setTimeout(done, PACE));
    job = await getJob(job.id).catch((error) => {
      if (error.status === 0) return job; // the server is away; look again
      return { ...job, state: "failed", error: error.message };
    });
  }
  if (job.state === "done") {
    await whenMade(job.name);
    shown.done(job.vector?.verdict ?? "");
  } else if (job.state === "failed") shown.fail(job.error);
  else shown.remove();
}

/** A card with the progress of one job. */
function card(name, cancel) {
  const bar = el("progress", { "aria-label": `Progress of ${name}` });
  const stage = el("p", { class: "note" }, "Waiting…");
  const close = button("Cancel", () => (close.disabled = !!cancel?.()), { class: "quiet" });
  const box = el("div", { class: "job" }, el("div", { class: "head" }, el("b", {}, name), close), bar, stage);
  byId("jobs").append(box);
  const end = (text, kind) => {
    bar.remove();
    stage.textContent = text;
    stage.className = `note ${kind}`;
    const gone = button("Close", () => box.remove(), { class: "quiet" });
    close.replaceWith(gone);
    say(`${name}: ${text}`);
  };
  return {
    remove: () => box.remove(),
    fail: (message) => end(message, "bad"),
    done: (verdict) => end(`Ready. ${verdict}`, "good"),
    show({ state, stage: what, done, total }) {
      stage.textContent = state === "queued" ? "Waiting…" : `${what}${total ? `: ${done} of ${total}` : "…"}`;
      if (total) Object.assign(bar, { max: total, value: done });
      else bar.removeAttribute("value");
    },
  };
}
