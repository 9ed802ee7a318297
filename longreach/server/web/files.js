// Files as context: read here as text, shown as a chip with size and token count, sent inside a frame the model knows.

import { countTokens } from "./api.js";
import { button, bytes, element, short } from "./format.js";

/** Larger than any context: at three bytes a token this is 21 million tokens. */
const LARGEST = 64 * 2 ** 20;

/**
 * What is sent for a user message: each file in the frame of DeepSeek's own file upload, then the message.
 * The files come first, so that a second question about them finds them in the cache.
 */
export function framed({ text, files = [] }) {
  const frames = files.map((file) =>
    `[file name]: ${file.name}\n[file content begin]\n${file.text}\n[file content end]\n`);
  return frames.join("") + text;
}

/** Reads a dropped or chosen file. Throws Error with a line for the reader where it is not text. */
export async function readText(blob) {
  if (blob.size > LARGEST) throw new Error(`${blob.name} has ${bytes(blob.size)}; at most ${bytes(LARGEST)} can be read.`);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await blob.arrayBuffer());
  } catch {
    throw new Error(`${blob.name} is not text in UTF-8. Convert it to plain text first.`);
  }
  if (text.includes("\0")) throw new Error(`${blob.name} is a binary file. Convert it to plain text first.`);
  if (!text.trim()) throw new Error(`${blob.name} holds no text.`);
  return { name: blob.name, bytes: blob.size, tokens: null, text };
}

/** The file's line: name, size, tokens. With `remove` it has a button that takes it away. */
export function chip(file, remove) {
  const size = element("span", "soft");
  const made = element("li", "chip", element("span", "name", file.name), size);
  const tell = () => {
    const tokens = file.tokens === null ? "" : file.tokens < 0 ? " · tokens not counted" : ` · ${short(file.tokens)} tokens`;
    size.textContent = bytes(file.bytes) + tokens + (file.text === null ? " · no longer here" : "");
  };
  tell();
  if (remove) {
    const cross = button("cross", "×", remove);
    cross.setAttribute("aria-label", `Remove ${file.name}`);
    made.append(cross);
  }
  return { element: made, tell };
}

/** Counts the tokens of `file` and tells its chip. A server that cannot count costs nothing but the figure. */
export async function count(file, model, tell) {
  try {
    file.tokens = await countTokens(model, file.text);
  } catch {
    file.tokens = -1;
  }
  tell();
}
