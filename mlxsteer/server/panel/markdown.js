// What a text means as Markdown: paragraphs, headings, lists, code, bold, italics. Links, images and
// HTML stay the text that they are. Gives a tree of {tag, from, parts} whose leaves are stretches
// {from, to} of the text, and knows nothing of pages.

const FENCE = /^\s*(`{3,}|~{3,})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(?=\S)/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])[ \t]+(?=\S)/;
const INLINE = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<!`)(?<ticks>`+)(?!`)(?<code>[^]{1,2000}?)(?<!`)\k<ticks>(?!`)/,
  /\*\*(?=\S)(?<strong>[^]{0,2000}?\S)\*\*(?!\*)/,
  /(?<!\w)__(?=\S)(?<strong_>[^]{0,2000}?\S)__(?!\w)/,
  /\*(?=[^\s*])(?<em>[^]{0,2000}?[^\s*])\*(?!\*)/,
  /(?<![\w_])_(?=[^\s_])(?<em_>[^]{0,2000}?[^\s_])_(?!\w)/,
].map((one) => one.source).join("|"), "dg");

function linesOf(text, start) {
  let from = start;
  return text.slice(start).split("\n").map((line) => {
    const found = { line, from, to: from + line.length };
    from = found.to + 1;
    return found;
  });
}

/** The blocks of a text from the character `start` on, where one begins. */
export function blocksOf(text, start) {
  const lines = linesOf(text, start);
  const blocks = [];
  while (lines.length) {
    const { line } = lines[0];
    if (!line.trim()) lines.shift();
    else if (FENCE.test(line)) blocks.push(fenced(lines));
    else if (HEADING.test(line)) blocks.push(heading(text, lines.shift()));
    else if (ITEM.test(line)) blocks.push(...nested(itemsOf(text, lines)));
    else blocks.push(paragraph(text, lines));
  }
  return blocks;
}

function fenced(lines) {
  const { line, from, to } = lines.shift();
  const mark = FENCE.exec(line)[1];
  const closes = (said) => said.startsWith(mark) && !said.replaceAll(mark[0], "");
  const stretch = { from: to + 1, to: to + 1 };
  while (lines.length) {
    const next = lines.shift();
    if (closes(next.line.trim())) break;
    stretch.to = next.to;
  }
  const code = { tag: "code", from: stretch.from, parts: stretch.to > stretch.from ? [stretch] : [] };
  return { tag: "pre", from, parts: [code] };
}

function heading(text, { line, from, to }) {
  const [before, { length: level }] = HEADING.exec(line);
  return { tag: `h${Math.min(6, level + 2)}`, from, parts: inline(text, from + before.length, to) };
}

const opens = (line) => [FENCE, HEADING, ITEM].some((one) => one.test(line));

function paragraph(text, lines) {
  const { from, to } = ended(lines);
  return { tag: "p", from, parts: inline(text, from, to) };
}

/** The first line and those that go on with it. */
function ended(lines) {
  let { from, to } = lines.shift();
  while (lines.length && lines[0].line.trim() && !opens(lines[0].line)) to = lines.shift().to;
  return { from, to };
}

/** Items {indent, from, number, parts} of a list; an indented line after a blank one goes on too. */
function itemsOf(text, lines) {
  const items = [];
  for (;;) {
    const next = lines.findIndex(({ line }) => line.trim());
    if (next < 0) return items;
    const { line } = lines[next];
    const found = ITEM.exec(line);
    if (!found && (opens(line) || !items.length || !/^\s{2}/.test(line))) return items;
    lines.splice(0, next);
    const { from, to } = ended(lines);
    if (found) items.push({ indent: found[1].length, from, number: found[2], parts: inline(text, from + found[0].length, to) });
    else items.at(-1).parts.push({ tag: "p", from, parts: inline(text, from, to) });
  }
}

/** Lists of items, those that are indented more inside the one before. */
function nested(items) {
  const lists = [];
  while (items.length) {
    const { indent, from, number, parts } = items.shift();
    const deeper = items.findIndex((item) => item.indent <= indent + 1);
    const under = items.splice(0, deeper < 0 ? items.length : deeper);
    const tag = number === undefined ? "ul" : "ol";
    const start = number && Number(number);
    if (lists.at(-1)?.tag !== tag) lists.push({ tag, from, start, parts: [] });
    lists.at(-1).parts.push({ tag: "li", from, parts: [...parts, ...nested(under)] });
  }
  return lists;
}

function inline(text, start, end) {
  const parts = [];
  let from = start;
  for (const { indices } of text.slice(start, end).matchAll(INLINE)) {
    const { ticks, ...groups } = indices.groups;
    const [name, inside] = Object.entries(groups).find(([, at]) => at);
    const [first, past] = inside.map((at) => start + at);
    parts.push({ from, to: start + indices[0][0] });
    if (name === "escaped") parts.push({ from: first, to: past });
    else {
      const tag = name.replace("_", "");
      const held = tag === "code" ? [{ from: first, to: past }] : inline(text, first, past);
      parts.push({ tag, from: start + indices[0][0], parts: held });
    }
    from = start + indices[0][1];
  }
  parts.push({ from, to: end });
  return parts.filter((part) => part.tag || part.to > part.from);
}
