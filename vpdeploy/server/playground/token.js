// Tokens: requests that wait for one, and the dialogs: one asks for a token, one asks whether somebody means it.

import { Failure, request, token } from "./api.js";
import { byId } from "./dom.js";

const PRINTABLE = /^[\x21-\x7e]+$/;

/** Whether the reader would rather give no token; then nobody is asked again. */
export const reader = { declined: false };

/** Ask for a token; resolves to it, or to null if the reader would rather not. */
export function askForToken({ title, text, note, error = "" }) {
  const dialog = byId("token-dialog");
  const input = byId("token-input");
  byId("token-title").textContent = title;
  byId("token-text").textContent = text;
  byId("token-note").textContent = note;
  byId("token-error").textContent = error;
  input.value = "";
  return new Promise((resolve) => {
    const finish = (value) => {
      byId("token-form").onsubmit = byId("token-cancel").onclick = dialog.oncancel = null;
      input.value = "";
      dialog.close();
      resolve(value);
    };
    byId("token-form").onsubmit = (event) => {
      event.preventDefault();
      const value = input.value.trim();
      if (PRINTABLE.test(value)) finish(value);
      else byId("token-error").textContent = "A token consists of printable ASCII characters without spaces.";
    };
    byId("token-cancel").onclick = () => finish(null);
    dialog.oncancel = (event) => {
      event.preventDefault();
      finish(null);
    };
    dialog.showModal();
    input.focus();
  });
}

/** Ask a question; resolves to whether the answer is yes. */
export function confirmed(question, yes) {
  const dialog = byId("confirm-dialog");
  byId("confirm-text").textContent = question;
  byId("confirm-yes").textContent = yes;
  return new Promise((resolve) => {
    const finish = (value) => {
      byId("confirm-yes").onclick = byId("confirm-no").onclick = dialog.oncancel = null;
      dialog.close();
      resolve(value);
    };
    byId("confirm-yes").onclick = () => finish(true);
    byId("confirm-no").onclick = () => finish(false);
    dialog.oncancel = () => finish(false);
    dialog.showModal();
    byId("confirm-yes").focus();
  });
}

/** Ask the server; where it wants a token, ask the reader for it, once for all requests that wait for it. */
export async function guarded(path, options) {
  for (;;) {
    const used = token.value;
    try {
      return await request(path, options);
    } catch (error) {
      if (error.status !== 401 || reader.declined) throw error;
      if (token.value === used) await newToken(used ? "That token was refused." : "");
      if (!token.value) throw new Failure(401, "This server asks for a token.");
    }
  }
}

let tokenQuestion = null;

export function newToken(error) {
  tokenQuestion ??= (async () => {
    token.set("");
    const given = await askForToken({
      title: "This server asks for a token",
      text: "Whoever runs the server can give you one.",
      note: "The token stays in this tab and is forgotten when the tab is closed.",
      error,
    });
    token.set(given ?? "");
    reader.declined = given === null;
    tokenQuestion = null;
  })();
  return tokenQuestion;
}
