/** The server's HTTP API: what model it has, and answers as they come. Failures are told in words. */

import { Told } from "./images.js";

const KEY = "focusllava-key";

/** The key of this tab: in its memory, and in what the browser forgets with the tab. */
let key = sessionStorage.getItem(KEY) ?? "";

export const hasKey = () => key !== "";

export function setKey(value) {
  key = value;
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** The server wants a key, or another one. */
export class KeyWanted extends Told {
  constructor() {
    super(key ? "The server does not know this key." : "This server answers those who have a key.");
  }
}

/** The address of the API, under whatever path a proxy has put the page. */
export const address = (path) => new URL(path, document.baseURI).href;

/** The served model, with its limits and the samplers' defaults under `focus`. */
export async function model() {
  const response = await asked("v1/models", {});
  return (await response.json()).data[0];
}

/**
 * Sends a chat completion request and calls `take` with every piece of the streamed answer.
 * Throws KeyWanted, Told, or the abort of `signal`.
 */
export async function stream(body, signal, take) {
  const response = await asked("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Told("The answer broke off: the connection to the server was lost. Ask again.");
    }
    if (piece.done) throw new Told("The answer broke off: the server ended it too early. Ask again.");
    const events = (rest + piece.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Told(`The answer broke off: ${withoutField(chunk.error.message)}.`);
      take(chunk);
    }
  }
}

async function asked(path, options) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Told("The server does not answer. It may have stopped, or the network is down: " +
                   "start it again (make serve), then try once more.");
  }
  if (response.ok) return response;
  if (response.status === 401) throw new KeyWanted();
  throw new Told(await words(response));
}

const REASONS = {
  404: "The server has another model now. Reload this page.",
  408: "The request took too long to arrive. Try again, perhaps with a smaller image.",
  413: "This is too large for the server",
  429: "The server is busy, or your key has used its share",
  503: "A part of the server is not there just now. Try again in a moment",
  504: "The answer took too long, and was given up.",
};

async function words(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* A proxy in between answers in its own way. */ }
  const said = withoutField(error.message ?? "");
  const wait = Number(response.headers.get("retry-after"));
  const later = response.status === 429 && wait ? ` Try again in ${wait} s.` : "";
  if (/image/.test(error.param ?? "")) return `The server cannot use this image: ${said}.`;
  const reason = REASONS[response.status];
  if (!reason) return said ? `The server refuses this: ${error.message}.` : `The server answered with ${response.status}.`;
  return reason.endsWith(".") ? reason : `${reason}${said ? `: ${said}` : ""}.${later}`;
}

/** An error's line without the field of the request that it begins with, which a person has not written. */
const withoutField = (line) => line.replace(/^[a-z_]+(\[\d+\])?(\.[a-z_]+(\[\d+\])?)*: /, "").replace(/\.$/, "");
