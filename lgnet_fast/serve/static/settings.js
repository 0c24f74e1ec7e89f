// Settings that are kept between visits.
const KEY = "lgnet-settings";
const DEFAULTS = {
  tool: "brush",
  size: 44, // of the screen
  auto: true,
  dilate: 4,
  feather: 3,
  strategy: "auto",
  model: "",
  colour: "#ff5c7a",
  theme: "",
  format: "",
  panel: false,
};

let stored = {};
try {
  stored = JSON.parse(localStorage.getItem(KEY)) || {};
} catch {
  stored = {}; // storage is off, or holds something else
}

export const settings = new Proxy(
  Object.fromEntries(
    Object.entries(DEFAULTS).map(([name, value]) => [name, typeof stored[name] === typeof value ? stored[name] : value]),
  ),
  {
    set(target, name, value) {
      target[name] = value;
      try {
        localStorage.setItem(KEY, JSON.stringify(target));
      } catch {
        // where the browser stores nothing, the page works without kept settings
      }
      return true;
    },
  },
);

export const SIZES = { least: 4, most: 400 };
