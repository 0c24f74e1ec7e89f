// Pointers and keys on the picture: painting, erasing, moving.
import { SIZES, settings } from "./settings.js";
import { t } from "./text.js";

const LEAST = 2; // pixels of the picture: a thinner brush may cover no pixel by half, and would paint nothing
const CLOSE = 2; // screen pixels below which a shape is a slip

/** The key of an event. For a letter that is not of the Latin alphabet, what a keyboard of the US has at its place. */
export function keyOf({ key, code }) {
  if (!/^\p{L}$/u.test(key) || /^\p{Script=Latin}$/u.test(key)) return key;
  return { BracketLeft: "[", BracketRight: "]" }[code] ?? (/^Key[A-Z]$/.test(code) ? code[3] : key);
}

export class Input {
  /** `actions`: functions for keys that act outside the picture, by name. */
  constructor(view, editor, actions) {
    Object.assign(this, { view, editor, actions });
    this.container = view.container;
    this.cursor = document.querySelector("#cursor");
    this.pointers = new Map();
    this.held = new Set();
    this.penSeen = false;
    this.last = null;
    const on = (name, call, options) => this.container.addEventListener(name, call, options);
    on("pointerdown", (event) => this.down(event));
    on("pointermove", (event) => this.move(event));
    on("pointerup", (event) => this.up(event));
    for (const name of ["pointercancel", "lostpointercapture"]) on(name, (event) => this.up(event, true));
    on("pointerleave", () => this.pointers.size || (this.cursor.hidden = true));
    on("contextmenu", (event) => event.preventDefault());
    on("wheel", (event) => this.wheel(event), { passive: false });
    on("blur", () => this.keyboardEnd());
    // On the document, because the picture may not have the focus.
    document.addEventListener("keydown", (event) => this.keyDown(event));
    document.addEventListener("keyup", (event) => this.keyUp(event));
    addEventListener("blur", () => this.release());
    addEventListener("pointerdown", () => document.body.classList.remove("keys"), { capture: true });
  }

  get stroke() {
    return this.editor.stroke;
  }

  set stroke(stroke) {
    this.editor.stroke = stroke;
  }

  /** Of the brush, in pixels of the picture. */
  get width() {
    return this.editor.picture ? Math.max(LEAST, settings.size / this.view.scale) : settings.size;
  }

  // -- pointers -----------------------------------------------------------------------------------------------

