// What the page remembers in this browser: settings, and conversations unless their owner said no.
//
//   longreach.settings             one object
//   longreach.conversation.<id>    one conversation each, so that a long one is not rewritten for a short one
//
// Nothing here leaves the browser; the server keeps no conversations.

const SETTINGS = "longreach.settings";
const PREFIX = "longreach.conversation.";

// localStorage holds about five million characters in all; one book would fill it.
const LARGEST_KEPT_FILE = 256 * 1024;

const DEFAULTS = {
  model: "", mode: "high", temperature: null, maxTokens: null, system: "", keep: true, theme: "auto",
  hidden: "", // panels that are closed on a wide screen
};

function readJson(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // damaged by another program or an older version: as good as absent
  }
}

export const settings = { ...DEFAULTS, ...readJson(SETTINGS) };

export function change(changes) {
  Object.assign(settings, changes);
  write(SETTINGS, settings);
}

/** Whether the browser took it; false where its storage is full or switched off. */
function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// ---- conversations ----

/** All conversations of this page, the latest first. */
export const conversations = [];

export function load() {
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    const found = name.startsWith(PREFIX) && readJson(name);
    if (found?.id && Array.isArray(found.messages) && found.spent) conversations.push(found);
  }
  conversations.sort((one, other) => other.changed - one.changed);
}

export function create() {
  return {
    // Not randomUUID: it is missing where the page is opened over plain HTTP from another machine.
    id: [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join(""),
    title: "", changed: Date.now(), messages: [],
    // Every request counts, also those whose answers were made anew or cut off. Without a price or a usage, it is named.
    spent: { hit: 0, miss: 0, output: 0, cost: 0, uncached: 0, currency: "USD", unpriced: 0, uncounted: 0 },
  };
}

/** A message as it is stored: without what only matters while it streams, and without the text of large files. */
const stored = (message) => ({
  ...message, live: null,
  files: message.files?.map((file) => (file.bytes > LARGEST_KEPT_FILE ? { ...file, text: null } : file)),
});

/** Puts the conversation first and stores it where that is wanted. False: the browser has no room for it. */
export function save(conversation) {
  const at = conversations.indexOf(conversation);
  if (at >= 0) conversations.splice(at, 1);
  conversations.unshift(conversation);
  conversation.changed = Date.now();
  if (!settings.keep) return true;
  return write(PREFIX + conversation.id, { ...conversation, messages: conversation.messages.map(stored) });
}

export function remove(conversation) {
  const at = conversations.indexOf(conversation);
  if (at >= 0) conversations.splice(at, 1);
  localStorage.removeItem(PREFIX + conversation.id);
}

/** Forgets what is stored; the conversations of this page stay until it is closed unless `everywhere`. */
export function forget(everywhere) {
  for (const name of Object.keys(localStorage)) if (name.startsWith(PREFIX)) localStorage.removeItem(name);
  if (everywhere) conversations.length = 0;
}
