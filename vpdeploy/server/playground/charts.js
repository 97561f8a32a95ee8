// What the queue and the batches did in the last minute.

import { byId, drawn, element, named, plural } from "./dom.js";

const SECONDS = 60;
const WIDTH = 240;
const HEIGHT = 56;
const TASKS_TOLD_APART = 8;
const STEP = WIDTH / SECONDS;

const known = new Map(); // second -> what the server says of it
const colours = new Map(); // task -> its colour's number, kept while it is drawn
let current = 0;
let server = null;

const charts = {
  queue: chart("Queue", "images waiting"),
  size: chart("Batch size", "images in a batch"),
  mix: chart("Batch mix", "images by task"),
};
const legend = element("ul", { className: "legend" });

function chart(title, unit) {
  const value = element("span", { className: "value" });
  const peak = element("span", { className: "peak", ariaHidden: "true" });
  const picture = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  const caption = element("figcaption", {}, element("strong", {}, title), element("small", {}, unit), value);
  const figure = element("figure", {}, caption, element("div", { className: "plot" }, picture, peak));
  return { title, unit, value, peak, picture, figure };
}

/** Put the empty charts on the page. */
export function placeCharts() {
  byId("charts").append(charts.queue.figure, charts.size.figure, charts.mix.figure, legend);
  draw({ queue_images: 0, limits: {} });
}

/** The first second that the page wants to hear of. */
export const wantedSecond = () => (server === null ? 0 : Math.max(0, current - 1));

/** Take what the server says of its last seconds, and draw it. */
export function showActivity(activity) {
  if (activity.server !== server) known.clear(); // it was started again
  server = activity.server;
  current = activity.second;
  for (const each of activity.seconds) known.set(each.second, each);
  for (const second of known.keys()) if (second < current - SECONDS) known.delete(second);
  draw(activity);
}

function draw(activity) {
  const seconds = Array.from({ length: SECONDS }, (_, index) => known.get(current - SECONDS + index));
  const last = known.get(current - 1);

  const waiting = seconds.map((each) => each?.waited_s ?? 0);
  show(charts.queue, waiting, 1, [area(waiting, ceiling(waiting, 1))], String(activity.queue_images));

  const sizes = seconds.map((each) => (each?.batches ? total(each.images) / each.batches : 0));
  const top = ceiling(sizes, 4);
  const bars = sizes.map((size, index) => column(index, 0, size / top, "one")).filter(Boolean);
  show(charts.size, sizes, 4, bars, last?.batches ? (total(last.images) / last.batches).toFixed(1) : "–");

  const images = seconds.map((each) => (each ? total(each.images) : 0));
  const { parts, entries } = mixture(seconds, ceiling(images, 4));
  const rate = last ? `${total(last.images)}/s · ${plural(Object.keys(last.images).length, "task")}` : "–";
  show(charts.mix, images, 4, parts, rate);
  legend.replaceChildren(...entries);
}

function show(chart, values, least, shapes, value) {
  const line = drawn("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5, class: "axis" });
  chart.picture.replaceChildren(line, ...shapes);
  chart.value.textContent = value;
  chart.peak.textContent = Math.max(...values) > 0 ? String(ceiling(values, least)) : "";
  const highest = Math.max(...values);
  chart.picture.setAttribute("aria-label", `${chart.title}, ${chart.unit}: now ${value}, at most ${highest.toFixed(1)} in a minute`);
}

const total = (counts) => Object.values(counts).reduce((sum, count) => sum + count, 0);

/** A round number that no value exceeds. */
function ceiling(values, least) {
  const highest = Math.max(least, ...values);
  const power = 10 ** Math.floor(Math.log10(highest));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].map((each) => each * power).find((each) => each >= highest - 1e-9);
}

function area(values, top) {
  const points = values.map((value, index) => `L${((index + 0.5) * STEP).toFixed(1)} ${(HEIGHT - (value / top) * (HEIGHT - 4)).toFixed(1)}`);
  return drawn("path", { class: "area", d: `M0 ${HEIGHT}${points.join("")}L${WIDTH} ${HEIGHT}Z` });
}

function column(index, from, to, colour) {
  if (to <= from) return null;
  const y = HEIGHT - to * (HEIGHT - 4);
  const height = (to - from) * (HEIGHT - 4);
  return drawn("rect", { class: `mix-${colour}`, x: index * STEP + 0.5, y, width: STEP - 1, height });
}

/** Stack the images of each second by task: those with the most in a minute by colour, the rest as one. */
function mixture(seconds, top) {
  const sums = new Map();
  for (const each of seconds) {
    for (const [task, count] of Object.entries(each?.images ?? {})) sums.set(task, (sums.get(task) ?? 0) + count);
  }
  const apart = [...sums].sort((a, b) => b[1] - a[1]).slice(0, TASKS_TOLD_APART).map(([task]) => task);
  for (const task of colours.keys()) if (!apart.includes(task)) colours.delete(task);
  const free = Array.from({ length: TASKS_TOLD_APART }, (_, index) => index).filter((index) => ![...colours.values()].includes(index));
  for (const task of apart) if (!colours.has(task)) colours.set(task, free.shift());
  const parts = [];
  seconds.forEach((each, index) => {
    if (!each) return;
    let base = 0;
    for (const [task, colour] of [...colours, [null, "rest"]]) {
      const count = task === null ? total(each.images) - apart.reduce((sum, name) => sum + (each.images[name] ?? 0), 0) : each.images[task] ?? 0;
      parts.push(column(index, base / top, (base + count) / top, colour));
      base += count;
    }
  });
  const swatch = (colour) => element("span", { className: `swatch mix-${colour}`, ariaHidden: "true" });
  const entries = apart.map((task) => element("li", {}, swatch(colours.get(task)), named("span", task)));
  const rest = sums.size - apart.length;
  if (rest > 0) entries.push(element("li", {}, swatch("rest"), `${rest} more`));
  return { parts: parts.filter(Boolean), entries };
}