  at(event) {
    const box = this.container.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  /** What is down of a kind: "touch", "pen" or "mouse". */
  of(kind) {
    return [...this.pointers.values()].filter(({ pointerType }) => pointerType === kind);
  }

  down(event) {
    if (!this.editor.picture) return;
    // While a pen is down, what touches is the palm of its hand, which may have come before it.
    if (event.pointerType === "touch" && this.of("pen").length) return;
    if (event.pointerType === "pen") {
      for (const finger of this.of("touch")) this.up(finger, true);
    }
    this.container.focus({ preventScroll: true });
    this.keyboard = null;
    this.container.setPointerCapture(event.pointerId);
    const [x, y] = this.at(event);
    const { pointerId, pointerType } = event;
    this.pointers.set(pointerId, { pointerId, pointerType, x, y });
    this.penSeen ||= pointerType === "pen";
    if (this.of("touch").length > 1) {
      this.drop(); // the second finger of a pinch: what the first one began is no stroke
      return;
    }
    const pans =
      event.button === 1 || this.held.has(" ") || (pointerType === "touch" && this.penSeen) || this.stroke;
    if (pans) {
      if (event.button === 1) event.preventDefault();
      this.panning = event.pointerId;
      this.container.classList.add("panning");
      return;
    }
    if (event.button === 0 || event.button === 2 || event.button === 5) {
      this.begin(x, y, event.button !== 0 || event.altKey || (event.buttons & 32) !== 0, event);
    }
  }

  move(event) {
    const [x, y] = this.at(event);
    this.showCursor(x, y, event.pointerType);
    const known = this.pointers.get(event.pointerId);
    if (!known) return;
    const before = { ...known };
    Object.assign(known, { x, y });
    const fingers = this.of("touch");
    if (fingers.length === 2) {
      const [a, b] = fingers;
      const other = known === a ? b : a;
      const apart = Math.hypot(x - other.x, y - other.y);
      const was = Math.hypot(before.x - other.x, before.y - other.y);
      this.view.pan((x - before.x) / 2, (y - before.y) / 2);
      if (was > 0 && apart > 0) this.view.zoom(apart / was, (x + other.x) / 2, (y + other.y) / 2);
    } else if (this.panning === event.pointerId) {
      this.view.pan(x - before.x, y - before.y);
    } else if (this.stroke?.pointer === event.pointerId) {
      const events = event.getCoalescedEvents?.() || [];
      for (const one of events.length ? events : [event]) this.extend(...this.at(one));
    }
  }

  up(event, cancelled = false) {
    if (!this.pointers.delete(event.pointerId)) return;
    if (this.panning === event.pointerId) {
      this.panning = null;
      this.container.classList.remove("panning");
    } else if (this.stroke?.pointer === event.pointerId) {
      if (cancelled) this.drop();
      else this.finish(event.ctrlKey || event.metaKey, event.timeStamp);
    }
    if (event.pointerType === "touch") this.cursor.hidden = true;
  }

  wheel(event) {
    event.preventDefault();
    if (!this.editor.picture) return;
    const [x, y] = this.at(event);
    const steps = event.deltaY / (event.deltaMode === 1 ? 3 : 100);
    if (event.altKey) {
      this.resize(Math.pow(1.12, -(steps || event.deltaX / 100)));
      this.showCursor(x, y, "mouse");
    } else {
      // A pinch on a trackpad gives wheel events with Ctrl and small steps.
      this.view.zoom(Math.pow(event.ctrlKey ? 2.2 : 1.2, -steps), x, y);
      this.showCursor(x, y, "mouse");
    }
  }

  // -- strokes ------------------------------------------------------------------------------------------------

  begin(x, y, erase, event = {}) {
    const tool = settings.tool === "eraser" ? "brush" : settings.tool;
    const erases = erase || settings.tool === "eraser";
    const point = this.view.toPicture(x, y);
    const { picture } = this.editor;
    if (tool === "rectangle") this.stroke = { kind: "rectangle", from: point, x: point[0], y: point[1], width: 0, height: 0 };
    else if (tool === "lasso") this.stroke = { kind: "lasso", points: [...point] };
    else {
      this.stroke = { kind: "stroke", points: [...point], width: this.width };
      const joins = event.shiftKey && this.last?.picture === picture;
      if (joins) this.stroke.points.unshift(...this.last.point);
    }
    this.stroke.erase = erases;
    this.stroke.pointer = event.pointerId;
    this.editor.showStroke();
  }

  extend(x, y) {
    const { stroke } = this;
    const point = this.view.toPicture(x, y);
    if (stroke.kind === "rectangle") {
      const [a, b] = stroke.from;
      stroke.x = Math.round(Math.min(a, point[0]));
      stroke.y = Math.round(Math.min(b, point[1]));
      stroke.width = Math.round(Math.max(a, point[0])) - stroke.x;
      stroke.height = Math.round(Math.max(b, point[1])) - stroke.y;
    } else {
      const { points } = stroke;
      const apart = Math.hypot(point[0] - points.at(-2), point[1] - points.at(-1));
      if (apart * this.view.scale >= 0.75) points.push(...point);
    }
    this.editor.showStroke();
  }

  finish(collect = false, released = performance.now()) {
    const { stroke } = this;
    this.stroke = null;
    if (!stroke || !this.editor.picture) return;
    const empty =
      (stroke.kind === "rectangle" && Math.min(stroke.width, stroke.height) * this.view.scale < CLOSE) ||
      (stroke.kind === "lasso" && stroke.points.length < 6);
    if (empty) {
      this.editor.showStroke();
      return;
    }
    if (stroke.kind === "stroke") {
      this.last = { picture: this.editor.picture, point: stroke.points.slice(-2) };
    }
    const { kind, points, width, height, x, y, erase } = stroke;
    const added = this.editor.add({ kind, points, width, height, x, y, erase });
    this.collecting ||= collect;
    if (added && settings.auto && !collect && !erase) this.editor.fill(released);
  }

  /** Forgets the stroke that is being painted. */
  drop() {
    if (!this.stroke) return false;
    this.stroke = null;
    this.editor.showStroke();
    return true;
  }

  resize(factor) {
    const size = Math.min(SIZES.most, Math.max(SIZES.least, settings.size * factor));
    settings.size = factor > 1 ? Math.max(size, settings.size + 1) : Math.min(size, settings.size - 1);
    settings.size = Math.min(SIZES.most, Math.max(SIZES.least, Math.round(settings.size)));
    this.actions.sized();
  }

  showCursor(x, y, kind) {
    const paints = ["brush", "eraser"].includes(settings.tool) && this.editor.picture && !this.held.has(" ");
    this.cursor.hidden = !paints || kind === "touch";
    if (this.cursor.hidden) return;
    const across = this.width * this.view.scale;
    this.cursor.style.width = this.cursor.style.height = `${across}px`;
    this.cursor.style.transform = `translate(${x - across / 2}px, ${y - across / 2}px)`;
    this.cursor.classList.toggle("erases", settings.tool === "eraser");
    this.place = [x, y];
  }

  // -- keys ---------------------------------------------------------------------------------------------------

  keyDown(event) {
    if (/^(Tab|Arrow)/.test(event.key)) document.body.classList.add("keys");
    const field = event.target.closest?.("input:not([type=range]):not([type=checkbox]), select, textarea, [role=menu]");
    const dialog = document.querySelector("dialog[open]");
    if (event.key === "Escape") {
      if (!dialog) this.actions.escape();
      return;
    }
    if (dialog || (field && !(event.ctrlKey || event.metaKey))) return;
    const key = keyOf(event);
    // Alt with these is the browser's: back, address, tabs. Other characters may need Alt to be typed.
    if (event.altKey && !this.stroke && (key.length > 1 || /[a-z\d]/i.test(key))) return;
    if (key.startsWith("Page") && event.target.type === "range") return;
    const onStage = event.target === this.container;
    const onButton = Boolean(event.target.closest?.("button, a, label, summary, input, img-comparison-slider"));
    if (event.ctrlKey || event.metaKey) {
      // With Shift, the other letters are the browser's.
      const names = event.shiftKey ? { z: "redo" } : { z: "undo", y: "redo", s: "save", o: "open", c: "copy" };
      const name = names[key.toLowerCase()];
      if (!name || (field && name !== "save")) return;
      if (name === "copy" && String(getSelection())) return;
      event.preventDefault();
      this.actions[name]();
      return;
    }
    if (onStage && key.startsWith("Arrow")) {
      event.preventDefault();
      this.keyboardMove(key, event.shiftKey);
      return;
    }
    if (key === " " && !onButton) {
      event.preventDefault();
      if (event.repeat) return;
      if (onStage && this.keyboard) this.begin(...this.keyboard, event.altKey);
      else {
        this.held.add(" ");
        this.container.classList.add("grab");
        this.cursor.hidden = true;
      }
      return;
    }
    if (key === "Enter" && onButton) return;
    const named = {
      d: "brush", e: "eraser", r: "rectangle", l: "lasso", x: "swap", "[": "smaller", "]": "larger", "{": "smaller",
      "}": "larger", "0": "fit", "1": "whole", "+": "zoomIn", "=": "zoomIn", "-": "zoomOut", v: "compare",
      t: "stages", i: "invert", delete: "clear", backspace: "clear", enter: "fill", pageup: "previous",
      pagedown: "next", "?": "help", b: "peekOn", "\\": "peekOn",
    }[key.toLowerCase()];
    if (!named) return;
    event.preventDefault();
    if (!event.repeat || ["smaller", "larger", "zoomIn", "zoomOut"].includes(named)) {
      this.actions[named](event.shiftKey || key === "{" || key === "}");
    }
  }

  keyUp(event) {
    if (event.key === " ") {
      this.held.delete(" ");
      this.container.classList.remove("grab");
      if (this.stroke && this.stroke.pointer === undefined) this.finish(event.ctrlKey);
    } else if (["b", "\\"].includes(keyOf(event).toLowerCase())) this.actions.peekOff();
    else if (["Control", "Meta"].includes(event.key)) this.collected();
  }

  /** Ctrl was released: fill the collected operations. */
  collected() {
    if (this.collecting && settings.auto && this.editor.painted && !this.stroke) this.editor.fill();
    this.collecting = false;
  }

  release() {
    this.held.clear();
    this.container.classList.remove("grab");
    this.actions.peekOff();
  }

  keyboardMove(key, fine) {
    if (!this.editor.picture) return;
    const { width, height } = this.container.getBoundingClientRect();
    const step = fine ? 2 : 12;
    this.keyboard ||= [width / 2, height / 2];
    let [x, y] = this.keyboard;
    x += { ArrowLeft: -step, ArrowRight: step }[key] || 0;
    y += { ArrowUp: -step, ArrowDown: step }[key] || 0;
    this.keyboard = [Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))];
    this.view.follow(x - this.keyboard[0], y - this.keyboard[1]);
    this.showCursor(...this.keyboard, "keyboard");
    if (this.stroke) this.extend(...this.keyboard);
    const [left, top] = this.view.toPicture(...this.keyboard).map(Math.round);
    this.actions.tell(t("keyboardBrush", { x: left, y: top }));
  }

  keyboardEnd() {
    if (this.stroke && this.stroke.pointer === undefined) this.drop();
    this.keyboard = null;
  }
}
