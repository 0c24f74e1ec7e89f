// The controls of the page, and the connections between picture, editor and input.
import { call, json } from "./api.js";
import { Editor, reasonOf, shownFill } from "./editor.js";
import { Input } from "./input.js";
import { encode } from "./mask.js";
import { SIZES, TOOLS, settings } from "./settings.js";
import { KEYS, t, translate } from "./text.js";
import { View } from "./view.js";

const $ = (selector) => document.querySelector(selector);
// The extensions of `lgnet_fast.pipeline.formats`; a browser does not know the type of some of them.
const READ = (
  ".png .apng .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .gif .avif .heic .heif .hif .jp2 .j2k .jpx .jpf " +
  ".ppm .pgm .pbm .pnm .tga"
).split(" ");

translate(document);
document.title = t("title");

// -- messages -------------------------------------------------------------------------------------------------

let fading;
function say(text, kind = "") {
  const status = $("#status");
  status.textContent = text;
  status.dataset.kind = kind;
  status.classList.add("shown");
  clearTimeout(fading);
  if (kind !== "busy") fading = setTimeout(() => status.classList.remove("shown"), kind === "error" ? 9000 : 3500);
}

const server = await json("/api/v1/page").catch((error) => {
  say(reasonOf(error), "error");
  clearTimeout(fading);
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  throw error;
});

const view = new View($("#stage"), server.preview);
const editor = new Editor(view, { say, changed: update });
view.moved = showZoom;
view.colour = settings.colour;

// -- opening --------------------------------------------------------------------------------------------------

const isPicture = ({ name, type }) => /^image\//.test(type) || READ.some((one) => name.toLowerCase().endsWith(one));
for (const id of ["#file", "#mask-file"]) $(id).accept = ["image/*", ...READ].join();

/** The first of many names. */
function few(names) {
  const shown = names.slice(0, 3).join(", ");
  return names.length > 3 ? t("andMore", { names: shown, count: names.length - 3 }) : shown;
}

/** Asks before unsaved work is dropped; whether it may be. */
let asked = Promise.resolve();
async function mayDiscard() {
  const dialog = $("#discard");
  if (dialog.open) return false;
  await asked; // a browser may send a dialog's close event after the next file has come
  const names = editor.unsaved.map(({ name }) => name);
  if (!names.length) return true;
  if (dialog.open) return false;
  $("#discard-text").textContent = t("discardText", { names: few(names) });
  dialog.returnValue = "";
  asked = new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "discard");
    dialog.showModal();
  });
  return asked;
}

async function openFiles(given) {
  const files = [...given];
  const sources = files.filter(isPicture).map((file) => ({ name: file.name, file }));
  const others = files.filter((file) => !isPicture(file)).map(({ name }) => name);
  if (sources.length) {
    if (!(await mayDiscard())) return;
    await editor.open(sources);
    if ($("#status").dataset.kind === "error") return;
  }
  if (others.length) say(t("skipped", { names: few(others) }), sources.length ? "" : "error");
}

