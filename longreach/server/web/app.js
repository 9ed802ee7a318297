// The page: what is where, what a click does. The conversation itself is in chat.js, the gauges in gauges.js.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { chip, count as countFile, readText } from "./files.js";
import { $, bytes, button, element, short } from "./format.js";
import * as gauges from "./gauges.js";
import * as store from "./store.js";
import { problemLine } from "./turn.js";

const { settings } = store;
const root = document.documentElement;

// ---- notices and questions ----

/** One line above the conversation; without text it goes away. */
function notice(text, again, retryAfter = 0) {
  $("notice").hidden = !text;
  if (!text) return $("notice").replaceChildren();
  const line = problemLine(text, retryAfter, again);
  line.removeAttribute("role"); // the place itself is the alert
  const close = button("quiet", "Dismiss", () => notice(""));
  $("notice").replaceChildren(...line.childNodes, ...(again ? [] : [close]));
}

function announce(text) {
  $("announcer").textContent = text;
}

/** Whether its reader says yes. */
function confirmed(text, yes) {
  $("question-text").textContent = text;
  $("question-yes").textContent = yes;
  $("question").returnValue = "";
  $("question").showModal();
  return new Promise((resolve) => {
    $("question").addEventListener("close", () => resolve($("question").returnValue === "yes"), { once: true });
  });
}

let asking = null;

/** Asks for an API key, once however many requests were refused meanwhile. Resolves to whether one was given. */
function askKey() {
  asking ??= new Promise((resolve) => {
    $("key-reason").textContent = api.hasKey() ? "The server does not accept this key." : "This server asks for an API key.";
    $("key").value = "";
    $("key-keep").checked = false;
    $("key-dialog").returnValue = "";
    $("key-dialog").showModal();
    $("key-dialog").addEventListener("close", () => {
      const given = $("key-dialog").returnValue === "use";
      if (given) api.setKey($("key").value.trim(), $("key-keep").checked);
      $("key").value = "";
      asking = null;
      showKeyState();
      resolve(given);
      if (given) {
        gauges.poll();
        if (!models.length) findModels();
      }
    }, { once: true });
  });
  return asking;
}

function showKeyState() {
  $("key-state").textContent = api.hasKey() ? "A key is set." : "No key is set.";
  $("change-key").textContent = api.hasKey() ? "Forget the key" : "Enter a key";
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close("use");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));
$("change-key").addEventListener("click", () => {
  if (api.hasKey()) {
    api.setKey("", false);
    showKeyState();
  } else {
    $("settings").close();
    askKey();
  }
});

// ---- models ----

let models = [];

const model = () => models.find(({ id }) => id === settings.model);
const untrained = () => model()?.longreach?.chat_trained === false;
const cannotThink = () => untrained() || model()?.longreach?.thinking === false;

async function findModels() {
  try {
    models = await api.models();
    notice("");
  } catch (error) {
    if (error.status === 401 && await askKey()) return; // askKey looks again
    notice(error.message, findModels, error.retryAfter ?? 0);
  }
  if (!model()) settings.model = models[0]?.id ?? "";
  const options = models.map(({ id }) => {
    const option = element("option", "", id === "auto" ? "auto: small or large by need" : id);
    option.value = id;
    option.selected = id === settings.model;
    return option;
  });
  $("model").replaceChildren(...(options.length ? options : [element("option", "", "No model")]));
  $("model").disabled = !options.length;
  showModel();
}

function showModel() {
  const note = $("model-note");
  note.textContent = untrained() ? "This model has no chat training; answers continue text."
    : cannotThink() ? "This model does not think before it answers." : "";
  note.hidden = !note.textContent;
  for (const radio of $("mode").querySelectorAll("input")) {
    radio.disabled = cannotThink() && radio.value !== "off";
    radio.checked = radio.value === (cannotThink() ? "off" : settings.mode);
  }
  $("prompt").placeholder = untrained() ? "Text to be continued" : "Message";
  showEmpty();
  gauges.poll();
}

$("model").addEventListener("change", () => {
  store.change({ model: $("model").value });
  showModel();
  changed();
});
$("mode").addEventListener("change", (event) => store.change({ mode: event.target.value }));

// ---- conversation ----

const chat = new Chat({
  changed: () => changed(), askKey, announce, cannotThink,
  storageFull: () => notice("This browser's storage is full: the conversation is lost when the page is closed. Delete old ones to make room."),
});

