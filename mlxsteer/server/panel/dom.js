// Making and finding elements, and saying things to screen readers.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `on`, `data` and aria- attributes included) and children. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name === "on") for (const [kind, f] of Object.entries(value)) made.addEventListener(kind, f);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A button that does `act`. */
export const button = (text, act, properties = {}) =>
  el("button", { type: "button", ...properties, on: { click: act } }, text);

/** Let a screen reader say `text` when it is done with what it is saying. */
export function say(text) {
  byId("said").append(el("p", {}, text));
  while (byId("said").childElementCount > 4) byId("said").firstChild.remove();
}

/** `act`, `wait` ms after the last of a row of calls. */
export function debounced(act, wait) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...given), wait);
  };
}

/** Read and write one JSON value that this browser keeps. */
export function kept(key, otherwise) {
  return {
    read() {
      try {
        return JSON.parse(localStorage.getItem(key)) ?? otherwise;
      } catch {
        return otherwise; // written by something else
      }
    },
    write: (value) => localStorage.setItem(key, JSON.stringify(value)),
  };
}
