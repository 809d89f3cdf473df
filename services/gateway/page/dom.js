/** Elements, numbers and words of the page. What a model or a file says is text here, and never becomes markup. */

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element. `attributes` may hold `text`, and functions under the name of an event ("click"). */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** A new element of a drawing. */
export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") element.textContent = value;
    else if (typeof value === "function") element.addEventListener(key, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Has a screen reader say something, once. */
export function say(words) {
  byId("said").textContent = words;
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (number) => new Intl.NumberFormat("en", { maximumFractionDigits: 0 }).format(number);

/** A share of 1 as percent: one decimal below ten, where it says something. */
export function percent(share) {
  const value = 100 * share;
  return `${value < 10 && value > 0 ? plain.format(value) : count(value)} %`;
}

/** Bytes in the unit that suits them. */
export function bytes(number) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (number >= size) return `${plain.format(number / size)} ${unit}`;
  }
  return `${count(number)} bytes`;
}

/** Milliseconds as a person reads them. */
export const duration = (ms) => (ms < 1000 ? `${count(ms)} ms` : `${plain.format(ms / 1000)} s`);

export const rate = (number) => (number < 10 ? plain.format(number) : count(number));