/** What follows from a change of the conversation: buttons, the list, the cost. */
function changed() {
  const { isRunning, conversation } = chat;
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("send").disabled = !settings.model || !($("prompt").value.trim() || files.length);
  gauges.showSpent(conversation.spent);
  showEmpty();
  showList();
}

function showEmpty() {
  $("empty").hidden = chat.conversation.messages.length > 0;
  const facts = model()?.longreach ?? {};
  const [title, text] = $("empty").children;
  if (!settings.model) {
    title.textContent = "No model yet";
    text.textContent = "This server offers no model to this page. Start one with: longreach serve RUN";
    return;
  }
  title.textContent = untrained() ? "Begin a text" : "Ask, or drop a file here";
  const told = [];
  if (facts.parameters) told.push(`${short(facts.parameters)} parameters`);
  if (facts.context) told.push(`${short(facts.context)} tokens of context`);
  if (facts.kind === "upstream") told.push("answered by another server");
  text.textContent = [settings.model, ...told].join(" · ");
}

let listed = "";

function showList() {
  const entries = store.conversations.map((one) => [one.id, one.title, one === chat.conversation]);
  const now = JSON.stringify(entries);
  if (now === listed) return; // drawn anew under the pointer, a button would not be clicked
  listed = now;
  $("no-conversations").hidden = store.conversations.length > 0;
  $("conversations").replaceChildren(...store.conversations.map((one) => {
    const open = button("open", one.title, () => show(one));
    if (one === chat.conversation) open.setAttribute("aria-current", "true");
    const cross = button("cross", "×", async () => {
      if (!await confirmed(`Delete “${one.title}”?`, "Delete")) return;
      one.deleted = true;
      chat.stop(one);
      store.remove(one);
      if (one === chat.conversation) show(store.create());
      else changed();
    });
    cross.setAttribute("aria-label", `Delete “${one.title}”`);
    return element("li", "", open, cross);
  }));
}

function show(conversation) {
  closePanels();
  chat.show(conversation);
  tellMissing();
  follow = true;
  toEnd();
  if (!narrow.matches) $("prompt").focus();
}

function tellMissing() {
  const file = chat.missingFile;
  if (file) notice(`${file.name} (${bytes(file.bytes)}) was too large to be kept. Drop it again to go on with this conversation.`);
}

$("new-chat").addEventListener("click", () => show(store.create()));

// ---- composer ----

let files = []; // to go with the next message

function send() {
  const text = $("prompt").value.trim();
  if ($("send").disabled || chat.isRunning) return;
  if (chat.missingFile) return tellMissing();
  notice("");
  follow = true;
  chat.send(text, files);
  files = [];
  $("prompt").value = "";
  $("chips").replaceChildren();
  grow();
  changed();
}

/** The field is as high as its text, up to what the style sheet allows. */
function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("input", () => {
  grow();
  changed();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => {
  chat.stop();
  $("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (root.dataset.panel) closePanels();
  else chat.stop();
});

// ---- files ----

async function take(blobs) {
  for (const blob of blobs) {
    let file;
    try {
      file = await readText(blob);
    } catch (error) {
      notice(error.message);
      continue;
    }
    const missing = chat.missingFile;
    if (missing && missing.name === file.name && missing.bytes === file.bytes) {
      missing.text = file.text;
      notice("");
      show(chat.conversation);
      continue;
    }
    const shown = chip(file, () => {
      files = files.filter((other) => other !== file);
      shown.element.remove();
      changed();
    });
    files.push(file);
    $("chips").append(shown.element);
    changed();
    countFile(file, settings.model, shown.tell).then(() => {
      const room = model()?.longreach?.context;
      if (room && file.tokens > room) {
        notice(`${file.name} has ${short(file.tokens)} tokens; ${settings.model} holds ${short(room)}. The server will refuse it.`);
      }
    });
  }
}

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
let depth = 0; // of elements entered by the pointer that drags

document.addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  depth += 1;
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!carriesFiles(event)) return;
  depth = Math.max(0, depth - 1);
  $("drop").hidden = depth === 0;
});
document.addEventListener("dragover", (event) => {
  if (carriesFiles(event)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  take([...event.dataTransfer.files]);
  $("prompt").focus();
});
$("prompt").addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  take([...event.clipboardData.files]);
});
$("attach").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take([...$("file").files]);
  $("file").value = ""; // the same file may be chosen again
});

