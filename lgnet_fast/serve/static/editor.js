// One open picture: its mask, its fills, its history, and the queue of operations to be filled.
import { bitmap, call, json, timings } from "./api.js";
import { encode, reach } from "./mask.js";
import { settings } from "./settings.js";
import { t } from "./text.js";

/** What a user is told of an error. */
export function reasonOf(error) {
  if (error.status === 0) return t("unreachable");
  if (error.status === 401) return t("locked");
  return /allow_any_mask/.test(error.message) ? t("mostlyHole") : error.message;
}

/** Number of operations of a picture that are not filled yet. */
function paintedIn({ pending }) {
  return pending.length - 1 - pending.findLastIndex((one) => one.all);
}

/** The last fill that a picture shows: it stands for all of them, because a fill is made on one state only. */
export const shownFill = (picture) => picture.fills[picture.position - 1];

const asEntries = (operations) => operations.map((operation) => ({ kind: "operation", operation }));

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
    for (const picture of this.pictures) {
      this.cancel(picture);
      if (picture.id) call(`/api/v1/pictures/${picture.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
    }
    this.pictures = [];
    this.number = -1;
    this.view.hide();
    this.changed();
  }

  async goTo(number) {
    if (!this.pictures[number]) return;
    this.number = number;
    const picture = this.pictures[number];
    this.say(t("opening"), "busy");
    this.changed();
    try {
      if (!picture.open) await (picture.opening ??= this.prepare(picture).finally(() => (picture.opening = null)));
    } catch (error) {
      await this.leave(picture, error);
      return;
    }
    if (this.pictures[this.number] !== picture) return;
    this.view.show(picture);
    this.showMask();
    this.changed();
    performance.mark("lgnet-opened");
    this.say(t("opened", picture));
  }

  async prepare(picture) {
    await this.upload(picture);
    picture.preview = await bitmap(`/api/v1/pictures/${picture.id}/view`, { waiting: this.waiting });
    Object.assign(picture, { open: true, fills: [], position: 0, history: [], done: 0, pending: [], running: null });
  }

  /** Shows another picture than one that could not be opened, or closes all where there is none. */
  async leave(picture, error) {
    const at = this.pictures.indexOf(picture);
    if (at < 0) return;
    const current = at === this.number;
    // A file that the server cannot read leaves the list; one that came at a bad time stays.
    const later = [0, 401, 429].includes(error.status) || error.status >= 500;
    if (!later) this.pictures.splice(at, 1);
    if (!later && at < this.number) this.number--;
    const next = later ? this.pictures.findIndex((one) => one.open) : Math.min(at, this.pictures.length - 1);
    if (current && next < 0) this.close();
    else if (current) await this.goTo(next);
    this.changed();
    this.say(`${picture.name}: ${reasonOf(error)}`, "error");
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
    await picture.reopening;
    const { id } = picture;
    try {
      return await ask();
    } catch (error) {
      if (error.status !== 404) throw error;
      // Several calls may find it gone: it is sent once, and all of them wait for that.
      if (picture.id === id) picture.reopening ??= this.reopen(picture).finally(() => (picture.reopening = null));
      await picture.reopening;
      return ask();
    }
  }

  async reopen(picture) {
    await this.upload(picture);
    for (const fill of picture.fills) await this.send(picture, fill);
    this.say(t("reopened"));
  }

  /** The pictures with fills that no saved file has, or with strokes that are not filled. */
  get unsaved() {
    return this.pictures.filter(
      (one) => one.open && (one.running || paintedIn(one) > 0 || (one.position > 0 && shownFill(one) !== one.saved)),
    );
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
    if (operation.erase && !this.painted) {
      this.showMask();
      return;
    }
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
    return this.picture ? paintedIn(this.picture) : 0;
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
   * `released`: time at which the pointer was released, for the duration that is shown. A fill goes on while another
   * picture is shown.
   */
  async fill(released = performance.now(), picture = this.picture) {
    if (!picture) return;
    if (picture.running) {
      picture.again = true;
      this.say(t("fillingMore", { count: picture.pending.length }), "busy");
      return;
    }
    if (!paintedIn(picture)) {
      this.say(t("nothing"));
      return;
    }
    const { pending: operations, history, done } = picture;
    const running = { operations, history, done, abort: new AbortController() };
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
      running.made = true;
      this.rememberFill(picture, fill);
      if (this.picture === picture) this.view.history();
      await drawn();
      fill.milliseconds = performance.now() - released;
      performance.measure("lgnet-fill", { start: released, end: performance.now() });
      picture.last = fill;
      if (this.picture === picture) this.say(t("filled", { ms: Math.round(fill.milliseconds) }), "done");
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    } finally {
      if (picture.running === running) {
        picture.running = null;
        const again = picture.again && running.made && picture.pending.length > 0;
        picture.again = false;
        if (!running.made) this.restore(picture, running);
        if (again) this.fill(undefined, picture);
      }
      if (this.picture === picture) this.showMask();
      this.changed();
    }
  }

  /** Puts the strokes of a fill that failed back, before those that were painted while it ran. */
  restore(picture, { operations, history, done }) {
    const waiting = picture.pending;
    picture.pending = [...operations, ...waiting];
    picture.history = waiting.length ? [...history.slice(0, done), ...asEntries(waiting)] : history;
    picture.done = done + waiting.length;
  }

  /** Puts a fill into the history before the strokes that were painted while it ran. */
  rememberFill(picture, fill) {
    const before = picture.history.slice(0, picture.done).filter((one) => one.kind !== "operation");
    picture.history = [...before, { kind: "fill", fill }, ...asEntries(picture.pending)];
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
    const sheet = await createImageBitmap(await response.blob());
    let top = 0;
    fill.parts = [];
    for (const [left, upper, width, height] of boxes) {
      fill.parts.push({ x: left, y: upper, image: await createImageBitmap(sheet, 0, top, width, height) });
      top += height;
    }
    sheet.close();
    fill.phases = timings(response);
    fill.backend = response.headers.get("X-Backend");
    fill.strategy = response.headers.get("X-Strategy");
    fill.passes = Number(response.headers.get("X-Passes"));
  }

  /** Ends the running fill; its strokes and the waiting ones are dropped. */
  cancel(picture = this.picture) {
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
    this.say(reasonOf(error), "error");
  }
}

/** Resolves when the changes are on the screen. */
const drawn = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
