// Elements from text. Labels and names of tasks come from files that anybody may have written, so nothing here, or
// anywhere on this page, ever turns a string into markup.

export const byId = (id) => document.getElementById(id);

/** Make an element with properties and children; a string child becomes text. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Make an SVG element with attributes and children. */
export function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const LONGEST_SHOWN = 160;
const LONGEST_TITLE = 1000;

// Control characters, and those that turn the direction of writing round to make a text read as another.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** Make an element that shows a foreign name: cut where it is long, with the whole in its title. */
export function named(tag, foreign, className = "") {
  const text = foreign.replace(UNSEEN, " ");
  const letters = Array.from(text.slice(0, LONGEST_TITLE)); // whole characters, not halves of pairs
  const shown = letters.length > LONGEST_SHOWN ? `${letters.slice(0, LONGEST_SHOWN).join("")}…` : text.trim() || "(no name)";
  const made = element(tag, { className: `name ${className}`, title: text.slice(0, LONGEST_TITLE), dir: "auto" });
  made.textContent = shown;
  return made;
}

/** Say something to those who listen to the page instead of looking at it. */
export function speak(sentence) {
  byId("spoken").textContent = sentence;
}

export function showAlert(sentence) {
  byId("alert-text").textContent = sentence;
  byId("alert").hidden = false;
}

export function hideAlert() {
  byId("alert").hidden = true;
  byId("alert-text").textContent = "";
}

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export function bytesText(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(bytes < 1e4 ? 1 : 0)} kB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

export const percentText = (share) => `${(100 * share).toFixed(1)} %`;

export const timeText = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(2)} s`);
