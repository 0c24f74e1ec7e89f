// The view: preview, crop, patches and mask on canvases of the window's size, with zoom and pan.
import { bitmapOf, call } from "./api.js";
import { draw } from "./mask.js";

const MOST = 32; // screen pixels for one of the picture
const SETTLED = 150; // milliseconds without a move before a sharper crop is asked for

/** What is seen through transparent pixels: squares of 8 pixels of the screen. */
function checkerboard() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 16;
  const context = canvas.getContext("2d");
  context.fillStyle = "#9a9a9a";
  context.fillRect(0, 0, 16, 16);
  context.fillStyle = "#666";
  for (const at of [0, 8]) context.fillRect(at, at, 8, 8);
  return canvas;
}

export class View {
  constructor(container, longest) {
    this.container = container;
    this.longest = longest;
    this.stage = new Konva.Stage({ container, width: container.clientWidth, height: container.clientHeight });
    this.stage.listening(false);
    const layer = () => new Konva.Layer({ listening: false });
    this.pictureLayer = layer();
    this.runningLayer = layer();
    this.pendingLayer = layer();
    this.currentLayer = layer();
    this.stage.add(this.pictureLayer, this.runningLayer, this.pendingLayer, this.currentLayer);
    this.masks = { running: [], pending: [], current: [] };
    for (const [name, shown] of [
      ["running", this.runningLayer],
      ["pending", this.pendingLayer],
      ["current", this.currentLayer],
    ]) {
      const shape = new Konva.Shape({
        sceneFunc: (context) => draw(context._context, this.masks[name], this.colour, this.picture),
        perfectDrawEnabled: false,
      });
      shown.add(shape);
      shown.canvas._canvas.classList.add("mask", name);
    }
    for (const canvas of container.querySelectorAll("canvas")) canvas.setAttribute("aria-hidden", "true");
    this.squares = checkerboard();
    this.scale = 1;
    this.x = this.y = 0;
    this.inset = 0; // what a panel covers on the right
    this.moved = () => {};
    new ResizeObserver(() => this.resize()).observe(container);
    this.watchDensity();
  }

  /** Draws anew where a pixel of the page has another number of the screen's: the browser's zoom, another screen. */
  watchDensity() {
    const changed = () => (this.resize(), this.watchDensity());
    matchMedia(`(resolution: ${devicePixelRatio}dppx)`).addEventListener("change", changed, { once: true });
  }

  /** Shows a picture {id, width, height, preview, fills, position}: where it was left, or fitted to the window. */
  show(picture) {
    this.hide();
    this.picture = picture;
    this.shade = new Konva.Rect({ width: picture.width, height: picture.height, fillPatternImage: this.squares });
    this.preview = this.image(picture.preview, 0, 0, picture.width, picture.height);
    this.patches = new Konva.Group({ visible: !this.original });
    this.shade.visible(picture.alpha);
    this.pictureLayer.add(this.shade, this.preview, this.patches);
    this.history();
    if (!picture.left) this.fit();
    else {
      Object.assign(this, picture.left);
      this.place();
    }
  }

  hide() {
    if (this.picture) this.picture.left = this.fitted ? null : { scale: this.scale, x: this.x, y: this.y };
    this.sharp(null);
    this.pictureLayer.destroyChildren();
    this.picture = null;
    this.mask({ running: [], pending: [], current: [] });
    this.pictureLayer.batchDraw();
  }

  image(image, x, y, width, height) {
    return new Konva.Image({ image, x, y, width, height, listening: false, perfectDrawEnabled: false });
  }

  /** Shows the fills that the picture has now. */
  history() {
    this.patches.destroyChildren();
    for (const fill of this.picture.fills.slice(0, this.picture.position)) {
      for (const part of fill.parts) {
        this.patches.add(this.image(part.image, part.x, part.y, part.image.width, part.image.height));
      }
    }
    this.pictureLayer.batchDraw();
  }

  /** Shows the original while `on`. */
  peek(on) {
    this.original = on;
    this.patches?.visible(!on);
    this.pictureLayer.batchDraw();
  }

  /** Replaces operations of the mask: {running, pending, current}. */
  mask(changed) {
    for (const [name, operations] of Object.entries(changed)) {
      this.masks[name] = operations;
      this[`${name}Layer`].visible(Boolean(this.picture) && operations.length > 0);
      this[`${name}Layer`].batchDraw();
    }
  }

  set colour(value) {
    this.maskColour = value;
    for (const layer of [this.runningLayer, this.pendingLayer, this.currentLayer]) layer?.batchDraw();
  }

  get colour() {
    return this.maskColour || "#ff5c7a";
  }

  // -- zoom and pan -------------------------------------------------------------------------------------------

