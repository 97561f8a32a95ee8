// The page: what is asked when, and how its parts hear of it.

import { Failure, request, token } from "./api.js";
import { drawCards, showFirstCards, showMoreCards } from "./cards.js";
import { placeCharts, showActivity, wantedSecond } from "./charts.js";
import { byId, bytesText, element, hideAlert, plural, showAlert, speak, timeText } from "./dom.js";
import { showImage, watchImages } from "./picture.js";
import { drawFailed, drawTable } from "./table.js";
import { askForToken, confirmed, guarded, newToken, reader } from "./token.js";

const TASKS_IN_REQUEST = 16; // one batch of the default size holds two of these
const REQUESTS_AT_ONCE = 2;
const TASKS_ASKED = 64;
const OF_SOME_TASKS = [404, 500, 504]; // statuses that say nothing of the tasks that were not in the request
const POLL_MS = 1000;
const RETRY_MS = 2000;

const state = {
  tasks: null, // null until the server has told
  failed: [], // tasks that it could not load, and why
  image: null,
  answers: new Map(), // by task
  limits: null,
  administered: false, // whether tasks can be changed over HTTP
  reachable: true,
  denied: "", // why the token is not good for tasks
  adminToken: "",
};
let asking = null; // aborts what is being asked
let answerCount = 0;

// ---- asking ----

/** Put the image to tasks: all that are meant, or one. */
async function ask(names) {
  const { image } = state;
  if (!image || !names.length) return;
  asking?.abort();
  const controller = (asking = new AbortController());
  for (const [name, each] of state.answers) if (each.state === "asking") state.answers.delete(name);
  hideAlert();
  if (state.limits && image.size > state.limits.max_body_bytes) {
    showAlert(`This image is too large: the server takes files of up to ${bytesText(state.limits.max_body_bytes)}.`);
    return;
  }
  const asked = names.slice(0, TASKS_ASKED);
  for (const name of asked) answer(name, { ...state.answers.get(name), state: "asking" });
  byId("summary").textContent = `Asking ${plural(asked.length, "task")}…`;
  draw();

  const size = Math.min(TASKS_IN_REQUEST, state.limits?.max_images ?? TASKS_IN_REQUEST);
  const parts = [];
  for (let start = 0; start < asked.length; start += size) parts.push(asked.slice(start, start + size));
  const started = performance.now();
  const failures = [];
  const take = async () => {
    while (parts.length) {
      const part = parts.shift();
      try {
        await askTogether(part, image, controller.signal);
      } catch (error) {
        if (error.name === "AbortError") return;
        failures.push(error);
        // What is wrong with the image or the server is wrong for all that is left.
        const rest = OF_SOME_TASKS.includes(error.status) ? [] : parts.splice(0).flat();
        for (const name of [...part, ...rest]) answer(name, { state: "failed" });
        if (!(error instanceof Failure)) throw error;
      }
      draw();
    }
  };
  await Promise.all(Array.from({ length: REQUESTS_AT_ONCE }, take));
  if (controller.signal.aborted) return;
  asking = null;
  tellOutcome(asked, names.length, failures, performance.now() - started);
}

async function askTogether(names, image, signal) {
  const top = byId("top").value;
  const alone = names.length === 1;
  const path = alone
    ? `v1/tasks/${encodeURIComponent(names[0])}:predict?top=${top}`
    : `v1/predict?top=${top}&tasks=${encodeURIComponent(names.join(","))}`;
  const headers = { "Content-Type": "application/octet-stream" };
  const started = performance.now();
  let found;
  try {
    found = await guarded(path, { method: "POST", body: image, headers, signal });
  } catch (error) {
    if (error.status !== 404 || alone) throw error;
    await loadTasks(); // one of them was removed: the others still answer
    const left = names.filter(isLoaded);
    if (!left.length || left.length === names.length) throw error;
    return askTogether(left, image, signal);
  }
  const ms = performance.now() - started;
  for (const each of alone ? [found] : found.tasks) answer(each.task, { ...each, state: "answered", ms });
}

function answer(name, fields) {
  state.answers.set(name, { ...fields, key: ++answerCount });
}

