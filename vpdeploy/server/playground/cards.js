// The answers: one card a task, side by side.

import { byId, element, named, percentText, plural, timeText } from "./dom.js";

const CARDS_AT_ONCE = 24;

let cardsShown = CARDS_AT_ONCE;

/** Show fewer or more cards from now on. */
export function showMoreCards() {
  cardsShown += CARDS_AT_ONCE;
}

export function showFirstCards() {
  cardsShown = CARDS_AT_ONCE;
}

/**
 * Draw the cards of `tasks`, reusing those that have not changed, so that focus and reading position stay.
 * An answer is `{key, state: "asking" | "answered" | "failed", ms, version, predictions}`, or undefined; one that is asked
 * for again shows the predictions that it had.
 */
export function drawCards(tasks, answers, { hasImage, onAsk, emptyText }) {
  const grid = byId("cards");
  const old = new Map([...grid.children].map((card) => [card.dataset.task, card]));
  const shown = tasks.slice(0, cardsShown);
  const fresh = shown.map((task) => {
    const answer = answers.get(task.task);
    const key = `${task.version}/${hasImage}/${answer?.key ?? 0}/${answer?.state ?? ""}`;
    const known = old.get(task.task);
    if (known?.dataset.key === key) return known;
    const focused = known?.contains(document.activeElement);
    const card = cardOf(task, answer, hasImage, onAsk);
    card.dataset.task = task.task;
    card.dataset.key = key;
    if (known) {
      known.replaceWith(card);
      if (focused) card.querySelector("button")?.focus();
    }
    return card;
  });
  const same = fresh.length === grid.children.length && fresh.every((card, index) => grid.children[index] === card);
  if (!same) grid.replaceChildren(...fresh);
  const left = tasks.length - shown.length;
  byId("more").hidden = left <= 0;
  byId("more").textContent = `Show ${Math.min(left, CARDS_AT_ONCE)} more of ${plural(tasks.length, "task")}`;
  byId("cards-empty").hidden = tasks.length > 0;
  byId("cards-empty").textContent = emptyText;
}

function cardOf(task, answer, hasImage, onAsk) {
  const title = named("h3", task.task);
  const head = element("header", {}, title);
  if (answer?.ms !== undefined) {
    head.append(element("span", { className: "time", title: "From sending the request to its answer" }, timeText(answer.ms)));
  }
  if (hasImage) {
    const again = element("button", { className: "icon", type: "button", title: "Ask this task alone" }, "↻");
    again.setAttribute("aria-label", `Ask ${task.task} alone`);
    again.disabled = answer?.state === "asking";
    again.addEventListener("click", () => onAsk(task.task));
    head.append(again);
  }
  const facts = [`version ${answer?.version ?? task.version}`, plural(task.classes, "class").replace("classs", "classes")];
  if (task.val_accuracy !== null && task.val_accuracy !== undefined) facts.push(`${percentText(task.val_accuracy)} accurate`);
  const card = element("article", { className: `card ${answer?.state ?? "idle"}` }, head, body(answer, hasImage));
  card.append(element("footer", {}, facts.join(" · ")));
  card.setAttribute("aria-busy", String(answer?.state === "asking"));
  card.setAttribute("aria-label", task.task);
  return card;
}

function body(answer, hasImage) {
  if (!answer) return element("p", { className: "note" }, hasImage ? "Not asked yet." : "Waiting for an image.");
  if (answer.state === "failed") return element("p", { className: "error" }, "Not answered.");
  if (!answer.predictions) {
    const rows = [90, 60, 40].map((width) => {
      const bar = element("span", { className: "skeleton" });
      bar.style.width = `${width}%`;
      return bar;
    });
    return element("div", { className: "skeletons" }, element("span", { className: "unseen" }, "Asking"), ...rows);
  }
  const rows = answer.predictions.map((each) => {
    const bar = element("span", { className: "fill" });
    bar.style.width = `${Math.max(0, Math.min(1, each.probability)) * 100}%`;
    return element(
      "li",
      {},
      named("span", each.label, "label"),
      element("span", { className: "percent" }, percentText(each.probability)),
      element("span", { className: "bar", ariaHidden: "true" }, bar),
    );
  });
  const list = element("ol", { className: "ranking" }, ...rows);
  if (rows.length > 10) list.tabIndex = 0; // it scrolls
  list.setAttribute("aria-label", "Classes, the most probable first");
  return list;
}