for (const input of [$("#file"), $("#folder")]) {
  input.addEventListener("change", () => {
    openFiles([...input.files].sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true })));
    input.value = "";
  });
}
for (const button of document.querySelectorAll("[data-open]")) {
  button.addEventListener("click", () => $(button.dataset.open).click());
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
  const { files } = event.dataTransfer;
  if (files.length === 1 && editor.picture && /mask/i.test(files[0].name)) importMask(files[0]);
  else openFiles(files);
});
addEventListener("paste", (event) => {
  if (event.target.closest?.("input, textarea")) return;
  openFiles(event.clipboardData.files);
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
  call(`/api/v1/samples/${name}`)
    .then((response) => response.blob())
    .then((blob) => (image.src = URL.createObjectURL(blob)))
    .catch(() => button.remove());
}

// -- what can be done now -------------------------------------------------------------------------------------

function update() {
  const { picture } = editor;
  if (!picture?.position) peek(false);
  document.body.classList.toggle("editing", Boolean(picture));
  document.body.classList.toggle("filling", Boolean(picture?.running));
  $("#start").hidden = Boolean(picture) || editor.number >= 0;
  $("#undo").disabled = !editor.canUndo;
  $("#redo").disabled = !editor.canRedo;
  $("#fill").disabled = !editor.painted;
  $("#fill").classList.toggle("calls", editor.painted > 0 && !picture.running);
  const many = editor.painted > 1;
  $("#count").textContent = many ? editor.painted : "";
  $("#fill").setAttribute("aria-label", many ? t("fillMany", { count: editor.painted }) : t("fillLabel"));
  for (const id of ["#compare", "#peek", "#stages"]) $(id).disabled = !picture?.position;
  for (const id of ["#mask-export", "#mask-clear"]) $(id).disabled = !editor.painted;
  const count = editor.pictures.length;
  $("#strip").hidden = count < 2;
  if (count > 1) {
    $("#number").textContent = t("of", { number: editor.number + 1, count });
    $("#previous").disabled = editor.number <= 0;
    $("#next").disabled = editor.number >= count - 1;
  }
  if (picture) {
    $("#name").textContent = picture.name;
    $("#about").textContent = `${picture.width} × ${picture.height} · ${picture.format.toUpperCase()}${picture.depth > 8 ? " · 16 bit" : ""}`;
  }
  showLast(picture?.last);
  for (const button of document.querySelectorAll("button[data-tool]")) {
    button.setAttribute("aria-checked", String(button.dataset.tool === settings.tool));
    button.tabIndex = button.dataset.tool === settings.tool ? 0 : -1;
  }
  $("#stage").dataset.tool = settings.tool;
}

function showZoom() {
  $("#zoom").textContent = `${Math.round(view.scale * 100)} %`;
  sized();
}

function sized() {
  $("#size").value = String(Math.round(1000 * (Math.log(settings.size / SIZES.least) / Math.log(SIZES.most / SIZES.least))));
  const pixels = Math.max(1, Math.round(settings.size / (editor.picture ? view.scale : 1)));
  $("#size-value").textContent = t("sizeValue", { px: pixels });
  $("#size").setAttribute("aria-valuetext", t("sizeValue", { px: pixels }));
  const cursor = $("#cursor");
  if (!cursor.hidden && input.place) input.showCursor(...input.place, "mouse");
}

function showLast(fill) {
  $("#last-none").hidden = Boolean(fill);
  $("#last").hidden = !fill;
  if (!fill) return;
  const parts = ["queue", "fill", "encode"].filter((name) => fill.phases[name] !== undefined);
  const phases = parts.map((name) => [name, fill.phases[name]]);
  phases.push(["network", Math.max(0, fill.milliseconds - phases.reduce((sum, [, ms]) => sum + ms, 0))]);
  const most = Math.max(...phases.map(([, ms]) => ms), 1);
  $("#phases").replaceChildren(
    ...phases.map(([name, ms]) => {
      const row = document.createElement("div");
      const label = document.createElement("dt");
      label.textContent = t(`phase_${name}`);
      const value = document.createElement("dd");
      const bar = document.createElement("meter");
      bar.max = most;
      bar.value = ms;
      bar.setAttribute("aria-label", t(`phase_${name}`));
      const text = document.createElement("span");
      text.textContent = `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
      value.append(bar, text);
      row.append(label, value);
      return row;
    }),
  );
  $("#ran").textContent = `${fill.backend} · ${t(`strategy_${fill.strategy}`)} · ${fill.passes}×`;
}

// -- tools ----------------------------------------------------------------------------------------------------

let before = "brush";
function choose(tool) {
  if (tool === settings.tool) return;
  before = settings.tool;
  settings.tool = tool;
  update();
}
for (const button of document.querySelectorAll("button[data-tool]")) {
  button.addEventListener("click", () => choose(button.dataset.tool));
  button.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(TOOLS[(TOOLS.indexOf(settings.tool) + step + TOOLS.length) % TOOLS.length]);
    $(`button[data-tool=${settings.tool}]`).focus();
  });
}
$("#size").addEventListener("input", (event) => {
  settings.size = Math.round(SIZES.least * Math.pow(SIZES.most / SIZES.least, event.target.value / 1000));
  sized();
});

// -- mask -----------------------------------------------------------------------------------------------------

async function importMask(file, channel = "auto") {
  const { picture } = editor;
  if (!picture) return;
  try {
    const options = { method: "POST", body: file, type: "application/octet-stream" };
    const response = await editor.callFor(picture, `/mask?channel=${channel}`, options);
    editor.add({ kind: "image", image: await createImageBitmap(await response.blob()) });
    say(t("maskRead"));
  } catch (error) {
    if (channel !== "auto" || !/mask_channel/.test(error.message)) {
      editor.fail(error);
      return;
    }
    const dialog = $("#channels");
    dialog.returnValue = "";
    dialog.onclose = () => dialog.returnValue && importMask(file, dialog.returnValue);
    dialog.showModal();
  }
}
$("#mask-file").addEventListener("change", (event) => {
  if (event.target.files[0]) importMask(event.target.files[0]);
  event.target.value = "";
});

async function exportMask() {
  const { picture } = editor;
  const blob = await encode(picture.pending, { x: 0, y: 0, width: picture.width, height: picture.height }, picture);
  if (blob) download(blob, `${stem(picture.name)}_mask.png`);
  else say(t("nothing"));
}

function addRectangle(event) {
  event.preventDefault();
  const { picture } = editor;
  if (!picture) return;
  const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => Number($(`#rectangle-${name}`).value));
  if (!(width > 0 && height > 0)) return;
  editor.add({ kind: "rectangle", x, y, width, height });
  if (settings.auto) editor.fill();
}
$("#numbers").addEventListener("submit", addRectangle);

// -- saving ---------------------------------------------------------------------------------------------------

const EXTENSIONS = { jpeg: "jpg", tiff: "tif" };
const stem = (name) => name.replace(/\.[^.]*$/, "");

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function result(picture, format) {
  const query = new URLSearchParams({ position: picture.position, ...(format && { format }) });
  const response = await editor.callFor(picture, `/result?${query}`);
  return response.blob();
}

async function save() {
  const { picture } = editor;
  if (!picture) return;
  say(t("saving"), "busy");
  const shown = shownFill(picture); // a fill may end while the file is made
  try {
    const blob = await result(picture, settings.format);
    const kind = { "image/jpeg": "jpg", "image/tiff": "tif", "image/x-portable-pixmap": "ppm", "image/x-tga": "tga" }[blob.type] || blob.type.split("/")[1];
    const own = picture.name.includes(".") ? picture.name.split(".").pop() : "";
    const same = !settings.format && (EXTENSIONS[picture.format] || picture.format) === kind;
    const name = `${stem(picture.name)}_filled.${same && own ? own : kind}`;
    download(blob, name);
    picture.saved = shown;
    say(t("saved", { name }), "done");
  } catch (error) {
    editor.fail(error);
  }
}

async function copy() {
  const { picture } = editor;
  if (!picture) return;
  if (!navigator.clipboard) {
    say(t("noClipboard"), "error");
    return;
  }
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": result(picture, "png") })]);
    say(t("copied"), "done");
  } catch (error) {
    editor.fail(error);
  }
}

// -- comparing ------------------------------------------------------------------------------------------------

function peek(on) {
  if (on && !editor.picture?.position) return;
  view.peek(on);
  $("#peek").classList.toggle("held", on);
  $("#badge").hidden = !on;
}
const peekButton = $("#peek");
peekButton.addEventListener("pointerdown", () => peek(true));
for (const name of ["pointerup", "pointercancel", "pointerleave", "blur"]) peekButton.addEventListener(name, () => peek(false));
peekButton.addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && peek(true));
peekButton.addEventListener("keyup", () => peek(false));

async function compare() {
  const { picture } = editor;
  const dialog = $("#slider");
  if (dialog.open) {
    dialog.close();
    return;
  }
  if (!picture?.position) return;
  try {
    const urls = await Promise.all(
      [0, picture.position].map(async (position) => {
        const response = await editor.callFor(picture, `/view?position=${position}`);
        return URL.createObjectURL(await response.blob());
      }),
    );
    const slider = document.createElement("img-comparison-slider");
    slider.setAttribute("aria-label", t("sliderLabel"));
    slider.setAttribute("role", "slider");
    slider.setAttribute("aria-valuemin", "0");
    slider.setAttribute("aria-valuemax", "100");
    slider.setAttribute("aria-valuenow", "50");
    slider.addEventListener("slide", (event) => slider.setAttribute("aria-valuenow", String(Math.round(event.target.value))));
    slider.setAttribute("keyboard", "enabled");
    ["before", "after"].forEach((name, i) => {
      const image = document.createElement("img");
      image.slot = ["first", "second"][i];
      image.src = urls[i];
      image.alt = t(name);
      image.width = picture.width;
      image.height = picture.height;
      slider.append(image);
    });
    $("#slider-place").replaceChildren(slider);
    const room = [innerWidth - (innerWidth > 720 ? 96 : 24), innerHeight - 140];
    const scale = Math.min(room[0] / picture.width, room[1] / picture.height);
    slider.style.width = `${Math.round(picture.width * scale)}px`;
    slider.style.height = `${Math.round(picture.height * scale)}px`;
    dialog.onclose = () => urls.forEach((url) => URL.revokeObjectURL(url));
    dialog.showModal();
    slider.focus();
  } catch (error) {
    editor.fail(error);
  }
}

async function stages() {
  const dialog = $("#stage-dialog");
  if (dialog.open) {
    dialog.close();
    return;
  }
  const { picture } = editor;
  if (!picture?.position) {
    say(t("stagesNone"));
    return;
  }
  say(t("filling"), "busy");
  try {
    const told = await (await editor.callFor(picture, `/stages?position=${picture.position}`)).json();
    $("#stage-figures").replaceChildren(
      ...told.stages.map(({ name, image }) => {
        const figure = document.createElement("figure");
        const shown = document.createElement("img");
        shown.src = image;
        shown.alt = "";
        const caption = document.createElement("figcaption");
        caption.textContent = t(`stage_${name}`);
        figure.append(shown, caption);
        return figure;
      }),
    );
    $("#status").classList.remove("shown");
    dialog.showModal();
  } catch (error) {
    editor.fail(error);
  }
}

// -- settings -------------------------------------------------------------------------------------------------

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value, false, value === chosen)));
}
if (!server.strategies.includes(settings.strategy)) settings.strategy = "auto";
if (!server.formats.includes(settings.format)) settings.format = "";
options($("#strategy"), server.strategies.map((name) => [name, t(`strategy_${name}`)]), settings.strategy);
options($("#format"), [["", t("saveOwn")], ...server.formats.map((name) => [name, name.toUpperCase()])], settings.format);
if (!server.models.some(({ name }) => name === settings.model)) settings.model = "";
options($("#model"), server.models.map(({ name }) => [name, name]), settings.model || server.models[0].name);
for (const name of ["strategy", "model", "format"]) {
  $(`#${name}`).addEventListener("change", (event) => (settings[name] = event.target.value));
}
for (const name of ["dilate", "feather"]) {
  const show = () => ($(`#${name}-value`).textContent = `${settings[name]} ${t("pixels")}`);
  $(`#${name}`).value = String(settings[name]);
  $(`#${name}`).addEventListener("input", (event) => {
    settings[name] = Number(event.target.value);
    show();
  });
  show();
}
$("#auto").checked = settings.auto;
$("#auto").addEventListener("change", (event) => (settings.auto = event.target.checked));
$("#colour").value = settings.colour;
$("#colour").addEventListener("input", (event) => {
  settings.colour = view.colour = event.target.value;
});

