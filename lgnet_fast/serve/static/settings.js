// Settings that are kept between visits.
const KEY = "lgnet-settings";
export const TOOLS = ["brush", "eraser", "rectangle", "lasso"];
export const SIZES = { least: 4, most: 400 };
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

const within = (least, most) => (value) => value >= least && value <= most;
const VALID = {
  tool: (value) => TOOLS.includes(value),
  size: within(SIZES.least, SIZES.most),
  dilate: within(0, 64),
  feather: within(0, 64),
  colour: (value) => /^#[\da-f]{6}$/i.test(value),
  theme: (value) => ["", "dark", "light"].includes(value),
};

let stored = {};
try {
  stored = JSON.parse(localStorage.getItem(KEY)) || {};
} catch {
  stored = {}; // storage is off, or holds something else
}

/** Another version of the page, or another server, may have stored what this one does not know. */
const known = (name, value) => typeof value === typeof DEFAULTS[name] && (VALID[name]?.(value) ?? true);

export const settings = new Proxy(
  Object.fromEntries(
    Object.entries(DEFAULTS).map(([name, value]) => [name, known(name, stored[name]) ? stored[name] : value]),
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
