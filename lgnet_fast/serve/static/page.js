// What all parts of the page share: what the server offers, the view, the editor, messages and questions.
import { json, limits } from "./api.js";
import { Editor, reasonOf } from "./editor.js";
import { settings } from "./settings.js";
import { t, translate } from "./text.js";
import { View } from "./view.js";

export const $ = (selector) => document.querySelector(selector);

translate(document);
document.title = t("title");

let fading;
export function say(text, kind = "") {
  const status = $("#status");
  status.textContent = text;
  status.dataset.kind = kind;
  status.classList.add("shown");
  clearTimeout(fading);
  if (kind !== "busy") fading = setTimeout(() => status.classList.remove("shown"), kind === "error" ? 9000 : 3500);
}
/** Ends a message of something that runs. */
export function quiet() {
  if ($("#status").dataset.kind === "busy") $("#status").classList.remove("shown");
}

export const server = await json("api/v1/page").catch((error) => {
  say(reasonOf(error), "error");
  clearTimeout(fading);
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  throw error;
});
limits.bytes = server.max_bytes;
export const view = new View($("#stage"), server.preview);
export const editor = new Editor(view, say);
view.colour = settings.colour;

/**
 * Asks by a dialog: the value of the button that was pressed, "" for none. A question waits for the answer to the one
 * before it, because a browser may send a dialog's close event later than the next file.
 */
let last = Promise.resolve("");
export function ask(dialog) {
  const shown = () =>
    new Promise((resolve) => {
      dialog.returnValue = "";
      dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
      dialog.showModal();
    });
  return (last = last.then(shown));
}
export const answered = () => last;

/** Whether what was made for a picture can be shown: it is the current one still, and nothing is open above it. */
export const isFree = (picture) => editor.picture === picture && !$("dialog[open]");

/** Shows bytes in an <img>. */
export function showBlob(image, blob) {
  const url = URL.createObjectURL(blob);
  for (const end of ["load", "error"]) image.addEventListener(end, () => URL.revokeObjectURL(url), { once: true });
  image.src = url;
}

/** A row of a description list. */
export function row(term, ...described) {
  const element = document.createElement("div");
  const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
  dt.textContent = term;
  dd.append(...described);
  element.append(dt, dd);
  return element;
}
