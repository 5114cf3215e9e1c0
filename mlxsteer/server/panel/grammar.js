// The steering text, as far as sliders need it: names and amounts; suffixes are kept as they are.
// The server's own parser has the last word.

const NUMBER = /^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([dr]?)\s*$/i;
const PLAIN = /^[^\s",@:][^",@:]*$/;

/** Terms {name, amount, unit, suffix} of a text. Throws an Error that says what is wrong. */
export function parse(text) {
  if (["", "off"].includes(text.trim().toLowerCase())) return [];
  return split(text, ",").map(termOf);
}

/** The text of terms. */
export const format = (terms) =>
  terms
    .map(({ name, amount, unit, suffix }) => `${quoted(name)}:${shown(amount)}${unit}${suffix}`)
    .join(", ");

/** A number without digits that mean nothing. */
export const shown = (amount) => String(Math.round(amount * 1e4) / 1e4);

/** A number with its sign. */
export const signed = (amount) => (amount > 0 ? "+" : "") + shown(amount).replace("-", "−");

const quoted = (name) => (PLAIN.test(name) ? name : `"${name}"`);

/** Pieces between `mark`s that stand outside quotes. */
function split(text, mark) {
  const pieces = [""];
  let inside = false;
  for (const letter of text) {
    if (letter === '"') inside = !inside;
    if (letter === mark && !inside) pieces.push("");
    else pieces[pieces.length - 1] += letter;
  }
  if (inside) throw new Error("A quote is never closed.");
  return pieces;
}

function termOf(piece) {
  const [body, ...suffixes] = split(piece.trim(), "@");
  if (!body.trim()) throw new Error("A term is missing between commas.");
  const suffix = suffixes.map((text) => `@${text}`).join("");
  const [name, ...rest] = split(body, ":");
  if (!rest.length) return { name: bare(name), amount: 1, unit: "", suffix };
  const found = NUMBER.exec(rest.join(":"));
  if (!found) throw new Error(`“${rest.join(":").trim()}” is not a strength. Type a number, such as 3 or -1.5.`);
  return { name: bare(name), amount: Number(found[1]), unit: found[2], suffix };
}

function bare(name) {
  const plain = name.trim().replace(/^"(.*)"$/, "$1").trim();
  if (!plain) throw new Error("A name is missing before “:”.");
  return plain;
}
