// One answer on the page: its text as Markdown of which every token is an element, its thought,
// marks where the steering changed, what went wrong, and a line about how it was made.

import { button, el, say } from "./dom.js";
import * as meters from "./meters.js";
import { Prose } from "./prose.js";

export class Answer {
  /** An empty answer under `steer`, appended to `parent`. */
  constructor(parent, steer) {
    this.text = el("div", { class: "text", role: "group", "aria-label": "Answer" });
    this.below = el("div", { class: "below" });
    this.box = el("article", { class: "answer waiting" }, this.text, this.below);
    parent.append(this.box);
    this.prose = new Prose(this.text, (from, to) => this.tokensIn(from, to));
    this.pieces = []; // of each character, the piece of text that it came in
    this.tokens = new Map(); // the elements of tokens, by where they begin
    this.marks = [];
    this.steers = [steer];
    this.content = "";
    this.unsaid = "";
    this.count = 0;
    this.begun = null;
  }

  /** Take in a chunk of the stream. */
  add(chunk) {
    if (chunk.usage) this.count = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { content, reasoning_content: thought } = choice.delta;
    if (thought) this.think(thought);
    if (content) this.write(content, choice);
    this.finish = choice.finish_reason ?? this.finish;
  }

  think(piece) {
    this.start();
    if (!this.thought) {
      this.thought = el("p");
      this.summary = el("summary", {}, "Thinking…");
      this.box.prepend(el("details", { class: "thought" }, this.summary, this.thought));
      this.thinking = performance.now();
    }
    this.thought.append(piece);
  }

  write(piece, { steer, readings }) {
    this.start();
    if (this.thinking) {
      this.summary.textContent = `Thought for ${seconds(this.thinking)}`;
      this.thinking = null;
    }
    if (steer !== undefined && steer !== this.steers.at(-1)) this.mark(steer);
    const came = { end: this.content.length + piece.length, readings };
    while (this.pieces.length < came.end) this.pieces.push(came);
    this.content += piece;
    if (readings?.length) this.text.tabIndex = 0;
    this.due = this.marks.filter((mark) => !(mark.shown < this.prose.from));
    this.prose.update(this.content);
    this.tell(piece);
  }

  start() {
    this.begun ??= performance.now();
    this.box.classList.remove("waiting");
    this.box.classList.add("writing");
  }

  /** From here on the text is under another steering. */
  mark(steer) {
    const said = `From here on: ${steer || "no steering"}`;
    this.steers.push(steer);
    const sign = el("span", { class: "mark", role: "img", title: said, "aria-label": said, data: { steer } });
    this.marks.push({ at: this.content.length, sign });
  }

  /** The elements of a stretch of the text: its tokens, after marks that are due before them. */
  tokensIn(from, to) {
    const made = [];
    for (let at = from; at < to; at = Math.min(to, this.pieces[at].end)) {
      for (; this.due[0]?.at <= at; this.due.shift()) {
        this.due[0].shown = at;
        made.push(this.due[0].sign);
      }
      made.push(this.token(at, Math.min(to, this.pieces[at].end)));
    }
    return made;
  }

  token(from, to) {
    if (!this.tokens.has(from)) {
      this.tokens.set(from, el("span"));
      meters.attach(this.tokens.get(from), this.pieces[from].readings);
    }
    const token = this.tokens.get(from);
    const text = this.content.slice(from, to);
    if (token.textContent !== text) token.textContent = text;
    return token;
  }

  /** Screen readers hear whole sentences rather than tokens. */
  tell(piece) {
    this.unsaid += piece;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.unsaid.lastIndexOf(mark)));
    if (end < 40) return;
    say(this.unsaid.slice(0, end + 1));
    this.unsaid = this.unsaid.slice(end + 1);
  }

  /** The answer is over; `how` says why where the model did not end it itself. */
  end(how, limit) {
    this.box.classList.remove("waiting", "writing");
    if (this.thinking) this.summary.textContent = `Thought for ${seconds(this.thinking)}`;
    if (this.unsaid.trim()) say(this.unsaid);
    const facts = [this.steers.map((steer) => steer || "unsteered").join(" → ")];
    if (this.count) facts.push(`${this.count} tokens`, this.speed());
    if (how) facts.push(how);
    else if (this.finish === "length") facts.push(`cut at ${limit} tokens`);
    this.below.prepend(el("p", { class: "facts" }, facts.filter(Boolean).join(" · ")));
  }

  speed() {
    const took = (performance.now() - this.begun) / 1000;
    return this.begun && took > 0.2 ? `${(this.count / took).toFixed(1)} tokens/s` : "";
  }

  /** Say what the server warned of. */
  warn(warnings) {
    this.below.append(...warnings.map((warning) => el("p", { class: "note" }, warning)));
  }

  /** Say what went wrong, with buttons {text: act}. */
  fail(message, buttons = {}) {
    this.box.classList.remove("waiting", "writing");
    const actions = Object.entries(buttons).map(([text, act]) => button(text, act));
    const told = el("div", { class: "error", role: "alert" }, el("p", {}, message), ...actions);
    this.below.append(told);
    return told;
  }
}

const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(1)} s`;
