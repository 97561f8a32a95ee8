// Requests to the server that this page came from, and what their failures are called.

const STORED = "vpdeploy-token";
const LONGEST_MESSAGE = 300;

/** A request that was refused, or never answered (status 0). Its message is one sentence for people. */
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The token of this tab: in its session storage, or in memory where a browser allows no storage. */
export const token = {
  value: "",
  load() {
    try {
      this.value = sessionStorage.getItem(STORED) ?? "";
    } catch {
      this.value = "";
    }
  },
  set(value) {
    this.value = value;
    try {
      if (value) sessionStorage.setItem(STORED, value);
      else sessionStorage.removeItem(STORED);
    } catch {
      // Then it lives as long as the page.
    }
  },
};

/** Ask the server for JSON. `bearer` is sent instead of the tab's token. */
export async function request(path, { bearer = token.value, headers = {}, ...options } = {}) {
  let response;
  try {
    const authorization = bearer ? { Authorization: `Bearer ${bearer}` } : {};
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The server cannot be reached.");
  }
  let answer;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    answer = {};
  }
  if (!response.ok) throw failureOf(response.status, answer, ASKS.test(path));
  return answer;
}

const OPENINGS = {
  400: "This cannot be done",
  403: "This is not allowed",
  404: "It is not there",
  412: "It has changed meanwhile",
  408: "The upload took too long",
  413: "This image is too large",
  429: "The server is busy; try again in a moment",
  500: "The model failed on this image",
  503: "The server is stopping or not ready",
  504: "The answer was not ready in time",
};

const ASKS = /^v1\/(tasks\/[^/]*:)?predict\?/;

function failureOf(status, answer, asks) {
  if (status === 401) return new Failure(401, "This server asks for a token.");
  const opening = status === 400 && asks ? "This image cannot be used" : OPENINGS[status] ?? `The server answered ${status}`;
  const said = typeof answer.error === "string" ? answer.error.slice(0, LONGEST_MESSAGE).replace(/^image: /, "") : "";
  return new Failure(status, said ? `${opening}: ${said}` : `${opening}.`);
}
