// Calls of the server, by paths relative to the page. A token, if any, is read from the page's address once and kept
// in this tab.
import { t } from "./text.js";

const KEY = "lgnet-token";
let token = new URLSearchParams(location.search).get("token");
if (token) history.replaceState(null, "", location.pathname);
try {
  if (token) sessionStorage.setItem(KEY, token);
  else token = sessionStorage.getItem(KEY);
} catch {
  // where the browser stores nothing, the token is lost when the page is loaded again
}

/** An answer that is not 2xx, or a call that could not be made; `status` 0: no answer. */
export class ApiError extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** What the server takes, as far as the page has to know it before a call. */
export const limits = { bytes: Infinity };

/** The bytes of a file. A file that is gone or too large would fail in `fetch` as if there was no server. */
async function bytesOf(file) {
  if (file.size > limits.bytes) {
    const [size, most] = [file.size, limits.bytes].map((bytes) => (bytes / 2 ** 20).toFixed(1));
    throw new ApiError(413, t("tooLarge", { size, most }));
  }
  return file.arrayBuffer().catch(() => {
    throw new ApiError(0, t("fileGone"));
  });
}

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

/**
 * One call. If the server says when to come again, calls `waiting(seconds)` and repeats the call, five times at most.
 * Throws ApiError, or the AbortError of the signal.
 */
export async function call(path, { method = "GET", body, type, signal, waiting, keepalive } = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (type) headers["Content-Type"] = type;
  if (body instanceof File) body = await bytesOf(body);
  for (let tries = 0; ; tries++) {
    let response;
    try {
      response = await fetch(path, { method, body, headers, signal, keepalive });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, t("unreachable"));
    }
    if (response.ok) return response;
    const again = response.headers.get("Retry-After"); // without it, the same call would fail again
    if ((response.status === 429 || response.status === 503) && again !== null && tries < 5) {
      const seconds = Math.min(10, Number(again) || 1);
      waiting?.(seconds);
      await pause(seconds * 1000, signal);
      continue;
    }
    const told = await response.json().catch(() => ({}));
    const { status, statusText } = response; // HTTP/2 has no text
    throw new ApiError(status, told.detail || t("answered", { status: `${status} ${statusText}`.trim() }));
  }
}

export const json = async (path, options) => (await call(path, options)).json();

/** The picture of an answer. */
export const bitmapOf = async (response) => createImageBitmap(await response.blob());

/** {phase: milliseconds} of an answer's Server-Timing. */
export function timings(response) {
  const phases = {};
  for (const part of (response.headers.get("Server-Timing") || "").split(",")) {
    const [name, value] = part.trim().split(";dur=");
    if (value) phases[name] = Number(value);
  }
  return phases;
}
