// A conversation in a column: questions, answers, retries, and steering while an answer runs.

import { openAnswer, steerAnswer } from "./api.js";
import { Answer } from "./answer.js";
import { debounced, el } from "./dom.js";
import { Prose } from "./prose.js";

const SETTLE = 120; // ms that a slider must rest before the answer is told

export class Conversation {
  /** A column appended to `parent`; `steer()` gives its steering text at any time, `changed` is
   * called when an answer begins or is over. */
  constructor(parent, steer, changed) {
    this.steer = steer;
    this.changed = changed;
    this.head = el("div", { class: "chooser" });
    this.log = el("div", { class: "log", role: "log", "aria-live": "off", "aria-label": "Chat", tabIndex: 0 });
    this.box = el("section", { class: "column" }, this.head, this.log);
    parent.append(this.box);
    this.messages = [];
    this.running = null;
    this.resteer = debounced((text) => this.pass(text), SETTLE);
  }

  /** Begin where another conversation is. */
  copy(other) {
    this.messages = [...other.messages];
    for (const { role, content } of this.messages) {
      if (role === "user") this.show(content);
      else this.showEarlier(content);
    }
  }

  showEarlier(answer) {
    const text = el("div", { class: "text" });
    new Prose(text).update(answer);
    this.log.append(el("article", { class: "answer earlier" }, text));
  }

  /** Forget everything. */
  clear() {
    if (this.running) this.running.forgotten = true;
    this.stop();
    this.messages = [];
    this.log.replaceChildren();
  }

  show(question) {
    for (const old of this.log.querySelectorAll(".error button")) old.remove();
    this.log.append(el("p", { class: "question" }, question));
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** Ask, and write the answer as it comes. `options`: {model, meter, system, and sampling}. */
  async ask(question, options) {
    this.show(question);
    await this.answer(question, options);
  }

  set(run) {
    this.running = run;
    this.changed();
    return run;
  }

  over(run) {
    if (this.running === run) this.set(null);
  }

  async answer(question, options) {
    const { system, ...fields } = options;
    const asked = { role: "user", content: question };
    const before = system ? [{ role: "system", content: system }] : [];
    const steer = this.steer();
    const answer = new Answer(this.log, steer);
    const run = this.set({ stop: new AbortController(), id: null, steer });
    const again = () => {
      answer.box.remove();
      return this.answer(question, options);
    };
    try {
      await this.write(answer, run, { ...fields, steer, messages: [...before, ...this.messages, asked] });
      answer.end(null, fields.max_tokens);
    } catch (error) {
      if (error.name !== "AbortError") return this.failed(answer, error, again);
      answer.end("stopped");
    } finally {
      this.over(run);
    }
    if (run.forgotten) return;
    if (answer.content) this.messages.push(asked, { role: "assistant", content: answer.content });
    this.follow();
  }

  async write(answer, run, body) {
    const { id, warnings, chunks } = await openAnswer(body, run.stop.signal);
    run.id = id;
    if (this.steer() !== run.steer) this.resteer(this.steer());
    answer.warn(warnings);
    for await (const chunk of chunks) {
      const near = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
      answer.add(chunk);
      if (near) this.follow();
    }
  }

  follow() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** What to do about an error: wait for a place in the queue, or let the user decide. */
  failed(answer, error, again) {
    if (answer.content) answer.end("broken off");
    if (error.status !== 429) {
      answer.fail(error.message, { "Try again": again });
      this.follow();
      return;
    }
    return this.wait(answer, error, again);
  }

  wait(answer, error, again) {
    return new Promise((resolve) => {
      const run = this.set({ stop: new AbortController() });
      const until = performance.now() + 1000 * (error.wait ?? 5);
      const done = (act) => {
        clearInterval(timer);
        this.over(run);
        resolve(act?.());
      };
      const told = answer.fail(error.message, { "Try now": () => done(again) });
      const left = el("span", { class: "left" });
      told.append(left);
      const tick = () => {
        const seconds = Math.ceil((until - performance.now()) / 1000);
        left.textContent = `Trying again in ${Math.max(0, seconds)} s`;
        if (seconds <= 0) done(again);
      };
      const timer = setInterval(tick, 250);
      tick();
      run.stop.signal.addEventListener("abort", () => {
        left.textContent = "Given up.";
        done();
      });
      this.follow();
    });
  }

  /** End the answer that is being written. */
  stop() {
    this.running?.stop.abort();
  }

  /** Tell the running answer its steering from now on. */
  async pass(text) {
    const run = this.running;
    if (!run?.id || text === run.steer) return;
    run.steer = text;
    try {
      const { warnings } = await steerAnswer(run.id, text);
      this.noted(warnings);
    } catch (error) {
      if (error.status !== 409) this.noted([error.message]); // 409: it was just done
    }
  }

  noted(notes) {
    const below = this.log.lastElementChild?.querySelector(".below");
    const said = new Set([...(below?.children ?? [])].map((note) => note.textContent));
    for (const note of notes) if (!said.has(note)) below?.append(el("p", { class: "note" }, note));
  }
}