function tellOutcome(asked, wanted, failures, ms) {
  const answered = asked.filter((name) => state.answers.get(name)?.state === "answered");
  const requests = Math.ceil(asked.length / TASKS_IN_REQUEST);
  const how = requests === 1 ? "one request" : `${requests} requests`;
  let sentence = `${plural(answered.length, "task")} answered in ${timeText(ms)}, ${how}.`;
  if (wanted > asked.length) sentence += ` The first ${asked.length} of ${wanted} were asked; filter to ask others.`;
  if (failures.length) {
    const [first] = failures;
    showAlert(first.message);
    sentence = answered.length ? sentence : "No task answered.";
  }
  byId("summary").textContent = sentence;
  speak(answered.length === 1 ? `${sentence} ${bestOf(answered[0])}` : sentence);
  draw();
}

function bestOf(name) {
  const [best] = state.answers.get(name).predictions;
  return best ? `${best.label.slice(0, 80)}, ${Math.round(best.probability * 100)} percent.` : "";
}

/** Names that "Ask" means now. */
function meant() {
  const target = byId("target").value;
  return (target ? [target] : filtered().map((task) => task.task)).filter(isLoaded);
}

const isLoaded = (name) => state.tasks?.some((task) => task.task === name);

// ---- tokens ----

byId("token-button").addEventListener("click", async () => {
  const had = token.value !== "";
  token.set("");
  reader.declined = had;
  state.tasks = null;
  state.answers.clear();
  draw();
  if (!had) {
    reader.declined = false;
    await newToken("");
  }
  drawStatus();
});

async function rollBack(task) {
  if (!(await confirmed(`Serve the version of ${task.task} before version ${task.version} again?`, "Roll back"))) return;
  let error = "";
  for (;;) {
    try {
      const path = `v1/tasks/${encodeURIComponent(task.task)}:rollback`;
      const bearer = state.adminToken || token.value;
      // Only what the reader saw is rolled back: somebody else may have been faster.
      const done = await request(path, { method: "POST", bearer, headers: { "If-Match": `"${task.version}"` } });
      hideAlert();
      await loadTasks();
      speak(`${task.task} is at version ${done.version} again.`);
      return;
    } catch (failure) {
      if (failure.status !== 401 && failure.status !== 403) {
        showAlert(failure.message);
        return;
      }
      if (state.adminToken) error = "That token was refused.";
      const given = await askForToken({
        title: "Administration asks for its own token",
        text: `Rolling ${task.task} back changes what the server answers.`,
        note: "The token is kept in memory until the page is left.",
        error,
      });
      state.adminToken = given ?? "";
      if (given === null) return;
    }
  }
}

// ---- what the server has, and does ----

async function loadTasks() {
  const { tasks, failed, administered } = await guarded("v1/tasks");
  const before = state.tasks && new Map(state.tasks.map((task) => [task.task, task.version]));
  state.tasks = tasks;
  state.failed = failed;
  state.administered = administered;
  const names = new Set(tasks.map((task) => task.task));
  for (const name of state.answers.keys()) if (!names.has(name)) state.answers.delete(name);
  drawTargets();
  draw();
  if (before) tellChanges(before, tasks, names);
  // What was published since the image was asked about is asked, too.
  const changed = tasks.filter((task) => before && before.get(task.task) !== task.version).map((task) => task.task);
  if (state.image && !asking) ask(meant().filter((name) => changed.includes(name)));
}

function tellChanges(before, tasks, names) {
  const added = tasks.filter((task) => !before.has(task.task)).map((task) => task.task);
  const updated = tasks.filter((task) => before.has(task.task) && before.get(task.task) !== task.version);
  const removed = [...before.keys()].filter((name) => !names.has(name));
  const told = [];
  if (added.length) told.push(`Added: ${added.slice(0, 3).join(", ")}${added.length > 3 ? ` and ${added.length - 3} more` : ""}.`);
  if (updated.length) told.push(`Updated: ${updated.slice(0, 3).map((task) => task.task).join(", ")}.`);
  if (removed.length) told.push(`Removed: ${removed.slice(0, 3).join(", ")}.`);
  if (told.length) speak(told.join(" "));
}

async function loadActivity() {
  let activity;
  try {
    activity = await guarded(`v1/activity?since=${wantedSecond()}`);
  } catch (error) {
    if (error.status !== 403) throw error;
    byId("charts-note").textContent = "This token may not see what the server does.";
    byId("charts-note").hidden = false;
    byId("charts").hidden = true;
    return;
  }
  byId("charts-note").hidden = true;
  byId("charts").hidden = false;
  state.limits = activity.limits;
  state.ready = activity.ready;
  showActivity(activity);
}

