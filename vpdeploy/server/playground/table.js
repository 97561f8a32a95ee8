// The loaded tasks as a table.

import { byId, bytesText, element, named, percentText } from "./dom.js";

/** Draw the rows of `tasks`; only those that have changed are made anew. `onRollBack` is null where nobody may. */
export function drawTable(tasks, { onAsk, onRollBack, emptyText }) {
  const rows = byId("rows");
  const old = new Map([...rows.children].map((row) => [row.dataset.task, row]));
  const fresh = tasks.map((task) => {
    const key = JSON.stringify([task, onRollBack !== null]);
    const known = old.get(task.task);
    if (known?.dataset.key === key) return known;
    const row = rowOf(task, onAsk, onRollBack);
    row.dataset.task = task.task;
    row.dataset.key = key;
    const focused = known?.contains(document.activeElement);
    if (known) known.replaceWith(row);
    if (focused) row.querySelector("button")?.focus();
    return row;
  });
  const same = fresh.length === rows.children.length && fresh.every((row, index) => rows.children[index] === row);
  if (!same) rows.replaceChildren(...fresh);
  byId("rows-empty").hidden = tasks.length > 0;
  byId("rows-empty").textContent = emptyText;
}

/** Tell which tasks of the bundle could not be loaded, and why. */
export function drawFailed(failed) {
  const key = JSON.stringify(failed);
  const list = byId("failed");
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.hidden = !failed.length;
  list.replaceChildren(
    ...failed.map((each) => element("li", {}, element("strong", {}, each.task), ` could not be loaded: ${each.reason}`)),
  );
}

function rowOf(task, onAsk, onRollBack) {
  const actions = element("td", { className: "actions" }, action("Ask", `Ask ${task.task}`, () => onAsk(task.task)));
  if (onRollBack && task.version > 1) {
    actions.append(action("Roll back", `Roll ${task.task} back`, () => onRollBack(task)));
  }
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, named("span", task.task)),
    element("td", { className: "number" }, String(task.version)),
    element("td", { className: "number" }, String(task.classes)),
    accuracyCell(task.val_accuracy),
    element("td", { className: "number" }, typeof task.size_bytes === "number" ? bytesText(task.size_bytes) : "–"),
    actions,
  );
}

function accuracyCell(accuracy) {
  const cell = element("td", { className: "accuracy" });
  if (typeof accuracy !== "number") {
    cell.append(element("span", { className: "percent" }, "–"));
    return cell;
  }
  const fill = element("span", { className: "fill" });
  fill.style.width = `${accuracy * 100}%`;
  cell.append(
    element("span", { className: "bar", ariaHidden: "true" }, fill),
    element("span", { className: "percent" }, percentText(accuracy)),
  );
  return cell;
}

function action(text, label, onClick) {
  const button = element("button", { className: "quiet small", type: "button" }, text);
  button.setAttribute("aria-label", label);
  button.addEventListener("click", onClick);
  return button;
}
