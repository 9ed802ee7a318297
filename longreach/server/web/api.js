// The server, as the page speaks to it: plain fetch, the OpenAI dialect, one kind of error.

// Relative to this file, so that the page also works behind a proxy that serves it under a path of its own.
const ROOT = new URL("../", import.meta.url);
const KEY_NAME = "longreach.key";

let key = sessionStorage.getItem(KEY_NAME) || "";

export const hasKey = () => key !== "";

/** Takes a key; `keep` writes it to this tab's session storage, otherwise it lives in memory until a reload. */
export function setKey(value, keep) {
  key = value;
  if (key && keep) sessionStorage.setItem(KEY_NAME, key);
  else sessionStorage.removeItem(KEY_NAME);
}

/** What went wrong, in one line for the reader. `status` is 0 where the server could not be reached. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const OPENINGS = {
  401: "This server asks for an API key.",
  402: "The budget of this key is used up.",
  413: "That is more than this server takes in one request.",
  429: "The server is at its limit for now.",
  503: "The server cannot answer at the moment.",
};

/** Seconds of a Retry-After header, which holds seconds or a date; null without one. */
function waitOf(response) {
  const header = response.headers.get("retry-after");
  if (!header) return null;
  const wait = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(wait) ? Math.max(0, Math.ceil(wait)) : null;
}

async function errorOf(response) {
  let said = "";
  try {
    said = (await response.json()).error?.message || "";
  } catch {
    // A proxy answered with something else than JSON: the status says what there is to say.
  }
  const opening = OPENINGS[response.status] || (said ? "" : `The server answered with status ${response.status}.`);
  return new ApiError(response.status, [opening, said].filter(Boolean).join(" "), waitOf(response));
}

async function send(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, ROOT), {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "No contact with the server. It may have been stopped, or the network is down.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

const get = async (path) => (await send(path)).json();

/** The models by their own names; entries for their other names are left out. */
export const models = async () =>
  (await get("v1/models")).data.filter(({ id, longreach }) => (longreach?.name ?? id) === id);
export const status = () => get("status");
export const prices = () => get("v1/prices");

/** Number of tokens of `text`. */
export async function countTokens(model, text, signal) {
  const answer = await (await send("tokenize", { body: { model, content: text, count_only: true }, signal })).json();
  return answer.count;
}

/**
 * The chunks of a streamed answer, each as the object the server sent; `{waiting: true}` for a keep-alive.
 * Throws ApiError where the server refuses, breaks off or reports an error inside the stream; AbortError after a stop.
 */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The connection broke off before the answer was complete.");
    }
    if (part.done) throw new ApiError(0, "The connection closed before the answer was complete.");
    rest += part.value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const raw of lines) {
      const line = raw.trimEnd();
      if (line.startsWith(":")) yield { waiting: true };
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(Number(chunk.error.status) || 500, chunk.error.message);
      yield chunk;
    }
  }
}
