// One open picture: its mask, its fills, its history, and the queue of operations to be filled.
import { ApiError, bitmap, call, json, timings } from "./api.js";
import { encode, reach } from "./mask.js";
import { settings } from "./settings.js";
import { t } from "./text.js";

export class Editor {
  /** `say(text, kind)` shows a message; `changed()` is called after every change of the possible actions. */
  constructor(view, { say, changed }) {
    this.view = view;
    this.say = say;
    this.changed = changed;
    this.pictures = [];
    this.number = -1;
  }

  get picture() {
    return this.pictures[this.number]?.open ? this.pictures[this.number] : null;
  }

  // -- pictures -----------------------------------------------------------------------------------------------

  /** Opens sources: {name, file} or {name, sample}; shows the first. */
  async open(sources) {
    this.close();
    this.pictures = sources;
    await this.goTo(0);
  }

  close() {
    this.cancel();
    for (const picture of this.pictures) {
      if (picture.id) call(`/api/v1/pictures/${picture.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
    }
    this.pictures = [];
    this.number = -1;
    this.view.hide();
    this.changed();
  }

  async goTo(number) {
    if (!this.pictures[number]) return;
    this.cancel();
    this.number = number;
    const picture = this.pictures[number];
    this.say(t("opening"), "busy");
    this.changed();
    try {
      if (!picture.open) {
        await this.upload(picture);
        picture.preview = await bitmap(`/api/v1/pictures/${picture.id}/view`, { waiting: this.waiting });
        Object.assign(picture, { open: true, fills: [], position: 0, history: [], done: 0, pending: [], running: null });
      }
    } catch (error) {
      if (this.pictures[number] !== picture) return;
      if (!picture.open) {
        this.pictures.splice(number, 1);
        this.number = Math.min(number, this.pictures.length - 1);
        if (this.picture) this.view.show(this.picture);
        else this.view.hide();
      }
      this.changed();
      this.fail(error);
      return;
    }
    if (this.pictures[this.number] !== picture) return;
    this.view.show(picture);
    this.showMask();
    this.changed();
    performance.mark("lgnet-opened");
    this.say(t("opened", picture));
  }

  async upload(picture) {
    const body = picture.file;
    const path = picture.sample ? `/api/v1/pictures?sample=${picture.sample}` : "/api/v1/pictures";
    const type = "application/octet-stream";
    const told = await json(path, { method: "POST", body, type, waiting: this.waiting });
    Object.assign(picture, told);
  }

  /** A call for a picture. If the server has dropped the picture, it is sent again with all its fills. */
  async callFor(picture, rest, options = {}) {
    const ask = () => call(`/api/v1/pictures/${picture.id}${rest}`, { ...options, waiting: this.waiting });
    try {
      return await ask();
    } catch (error) {
      if (error.status !== 404) throw error;
      await this.upload(picture);
      for (const fill of picture.fills) await this.send(picture, fill);
      this.say(t("reopened"));
      return ask();
    }
  }

  // -- mask and history ---------------------------------------------------------------------------------------

  showMask() {
    const { picture } = this;
    this.view.mask({ running: picture?.running?.operations || [], pending: picture?.pending || [], current: [] });
  }

  /** Adds an operation to the mask. */
  add(operation) {
    const { picture } = this;
    if (!picture) return;
    picture.pending = [...picture.pending, operation];
    this.remember({ kind: "operation", operation });
    this.showMask();
    this.changed();
  }

  remember(entry) {
    const { picture } = this;
    picture.history = [...picture.history.slice(0, picture.done), entry];
    picture.done = picture.history.length;
  }

  clear() {
    const { picture } = this;
    if (!this.painted) return;
    const { width, height } = picture;
    this.add({ kind: "rectangle", x: 0, y: 0, width, height, erase: true, all: true });
    this.say(t("cleared"));
  }

  /** Number of operations that are not filled yet. */
  get painted() {
    const pending = this.picture?.pending || [];
    return pending.length - 1 - pending.findLastIndex((one) => one.all);
  }

  get canUndo() {
    return Boolean(this.picture && (this.picture.done > 0 || this.picture.running));
  }

  get canRedo() {
    return Boolean(this.picture && !this.picture.running && this.picture.done < this.picture.history.length);
  }

  undo() {
    const { picture } = this;
    if (!this.canUndo) return;
    if (picture.running) {
      this.cancel();
      return;
    }
    this.step(picture.done - 1, picture.history[picture.done - 1], "undone");
  }

  redo() {
    const { picture } = this;
    if (this.canRedo) this.step(picture.done + 1, picture.history[picture.done], "redone");
  }

  step(done, entry, told) {
    const { picture } = this;
    picture.done = done;
    if (entry.kind === "operation") {
      picture.pending =
        told === "undone" ? picture.pending.slice(0, -1) : [...picture.pending, entry.operation];
      this.showMask();
    } else {
      picture.position += told === "undone" ? -1 : 1; // the server is told with whatever it is asked next
      this.view.history();
    }
    this.changed();
    this.say(t(told));
  }

  // -- fills --------------------------------------------------------------------------------------------------

  /**
   * Fills the painted operations. While a fill runs, they wait, and are filled together with later ones.
   * `released`: time at which the pointer was released, for the duration that is shown.
   */
  async fill(released = performance.now()) {
    const { picture } = this;
    if (!picture) return;
    if (picture.running) {
      picture.again = true;
      this.say(t("fillingMore", { count: picture.pending.length }), "busy");
      return;
    }
    if (!this.painted) {
      this.say(t("nothing"));
      return;
    }
    const operations = picture.pending;
    const running = { operations, abort: new AbortController() };
    picture.running = running;
    picture.pending = [];
    picture.history = picture.history.slice(0, picture.done).filter((one) => one.kind !== "operation");
    picture.done = picture.history.length;
    this.showMask();
    this.changed();
    this.say(t("filling"), "busy");
    try {
      const box = reach(operations, picture);
      const blob = box && (await encode(operations, box, picture));
      if (!blob) {
        this.say(t("nothing"));
        return;
      }
      const { strategy, dilate, feather, model } = settings;
      const fill = { blob, box, options: { strategy, dilate, feather, ...(model && { model }) } };
      fill.position = picture.position;
      await this.send(picture, fill, running.abort.signal);
      if (running.abort.signal.aborted) return;
      picture.fills = [...picture.fills.slice(0, picture.position), fill];
      picture.position = picture.fills.length;
      this.rememberFill(fill);
      if (this.picture === picture) this.view.history();
      await drawn();
      fill.milliseconds = performance.now() - released;
      performance.measure("lgnet-fill", { start: released, end: performance.now() });
      picture.last = fill;
      this.say(t("filled", { ms: Math.round(fill.milliseconds) }), "done");
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    } finally {
      if (picture.running === running) picture.running = null;
      if (this.picture === picture) this.showMask();
      this.changed();
      const again = picture.again && picture.pending.length > 0;
      picture.again = false;
      if (again && this.picture === picture) this.fill();
    }
  }

  /** Puts a fill into the history before the strokes that were painted while it ran. */
  rememberFill(fill) {
    const { picture } = this;
    if (!picture) return;
    const before = picture.history.slice(0, picture.done).filter((one) => one.kind !== "operation");
    const waiting = picture.pending.map((operation) => ({ kind: "operation", operation }));
    picture.history = [...before, { kind: "fill", fill }, ...waiting];
    picture.done = picture.history.length;
  }

  /** Sends a fill and applies the changed pixels. */
  async send(picture, fill, signal) {
    const { x, y } = fill.box;
    const query = new URLSearchParams({ x, y, ...fill.options, position: picture.fills.indexOf(fill) });
    if (!picture.fills.includes(fill)) query.set("position", fill.position);
    const path = `/fill?${query}`;
    const options = { method: "POST", body: fill.blob, type: "image/png", signal };
    const response = picture.fills.includes(fill)
      ? await call(`/api/v1/pictures/${picture.id}${path}`, { ...options, waiting: this.waiting })
      : await this.callFor(picture, path, options);
    const boxes = response.headers.get("X-Boxes").split(";").map((text) => text.split(",").map(Number));
    const blob = await response.blob();
    let top = 0;
    fill.parts = [];
    for (const [left, upper, width, height] of boxes) {
      fill.parts.push({ x: left, y: upper, image: await createImageBitmap(blob, 0, top, width, height) });
      top += height;
    }
    fill.phases = timings(response);
    fill.backend = response.headers.get("X-Backend");
    fill.strategy = response.headers.get("X-Strategy");
    fill.passes = Number(response.headers.get("X-Passes"));
  }

  /** Ends the running fill; its strokes and the waiting ones are dropped. */
  cancel() {
    const { picture } = this;
    if (!picture?.running) return false;
    picture.running.abort.abort();
    picture.running = null;
    picture.pending = [];
    picture.again = false;
    picture.history = picture.history.slice(0, picture.done).filter((one) => one.kind !== "operation");
    picture.done = picture.history.length;
    this.showMask();
    this.changed();
    this.say(t("cancelled"));
    return true;
  }

  waiting = (seconds) => this.say(t("again", { seconds }), "busy");

  fail(error) {
    const text = error instanceof ApiError && error.status === 0 ? t("unreachable") : error.message;
    this.say(text, "error");
  }
}

/** Resolves when the changes are on the screen. */
const drawn = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