async function poll() {
  let pause = POLL_MS;
  if (!document.hidden && !(reader.declined && !token.value)) {
    try {
      await loadTasks();
      await loadActivity();
      state.denied = "";
      if (!state.reachable) {
        state.reachable = true;
        hideAlert();
        speak("The server is back.");
      }
    } catch (error) {
      if (!(error instanceof Failure)) console.error(error);
      else if (error.status === 403) state.denied = error.message;
      else if (error.status !== 401) {
        if (state.reachable) showAlert(`${error.message.replace(/\.$/, "")}; this page keeps trying.`);
        state.reachable = false;
      }
      pause = RETRY_MS;
    }
    drawStatus();
    draw();
  }
  setTimeout(poll, pause);
}

// ---- drawing ----

function filtered() {
  const text = byId("filter").value.trim().toLowerCase();
  return (state.tasks ?? []).filter((task) => task.task.toLowerCase().includes(text));
}

function emptyText() {
  if (state.denied) return state.denied;
  if (state.tasks === null) return reader.declined ? "Give the token to see the tasks." : "Loading the tasks…";
  if (!state.tasks.length) return "No task is loaded: publish one with vpdeploy task add.";
  return "No task has such a name.";
}

function draw() {
  const shown = filtered();
  const target = byId("target").value;
  const cards = target ? (state.tasks ?? []).filter((task) => task.task === target) : shown;
  drawCards(cards, state.answers, { hasImage: state.image !== null, onAsk: (name) => ask([name]), emptyText: emptyText() });
  drawTable(shown, { onAsk: askFromTable, onRollBack: state.administered ? rollBack : null, emptyText: emptyText() });
  drawFailed(state.failed);
  byId("task-count").textContent = state.tasks?.length ?? "";
  byId("ask").disabled = !state.image || !meant().length;
  if (!state.image && state.tasks?.length) {
    byId("summary").textContent = `Bring an image to put it to ${target ? "this task" : `all ${plural(shown.length, "task")}`}.`;
  }
}

function drawTargets() {
  const select = byId("target");
  const names = state.tasks.map((task) => task.task);
  if (JSON.stringify(names) === select.dataset.names) return;
  const chosen = select.value;
  const options = names.map((name) => element("option", { value: name }, name));
  select.replaceChildren(element("option", { value: "" }, "All tasks"), ...options);
  select.value = names.includes(chosen) ? chosen : "";
  select.dataset.names = JSON.stringify(names);
}

function drawStatus() {
  const status = byId("status");
  let [kind, text] = ["ready", "Ready"];
  if (reader.declined && !token.value) [kind, text] = ["waiting", "Token needed"];
  else if (!state.reachable) [kind, text] = ["down", "Not reachable"];
  else if (state.denied) [kind, text] = ["down", "Not allowed"];
  else if (state.tasks === null) [kind, text] = ["waiting", "Connecting"];
  else if (state.ready === false) [kind, text] = ["waiting", "Not ready"];
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = kind;
  const button = byId("token-button");
  button.hidden = !token.value && !reader.declined;
  button.textContent = token.value ? "Forget token" : "Enter token";
}

// ---- what the reader does ----

function askFromTable(name) {
  byId("target").value = name;
  select(byId("answers-tab"));
  byId("answers").focus();
  draw();
  ask([name]);
}

const tabs = [byId("answers-tab"), byId("tasks-tab")];

function select(tab) {
  for (const each of tabs) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -tabs.indexOf(tab), End: tabs.length - 1 - tabs.indexOf(tab) };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = tabs[(tabs.indexOf(tab) + steps[event.key] + tabs.length) % tabs.length];
    select(next);
    next.focus();
  });
}

watchImages((file) => {
  state.image = file;
  state.answers.clear();
  showImage(file);
  select(byId("answers-tab"));
  ask(meant());
}, showAlert);
byId("ask").addEventListener("click", () => ask(meant()));
byId("target").addEventListener("change", () => {
  draw();
  ask(meant());
});
byId("top").addEventListener("change", () => ask(meant()));
byId("filter").addEventListener("input", () => {
  showFirstCards();
  draw();
});
byId("more").addEventListener("click", () => {
  showMoreCards();
  draw();
});
byId("alert-close").addEventListener("click", hideAlert);

token.load();
placeCharts();
draw();
drawStatus();
poll();