  /** What the bars cover, as the style sheet has it. */
  get margin() {
    const style = getComputedStyle(this.container);
    return Object.fromEntries(["top", "bottom", "side"].map((name) => [name, parseFloat(style.getPropertyValue(`--${name}`))]));
  }

  get fitting() {
    const { top, bottom, side } = this.margin;
    const across = Math.max(80, this.stage.width() - this.inset - 2 * side) / this.picture.width;
    const down = Math.max(80, this.stage.height() - top - bottom) / this.picture.height;
    return Math.min(across, down, MOST);
  }

  get fitted() {
    return Boolean(this.picture) && Math.abs(this.scale / this.fitting - 1) < 1e-6;
  }

  fit() {
    if (!this.picture) return;
    const { top, bottom } = this.margin;
    this.scale = this.fitting;
    this.x = (this.stage.width() - this.inset - this.picture.width * this.scale) / 2;
    this.y = top + (this.stage.height() - top - bottom - this.picture.height * this.scale) / 2;
    this.place();
  }

  /** Zooms by a factor around a point of the container. */
  zoom(factor, x = this.stage.width() / 2, y = this.stage.height() / 2) {
    if (!this.picture) return;
    const scale = Math.min(MOST, Math.max(Math.min(this.fitting / 2, 1), this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.place();
  }

  pan(x, y) {
    this.x += x;
    this.y += y;
    this.place();
  }

  /** Moves the window over the picture by (x, y), as long as there is more of the picture on that side. */
  follow(x, y) {
    const { picture, scale, stage } = this;
    const step = (by, before, after) => (by > 0 ? Math.min(by, Math.max(0, after)) : Math.max(by, Math.min(0, -before)));
    const across = step(x, -this.x, this.x + picture.width * scale - stage.width());
    const down = step(y, -this.y, this.y + picture.height * scale - stage.height());
    if (across || down) this.pan(-across, -down);
  }

  place() {
    if (!this.picture) return;
    // A part of the picture always stays in the window.
    const keep = 80;
    this.x = Math.min(this.stage.width() - keep, Math.max(keep - this.picture.width * this.scale, this.x));
    this.y = Math.min(this.stage.height() - keep, Math.max(keep - this.picture.height * this.scale, this.y));
    for (const layer of this.stage.getLayers()) {
      layer.position({ x: this.x, y: this.y });
      layer.scale({ x: this.scale, y: this.scale });
      layer.batchDraw();
    }
    this.shade.fillPatternScale({ x: 1 / this.scale, y: 1 / this.scale });
    this.pictureLayer.imageSmoothingEnabled(this.scale < 3);
    this.moved();
    clearTimeout(this.settled);
    this.settled = setTimeout(() => this.sharpen(), SETTLED);
  }

  resize(inset = this.inset) {
    const { clientWidth: width, clientHeight: height } = this.container;
    const { fitted } = this;
    this.inset = inset;
    for (const layer of this.stage.getLayers()) layer.getCanvas().setPixelRatio(devicePixelRatio);
    this.stage.size({ width, height });
    if (fitted) this.fit();
    else this.place();
  }

  /** A point of the container in pixels of the picture. */
  toPicture(x, y) {
    return [(x - this.x) / this.scale, (y - this.y) / this.scale];
  }

  /** Where the preview is too coarse, loads the visible part of the picture. */
  async sharpen() {
    const { picture } = this;
    if (!picture) return;
    const dense = this.scale * devicePixelRatio;
    const coarse = picture.preview.width / picture.width;
    if (coarse >= 1 || dense < 1.15 * coarse) {
      this.sharp(null);
      return;
    }
    const [left, top] = this.toPicture(0, 0);
    const [right, bottom] = this.toPicture(this.stage.width(), this.stage.height());
    const margin = 0.1 * Math.max(right - left, bottom - top);
    const x = Math.max(0, Math.floor(left - margin));
    const y = Math.max(0, Math.floor(top - margin));
    const width = Math.min(picture.width, Math.ceil(right + margin)) - x;
    const height = Math.min(picture.height, Math.ceil(bottom + margin)) - y;
    if (width < 1 || height < 1) return;
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    const longest = Math.min(this.longest, Math.ceil(Math.max(width, height) * Math.min(1, dense)));
    const query = new URLSearchParams({ x, y, width, height, longest });
    try {
      const path = `api/v1/pictures/${picture.id}/view?${query}`;
      const image = await bitmapOf(await call(path, { signal: asking.signal }));
      if (!asking.signal.aborted) this.sharp(this.image(image, x, y, width, height));
    } catch {
      // the preview stays; the next fill reports the error of the server
    }
  }

  /** Replaces the crop, null: by none. */
  sharp(crop) {
    this.asking?.abort();
    this.crop?.image().close();
    this.crop?.destroy();
    this.crop = crop;
    if (crop) this.pictureLayer.add(crop);
    crop?.zIndex(2);
    this.pictureLayer.batchDraw();
  }
}
