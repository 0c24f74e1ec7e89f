// Pictures that come in: by button, drop, paste, folder or sample; and masks.
import { call } from "./api.js";
import { $, answered, ask, editor, say, server, showBlob } from "./page.js";
import { shorten, t } from "./text.js";

// The extensions of `lgnet_fast.pipeline.formats`; a browser does not know the type of some of them.
const READ = (
  ".png .apng .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .gif .avif .heic .heif .hif .jp2 .j2k .jpx .jpf " +
  ".ppm .pgm .pbm .pnm .tga"
).split(" ");

const isPicture = ({ name, type }) => /^image\//.test(type) || READ.some((one) => name.toLowerCase().endsWith(one));
for (const id of ["#file", "#mask-file"]) $(id).accept = ["image/*", ...READ].join();

/** The first of many names. */
function few(names) {
  const shown = names.slice(0, 3).map(shorten).join(", ");
  return names.length > 3 ? t("andMore", { names: shown, count: names.length - 3 }) : shown;
}

/** Asks before unsaved work is dropped; whether it may be. */
export async function mayDiscard() {
  if ($("#discard").open) return false;
  await answered();
  const names = editor.unsaved.map(({ name }) => name);
  if (!names.length) return true;
  if ($("#discard").open) return false;
  $("#discard-text").textContent = t("discardText", { names: few(names) });
  return (await ask($("#discard"))) === "discard";
}

async function openFiles(files) {
  const sources = files.filter(isPicture).map((file) => ({ name: file.name, file }));
  const others = files.map(({ name }) => name).filter((name, at) => !isPicture(files[at]) && !name.startsWith("."));
  if (sources.length) {
    if (!(await mayDiscard())) return;
    for (const id of ["#slider", "#stage-dialog"]) $(id).close(); // they show a picture that goes
    if (!(await editor.open(sources))) return;
  }
  if (others.length) say(t("skipped", { names: few(others) }), sources.length ? "" : "error");
}

const sorted = (files) => files.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));

for (const input of [$("#file"), $("#folder")]) {
  input.addEventListener("change", () => {
    openFiles(sorted([...input.files]));
    input.value = "";
  });
}
for (const button of document.querySelectorAll("[data-open]")) {
  button.addEventListener("click", () => $(button.dataset.open).click());
}

/** The files of what was dropped, with those in folders. */
async function filesOf(entries) {
  const promised = (call) => new Promise((resolve, reject) => call(resolve, reject));
  const files = entries.map(async (entry) => {
    if (entry.isFile) return promised((...ends) => entry.file(...ends));
    const reader = entry.createReader();
    const inside = [];
    for (let more; more?.length !== 0; inside.push(...more)) more = await promised((...ends) => reader.readEntries(...ends));
    return filesOf(inside);
  });
  return (await Promise.all(files)).flat();
}

let entered = 0;
addEventListener("dragenter", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  entered++;
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => {
  entered = Math.max(0, entered - 1);
  if (!entered) document.body.classList.remove("dropping");
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  entered = 0;
  document.body.classList.remove("dropping");
  const files = [...event.dataTransfer.files];
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!files.length && !entries.length) say(t("noFile"), "error"); // some browsers give a page's picture as its address
  else if (entries.some((entry) => entry.isDirectory)) filesOf(entries).then((all) => openFiles(sorted(all)));
  else if (files.length === 1 && editor.picture && /mask/i.test(files[0].name)) importMask(files[0]);
  else openFiles(files);
});
addEventListener("paste", (event) => {
  if (event.target.closest?.("input:not([type=range]):not([type=checkbox])")) return;
  openFiles([...event.clipboardData.files]);
});

for (const name of server.samples) {
  const button = document.createElement("button");
  button.className = "sample";
  button.setAttribute("aria-label", t("sample", { name }));
  const image = document.createElement("img");
  image.alt = "";
  button.append(image);
  button.addEventListener("click", () => editor.open([{ name: `${name}.png`, sample: name }]));
  $("#samples").append(button);
  call(`api/v1/samples/${name}`)
    .then((response) => response.blob())
    .then((blob) => showBlob(image, blob))
    .catch(() => button.remove());
}

/** Adds a mask file to the picture that is shown when it comes. */
async function importMask(file, picture = editor.picture, channel = "auto") {
  if (!picture) return;
  say(t("maskReading"), "busy");
  try {
    const options = { method: "POST", body: file, type: "application/octet-stream" };
    const response = await editor.callFor(picture, `/mask?channel=${channel}`, options);
    const image = await createImageBitmap(await response.blob());
    if (!editor.pictures.includes(picture)) return;
    editor.add({ kind: "image", image }, picture);
    say(t("maskRead"));
  } catch (error) {
    if (channel !== "auto" || !/mask_channel/.test(error.message)) {
      editor.fail(error, picture);
      return;
    }
    const chosen = await ask($("#channels"));
    if (chosen) await importMask(file, picture, chosen);
    else say(t("cancelled"));
  }
}
$("#mask-file").addEventListener("change", (event) => {
  if (event.target.files[0]) importMask(event.target.files[0]);
  event.target.value = "";
});
