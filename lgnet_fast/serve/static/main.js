// The controls of the page, and the connections between picture, editor and input.
import { compare, peek, stages } from "./comparing.js";
import { Input, keyOf } from "./input.js";
import { mayDiscard } from "./opening.js";
import { $, editor, row, server, view } from "./page.js";
import { copy, exportMask, save, saveAll } from "./saving.js";
import { SIZES, TOOLS, settings } from "./settings.js";
import { KEYS, t } from "./text.js";

editor.changed = update;
view.moved = showZoom;

// -- what can be done now -------------------------------------------------------------------------------------

function update() {
  const { picture } = editor;
  if (!picture?.position) peek(false);
  const chosen = editor.pictures[editor.number]; // is opened where it is not the picture yet
  document.body.classList.toggle("editing", Boolean(chosen));
  document.body.classList.toggle("opening", Boolean(chosen && !picture));
  document.body.classList.toggle("filling", Boolean(picture?.running));
  if (chosen && $("#start").contains(document.activeElement)) focusStage();
  $("#start").hidden = Boolean(chosen);
  for (const id of ["#save", "#mask-import", "#invert"]) $(id).disabled = !picture;
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
  $("#name").textContent = $("#name").title = chosen?.name ?? "";
  const about = picture && [`${picture.width} × ${picture.height}`, picture.format.toUpperCase()];
  if (picture?.depth > 8) about.push("16 bit");
  if (picture?.frames > 1) about.push(t("frames", picture));
  $("#about").textContent = about?.join(" · ") ?? "";
  showLast(picture?.last);
  for (const button of document.querySelectorAll("button[data-tool]")) {
    button.setAttribute("aria-checked", String(button.dataset.tool === settings.tool));
    button.tabIndex = button.dataset.tool === settings.tool ? 0 : -1;
  }
  $("#stage").dataset.tool = settings.tool;
}

function focusStage() {
  $("#stage").focus({ preventScroll: true });
}

function showZoom() {
  $("#zoom").textContent = `${Math.round(view.scale * 100)} %`;
  sized();
}

function sized() {
  $("#size").value = String(Math.round(1000 * (Math.log(settings.size / SIZES.least) / Math.log(SIZES.most / SIZES.least))));
  const pixels = Math.round(input.width);
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
      const bar = document.createElement("meter");
      bar.max = most;
      bar.value = ms;
      bar.setAttribute("aria-label", t(`phase_${name}`));
      const text = document.createElement("span");
      text.textContent = `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
      return row(t(`phase_${name}`), bar, text);
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

function addRectangle(event) {
  event.preventDefault();
  const { picture } = editor;
  if (!picture) return;
  const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => Number($(`#rectangle-${name}`).value));
  if (!(width > 0 && height > 0)) return;
  if (editor.add({ kind: "rectangle", x, y, width, height }) && settings.auto) editor.fill();
}
$("#numbers").addEventListener("submit", addRectangle);

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
addEventListener("resize", showPanel); // the picture is beside it, or below it

const prefersLight = matchMedia("(prefers-color-scheme: light)");
function showTheme() {
  document.documentElement.dataset.theme = settings.theme || (prefersLight.matches ? "light" : "dark");
}
prefersLight.addEventListener("change", showTheme);
showTheme();

$("#keys").replaceChildren(...KEYS.map(([keys, told]) => row(keys, told)));

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
  saveAll,
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
  // A click beside a dialog closes it; not the end of a drag that began in it.
  let began = null;
  dialog.addEventListener("pointerdown", (event) => (began = event.target));
  dialog.addEventListener("click", (event) => event.target === dialog && began === dialog && dialog.close());
}
for (const bar of document.querySelectorAll("header, #tools, #dock")) {
  // After a click of the pointer, Enter and Space are for the picture.
  bar.addEventListener("click", (event) => {
    if (event.pointerType && event.target.closest("button, input") === document.activeElement) focusStage();
  });
}
document.addEventListener("click", (event) => {
  const menu = $("#mask-menu");
  if (menu.open && !menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  const key = keyOf(event).toLowerCase();
  if ((key === "v" && $("#slider").open) || (key === "t" && $("#stage-dialog").open)) {
    document.querySelector("dialog[open]").close();
  }
});
addEventListener("beforeunload", (event) => {
  if (editor.unsaved.length) event.preventDefault();
});
addEventListener("pagehide", (event) => event.persisted || editor.free());

update();
sized();
document.documentElement.classList.add("ready");
performance.mark("lgnet-ready");
