// One open picture: its mask, its fills, its history, and the queue of operations to be filled.
import { bitmapOf, call, json, timings } from "./api.js";
import { encode, reach } from "./mask.js";
import { settings } from "./settings.js";
import { shorten, t } from "./text.js";

const PREVIEWS = 8; // that are kept; those of other pictures are loaded again when they are shown

/** What a user is told of an error. */
export function reasonOf(error) {
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
  /** `say(text, kind)` shows a message. To be set: `changed()`, called after every change of the possible actions. */
  constructor(view, say) {
    this.view = view;
    this.say = say;
    this.changed = () => {};
    this.pictures = [];
    this.recent = []; // pictures with a preview, the latest first
    this.number = -1;
    this.stroke = null; // that is being painted
  }

  /** What is shown; null while it is opened. */
  get picture() {
    return this.pictures[this.number]?.preview ? this.pictures[this.number] : null;
  }

  // -- pictures -----------------------------------------------------------------------------------------------

  /** Opens sources: {name, file} or {name, sample}; shows the first. Whether one is shown, and no file was refused. */
  async open(sources) {
    this.close();
    this.pictures = sources.map((source) => ({ ...source, closing: new AbortController() }));
    return this.goTo(0);
  }

  close() {
    for (const picture of this.pictures) {
      this.cancel(picture);
      picture.closing.abort();
    }
    this.free();
    this.pictures = [];
    this.number = -1;
    this.stroke = null;
    this.view.hide();
    for (const picture of this.recent.splice(0)) picture.preview.close();
    this.changed();
  }

  /** Lets the server close pictures. */
  free(pictures = this.pictures) {
    for (const { id } of pictures) {
      if (id) call(`api/v1/pictures/${id}`, { method: "DELETE", keepalive: true }).catch(() => {});
    }
  }

  /** Whether it is shown, and no file was refused. */
  async goTo(number) {
    const picture = this.pictures[number];
    if (!picture) return false;
    this.number = number;
    this.stroke = null; // it was painted on another picture
    if (!picture.preview) this.view.hide(); // what is seen is what is worked on
    this.say(t("opening"), "busy");
    this.changed();
    try {
      if (!picture.preview) await (picture.opening ??= this.prepare(picture).finally(() => (picture.opening = null)));
    } catch (error) {
      await this.leave(picture, error);
      return false;
    }
    if (this.pictures[this.number] !== picture) return false;
    this.view.show(picture);
    this.keep(picture);
    this.showMask();
    this.changed();
    performance.mark("lgnet-opened");
    this.say(t(picture.frames > 1 ? "openedFrames" : "opened", { ...picture, name: shorten(picture.name) }));
    return true;
  }

  async prepare(picture) {
    if (!picture.open) {
      Object.assign(picture, await this.upload(picture));
      Object.assign(picture, { open: true, fills: [], position: 0, history: [], done: 0, pending: [], running: null });
    }
    const { signal } = picture.closing;
    picture.preview = await bitmapOf(await this.callFor(picture, "/view", { signal }));
  }

  /** Keeps the previews of the latest pictures. */
  keep(picture) {
    this.recent = [picture, ...this.recent.filter((one) => one !== picture)];
    for (const old of this.recent.splice(PREVIEWS)) {
      old.preview.close();
      old.preview = null;
    }
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
    const next = later ? this.pictures.findIndex((one) => one.preview) : Math.min(at, this.pictures.length - 1);
    if (current && next < 0) this.close();
    else if (current) await this.goTo(next);
    this.changed();
    this.say(`${shorten(picture.name)}: ${reasonOf(error)}`, "error");
  }

  /** What the server tells of a picture that it is sent: its id, size and format. */
  async upload(picture) {
    const body = picture.file;
    const path = picture.sample ? `api/v1/pictures?sample=${picture.sample}` : "api/v1/pictures";
    const type = "application/octet-stream";
    const { signal } = picture.closing;
    return json(path, { method: "POST", body, type, signal, waiting: this.waiting });
  }

  /** A call for a picture. If the server has dropped the picture, it is sent again with all its fills. */
  async callFor(picture, rest, options = {}) {
    const ask = () => call(`api/v1/pictures/${picture.id}${rest}`, { ...options, waiting: this.waiting });
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
    const { signal } = picture.closing;
    const told = await this.upload(picture);
    const ask = (rest, options) => call(`api/v1/pictures/${told.id}${rest}`, { ...options, signal, waiting: this.waiting });
    try {
      for (const [position, fill] of picture.fills.entries()) await this.send(fill, position, ask);
    } catch (error) {
      this.free([told]); // without all the fills it is of no use; the next call begins again
      throw error;
    }
    picture.id = told.id;
    this.say(t("reopened"));
    if (this.picture === picture) this.view.sharpen();
  }

  /** The pictures with fills that no saved file has, or with strokes that are not filled. */
  get unsaved() {
    return this.pictures.filter(
      (one) => one.open && (one.running || paintedIn(one) > 0 || (one.position > 0 && shownFill(one) !== one.saved)),
    );
  }

  // -- mask and history ---------------------------------------------------------------------------------------

  showMask() {
    this.view.mask({ running: this.picture?.running?.operations || [] });
    this.showStroke();
  }

  /** Shows the stroke that is being painted. One that erases acts on the operations before it. */
  showStroke() {
    const { picture, stroke } = this;
    const pending = picture?.pending || [];
    if (!stroke) this.view.mask({ pending, current: [] });
    else if (stroke.erase) this.view.mask({ pending: [...pending, stroke], current: [] });
    else this.view.mask({ current: [stroke], ...(this.view.masks.pending !== pending && { pending }) });
  }

  /** Adds an operation to the mask of a picture. Returns whether it did: one beside the picture is none. */
  add(operation, picture = this.picture) {
    if (!picture) return false;
    const adds = operation.erase ? paintedIn(picture) > 0 : reach([operation], picture) !== null;
    if (adds) {
      picture.pending = [...picture.pending, operation];
      picture.history = [...picture.history.slice(0, picture.done), { kind: "operation", operation }];
      picture.done = picture.history.length;
    } else if (!operation.erase) this.say(t("beside"));
    this.showMask();
    this.changed();
    return adds;
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

  /** While a fill runs: the last stroke that waits, or else the fill. */
  undo() {
    const { picture } = this;
    if (!this.canUndo) return;
    if (picture.running && !picture.pending.length) {
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
    const fill = await this.make(picture, operations, running.abort.signal);
    if (picture.running !== running) return; // it was cancelled
    picture.running = null;
    const again = fill && picture.again && picture.pending.length > 0;
    picture.again = false;
    if (fill) this.take(picture, fill);
    else this.restore(picture, running);
    if (this.picture === picture) this.showMask();
    this.changed();
    if (again) this.fill(undefined, picture);
    if (!fill) return;
    await drawn();
    fill.milliseconds = performance.now() - released;
    performance.measure("lgnet-fill", { start: released, end: performance.now() });
    picture.last = fill;
    if (this.picture === picture) {
      if (!picture.running) this.say(t("filled", { ms: Math.round(fill.milliseconds) }), "done");
      this.changed();
    }
    await this.keepFile(picture);
  }

  /**
   * Keeps a copy of the file of a picture with fills. If the server closed the picture and the file was gone, the fills
   * would be lost.
   */
  async keepFile(picture) {
    if (!(picture.file instanceof File)) return; // a sample, or a copy
    try {
      picture.file = new Blob([await picture.file.arrayBuffer()]);
    } catch {
      this.say(t("fileGoneSave", { name: shorten(picture.name) }), "error");
    }
  }

  /** The fill of some operations; null where it was cancelled, and where it failed, which is told. */
  async make(picture, operations, signal) {
    const { strategy, dilate, feather, model } = settings;
    const options = { strategy, dilate, feather, ...(model && { model }) };
    try {
      const box = reach(operations, picture);
      const blob = box && (await encode(operations, box, picture));
      if (blob) {
        const fill = { blob, box, options };
        const ask = (rest, how) => this.callFor(picture, rest, { ...how, signal });
        await this.send(fill, picture.position, ask);
        return fill;
      }
      if (this.picture === picture && !signal.aborted) this.say(t("nothing"));
    } catch (error) {
      this.fail(error, picture);
    }
    return null;
  }

  /** Makes a fill the last one of a picture; in the history it is before the strokes that were painted meanwhile. */
  take(picture, fill) {
    picture.fills = [...picture.fills.slice(0, picture.position), fill];
    picture.position = picture.fills.length;
    const before = picture.history.slice(0, picture.done).filter((one) => one.kind !== "operation");
    picture.history = [...before, { kind: "fill", fill }, ...asEntries(picture.pending)];
    picture.done = picture.history.length;
    if (this.picture === picture) this.view.history();
  }

  /** Puts the strokes of a fill that failed back, before those that were painted while it ran. */
  restore(picture, { operations, history, done }) {
    const waiting = picture.pending;
    picture.pending = [...operations, ...waiting];
    picture.history = waiting.length ? [...history.slice(0, done), ...asEntries(waiting)] : history;
    picture.done = done + waiting.length;
  }

  /** Sends a fill by `ask(rest, options)`, to follow the first `position` fills, and keeps the changed pixels. */
  async send(fill, position, ask) {
    const { x, y } = fill.box;
    const query = new URLSearchParams({ x, y, ...fill.options, position });
    const response = await ask(`/fill?${query}`, { method: "POST", body: fill.blob, type: "image/png" });
    const boxes = response.headers.get("X-Boxes").split(";").map((text) => text.split(",").map(Number));
    const sheet = await bitmapOf(response);
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

  /** Tells an error of something that was done for a picture, unless it was cancelled. */
  fail(error, picture) {
    if (error.name === "AbortError" || !this.pictures.includes(picture)) return;
    this.say(picture === this.picture ? reasonOf(error) : `${shorten(picture.name)}: ${reasonOf(error)}`, "error");
  }
}

/** Resolves when the changes are on the screen. */
const drawn = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
