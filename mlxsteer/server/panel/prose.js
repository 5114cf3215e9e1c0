// A text on the page as Markdown, which may grow: elements that are there stay, and only what is new
// is added. Elements are made one by one and hold text as text, so nothing in it becomes markup.

import { el } from "./dom.js";
import { blocksOf } from "./markdown.js";

export class Prose {
  /** Writes into `box`. `leaf(from, to)` gives the nodes of a stretch of the text. */
  constructor(box, leaf) {
    this.box = box;
    this.leaf = leaf ?? ((from, to) => [document.createTextNode(this.text.slice(from, to))]);
    this.from = 0; // where the blocks begin that more text can still change
    this.settled = [];
    this.made = new Map();
  }

  /** Show a text that begins with the one shown before. */
  update(text) {
    this.text = text;
    const blocks = blocksOf(text, this.from);
    const shown = blocks.map((block) => this.node(block));
    fill(this.box, [...this.settled, ...shown]);
    // Only a whole first line says what a block is.
    const sure = blocks.findLastIndex(({ from }) => text.indexOf("\n", from) >= 0);
    if (sure < 1) return;
    this.settled.push(...shown.slice(0, sure));
    this.from = blocks[sure].from;
  }

  node({ tag, from, start, parts }) {
    const key = `${tag} ${from}`;
    if (!this.made.has(key)) this.made.set(key, el(tag, start === undefined ? {} : { start }));
    const made = this.made.get(key);
    fill(made, parts.flatMap((part) => (part.tag ? [this.node(part)] : this.leaf(part.from, part.to))));
    return made;
  }
}

/** Make `nodes` the children, touching only what differs. */
function fill(parent, nodes) {
  nodes.forEach((node, index) => {
    const there = parent.childNodes[index];
    if (there !== node) parent.insertBefore(node, there ?? null);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}
