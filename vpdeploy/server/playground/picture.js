// The image: chosen, dropped or pasted, and shown.

import { byId, bytesText } from "./dom.js";

let shownUrl = null;

/** Call `onImage` with a File for every image that the reader brings, and `onNothing` with a sentence for all else. */
export function watchImages(onImage, onNothing) {
  const drop = byId("drop");
  byId("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = ""; // so that choosing the same file again counts
    if (file) onImage(file);
  });
  let depth = 0; // dragenter and dragleave also fire for every element inside
  addEventListener("dragenter", () => drop.classList.toggle("over", ++depth > 0));
  addEventListener("dragleave", () => drop.classList.toggle("over", --depth > 0));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    drop.classList.remove("over");
    take(event.dataTransfer?.files, onImage, () => onNothing("What was dropped is no file; drop an image file."));
  });
  addEventListener("paste", (event) => {
    const typing = event.target instanceof HTMLInputElement && event.target.type !== "file";
    take(event.clipboardData?.files, onImage, () => {
      if (!typing) onNothing("What was pasted is no image; copy an image first.");
    });
  });
}

function take(files, onImage, onNothing) {
  if (files?.length) onImage(files[0]);
  else onNothing();
}

/** Show an image, or say that the browser cannot. */
export function showImage(file) {
  const preview = byId("preview");
  const caption = byId("caption");
  if (shownUrl) URL.revokeObjectURL(shownUrl);
  shownUrl = URL.createObjectURL(file);
  const facts = [file.name || "pasted image", bytesText(file.size)];
  const show = (...more) => {
    caption.textContent = [...facts, ...more].join(" · ");
    caption.title = file.name;
    caption.hidden = false;
    byId("invitation").hidden = preview.hidden === false;
  };
  preview.onload = () => {
    preview.hidden = false;
    preview.alt = `The image that is asked about: ${facts[0]}`;
    show(`${preview.naturalWidth} × ${preview.naturalHeight}`);
  };
  preview.onerror = () => {
    preview.hidden = true;
    show("no preview");
  };
  preview.src = shownUrl;
  byId("drop").classList.add("full");
}