function showPanel() {
  $("#panel").hidden = !settings.panel;
  $("#settings").setAttribute("aria-expanded", String(settings.panel));
  view.resize(settings.panel && innerWidth > 1000 ? $("#panel").offsetWidth : 0);
}
function togglePanel() {
  settings.panel = !settings.panel;
  showPanel();
  if (settings.panel) $("#panel-close").focus();
  else $("#settings").focus();
}
if (innerWidth <= 720) settings.panel = false;
showPanel();

const prefersLight = matchMedia("(prefers-color-scheme: light)");
function showTheme() {
  document.documentElement.dataset.theme = settings.theme || (prefersLight.matches ? "light" : "dark");
}
prefersLight.addEventListener("change", showTheme);
showTheme();

$("#keys").replaceChildren(
  ...KEYS.map(([keys, told]) => {
    const row = document.createElement("div");
    const [term, meaning] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = keys;
    meaning.textContent = told;
    row.append(term, meaning);
    return row;
  }),
);

// -- actions --------------------------------------------------------------------------------------------------

const actions = {
  brush: () => choose("brush"),
  eraser: () => choose("eraser"),
  rectangle: () => choose("rectangle"),
  lasso: () => choose("lasso"),
  swap: () => choose(settings.tool === "eraser" ? (before === "eraser" ? "brush" : before) : "eraser"),
  smaller: (coarse) => input.resize(coarse ? 0.7 : 0.89),
  larger: (coarse) => input.resize(coarse ? 1.43 : 1.12),
  fit: () => view.fit(),
  whole: () => view.zoom(1 / view.scale),
  zoomIn: () => view.zoom(1.3),
  zoomOut: () => view.zoom(1 / 1.3),
  undo: () => editor.undo(),
  redo: () => editor.redo(),
  fill: () => editor.fill(),
  invert: () => editor.add({ kind: "invert" }),
  clear: () => editor.clear(),
  previous: () => editor.goTo(editor.number - 1),
  next: () => editor.goTo(editor.number + 1),
  open: () => $("#file").click(),
  peekOn: () => peek(true),
  peekOff: () => peek(false),
  escape: () => closeMenu() || input.drop() || editor.cancel() || (settings.panel && innerWidth <= 720 && togglePanel()),
  help: () => $("#help-dialog").showModal(),
  theme: () => {
    settings.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    showTheme();
  },
  tell: (text) => ($("#spoken").textContent = text),
  home: async () => (await mayDiscard()) && editor.close(),
  "mask-import": () => $("#mask-file").click(),
  "mask-export": exportMask,
  settings: togglePanel,
  save,
  copy,
  compare,
  stages,
  sized,
};
const input = new Input(view, editor, actions);

/** Closes the mask's menu; the focus goes from it to `next`. */
function closeMenu(next = $("#mask-menu summary")) {
  const menu = $("#mask-menu");
  if (!menu.open) return false;
  menu.open = false;
  next.focus({ preventScroll: true });
  return true;
}

for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", (event) => {
    actions[button.dataset.do]();
    // After a click of the pointer, Enter and Space are for the picture.
    if (button.closest("#mask-menu")) closeMenu(event.detail ? $("#stage") : undefined);
  });
}
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
document.addEventListener("click", (event) => {
  const menu = $("#mask-menu");
  if (menu.open && !menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  if ((event.key === "v" && $("#slider").open) || (event.key === "t" && $("#stage-dialog").open)) {
    document.querySelector("dialog[open]").close();
  }
});
addEventListener("beforeunload", (event) => {
  if (editor.unsaved.length) event.preventDefault();
});

update();
sized();
document.documentElement.classList.add("ready");
performance.mark("lgnet-ready");
