// The two dialogs: one asks for a token, one asks whether somebody means it.

import { byId } from "./dom.js";

const PRINTABLE = /^[\x21-\x7e]+$/;

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