// ---- scrolling ----

let follow = true;
const log = $("log");

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

// Reading further up must not be disturbed by the answer that grows below.
log.addEventListener("scroll", () => {
  follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  $("to-end").hidden = follow;
});
new ResizeObserver(() => { if (follow) toEnd(); }).observe($("turns"));
$("to-end").addEventListener("click", () => {
  follow = true;
  toEnd();
});

// ---- panels ----

// Beside the conversation where there is room, over it where there is not; data-panel names the one that lies over it.
const narrow = matchMedia("(max-width: 899px)");
const opener = { shelf: $("show-shelf"), gauges: $("show-gauges") };

function closePanels() {
  const open = root.dataset.panel;
  delete root.dataset.panel;
  showPanels();
  if (open) opener[open].focus();
}

function toggle(panel) {
  if (narrow.matches) {
    root.dataset.panel = panel;
    showPanels();
    $(panel).querySelector("button:not([hidden])").focus();
  } else {
    const hidden = new Set(settings.hidden.split(" ").filter(Boolean));
    if (!hidden.delete(panel)) hidden.add(panel);
    store.change({ hidden: [...hidden].join(" ") });
    showPanels();
  }
}

function showPanels() {
  const hidden = settings.hidden.split(" ");
  for (const panel of ["shelf", "gauges"]) {
    const isOpen = narrow.matches ? root.dataset.panel === panel : !hidden.includes(panel);
    $(panel).hidden = !isOpen;
    opener[panel].setAttribute("aria-expanded", isOpen);
    const what = panel === "shelf" ? "conversations" : "gauges";
    opener[panel].setAttribute("aria-label", `${isOpen ? "Hide" : "Show"} ${what}`);
  }
  $("shade").hidden = !root.dataset.panel;
}

$("show-shelf").addEventListener("click", () => toggle("shelf"));
$("show-gauges").addEventListener("click", () => toggle("gauges"));
$("shade").addEventListener("click", closePanels);
for (const close of document.querySelectorAll("[data-close]")) close.addEventListener("click", closePanels);
narrow.addEventListener("change", () => {
  delete root.dataset.panel;
  showPanels();
});

// ---- settings ----

function showTheme() {
  if (settings.theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = settings.theme;
  const dark = settings.theme === "dark" || (settings.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  $("theme").setAttribute("aria-label", dark ? "Light appearance" : "Dark appearance");
  $("theme").dataset.next = dark ? "light" : "dark";
  for (const radio of $("theme-choice").querySelectorAll("input")) radio.checked = radio.value === settings.theme;
  gauges.drawPlot();
}

function setTheme(theme) {
  store.change({ theme });
  showTheme();
}

$("theme").addEventListener("click", () => setTheme($("theme").dataset.next));
$("theme-choice").addEventListener("change", (event) => setTheme(event.target.value));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

$("open-settings").addEventListener("click", () => {
  closePanels();
  $("system").value = settings.system;
  $("temperature").value = settings.temperature ?? "";
  $("max-tokens").value = settings.maxTokens ?? "";
  $("keep").checked = settings.keep;
  showKeyState();
  $("settings").showModal();
});
$("system").addEventListener("input", () => store.change({ system: $("system").value }));
for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "maxTokens"]]) {
  // What the browser shows as wrong is not taken; the value before it stays in force.
  $(id).addEventListener("change", () => {
    if ($(id).reportValidity()) store.change({ [name]: $(id).value === "" ? null : $(id).valueAsNumber });
  });
}
$("keep").addEventListener("change", () => {
  store.change({ keep: $("keep").checked });
  if (settings.keep) for (const one of [...store.conversations].reverse()) store.save(one);
  else store.forget(false);
});
$("delete-all").addEventListener("click", async () => {
  if (!await confirmed("Delete all conversations of this browser?", "Delete all")) return;
  for (const one of store.conversations) {
    one.deleted = true;
    chat.stop(one);
  }
  store.forget(true);
  show(store.create());
  $("settings").close();
});

addEventListener("pagehide", () => chat.keepRunning());

// ---- start ----

store.load();
showPanels();
gauges.start(() => settings.model);
showTheme();
show(store.create());
findModels();
