// One turn of the conversation in the page: what a person said, or an answer as it comes.

import { chip } from "./files.js";
import { button, count, element, money, seconds } from "./format.js";
import { copyText, MarkdownStream } from "./markdown.js";

export const MODES = { off: "non-think", low: "think low", high: "think high", max: "think max" };

function copyButton(textOf) {
  const copy = button("quiet", "Copy", async () => {
    await copyText(textOf());
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  return copy;
}

/** A user's turn. `edit(text)` sends the message anew, changed; null for all but the last one. */
export class UserTurn {
  constructor(message, edit) {
    this.message = message;
    this.element = element("article", "turn user", element("h2", "away", "You"));
    this.#show(edit);
  }

  #show(edit) {
    const { message } = this;
    const files = element("ul", "chips", ...(message.files ?? []).map((file) => chip(file).element));
    const text = element("div", "text", message.text);
    const tools = element("div", "tools", copyButton(() => message.text));
    if (edit) tools.append(button("quiet", "Edit", () => this.#open(edit)));
    this.body = element("div", "body", files, text);
    this.element.replaceChildren(this.element.firstChild, this.body, tools);
  }

  #open(edit) {
    const field = element("textarea");
    field.value = this.message.text;
    field.rows = Math.min(12, field.value.split("\n").length + 1);
    field.setAttribute("aria-label", "Your message, to be changed");
    const close = () => {
      this.#show(edit);
      this.element.querySelector(".tools button:last-child").focus();
    };
    const send = () => { if (field.value.trim()) edit(field.value.trim()); };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
      if (event.key === "Escape") { event.stopPropagation(); close(); }
    });
    const row = element("div", "row end", button("plain-button", "Cancel", close), button("main-button", "Send", send));
    this.body.replaceChildren(element("div", "editing", field, row));
    this.element.querySelector(".tools").remove();
    field.focus();
  }
}

/** An answer. Its methods follow the stream; `finish` shows what `message` holds at the end. */
export class AnswerTurn {
  #prose;
  #markdown;
  #reasoning = null;
  #thought = null;
  #ticker = 0;

  /** `again()` makes the answer anew; null for all but the last one. */
  constructor(message, again) {
    this.message = message;
    this.again = again;
    this.#prose = element("div", "prose");
    this.#markdown = new MarkdownStream(this.#prose);
    this.state = element("p", "state soft");
    this.foot = element("div", "tools");
    this.element = element("article", "turn answer", element("h2", "away", "Answer"), this.state, this.#prose, this.foot);
    // Shown again from the store, or in the middle of a stream after another conversation was looked at.
    if (message.reasoning) this.reason(message.reasoning);
    if (message.content) this.write(message.content);
    // A turn that was taken from the page, because another conversation is shown, stops here.
    const tick = () => (this.element.isConnected ? this.#tick() : clearInterval(this.#ticker));
    if (message.live) this.#ticker = setInterval(tick, 100);
    else this.finish();
    this.#tick();
  }

  /** More of the reasoning. */
  reason(text) {
    if (!this.#reasoning) {
      this.#thought = element("div", "thought");
      this.#thought.tabIndex = 0;
      this.#thought.append("");
      this.#reasoning = element("details", "reasoning", element("summary"), this.#thought);
      this.#reasoning.open = Boolean(this.message.live);
      this.#prose.before(this.#reasoning);
    }
    // The reader who scrolled up in the reasoning stays there.
    const box = this.#thought;
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    box.firstChild.appendData(text);
    if (follows) requestAnimationFrame(() => { box.scrollTop = box.scrollHeight; });
  }

  /** More of the answer. */
  write(text) {
    this.#markdown.append(text);
  }

  /** What the server is doing while nothing comes. */
  #tick() {
    const { message } = this;
    const { live } = message;
    const thinking = live && message.reasoning && message.thoughtMs === null;
    const waiting = live && !message.reasoning && !message.content;
    this.state.hidden = !waiting;
    if (waiting) {
      const waited = performance.now() - live.opened;
      this.state.textContent = (live.queued ? "Waiting in line or reading the prompt" : "Reading the prompt")
        + (waited > 1000 ? ` · ${seconds(waited)}` : "");
    }
    if (this.#reasoning) {
      const time = thinking ? performance.now() - live.thinking : message.thoughtMs ?? 0;
      const about = message.reasoningCounted ? "" : "about ";
      this.#reasoning.classList.toggle("live", Boolean(thinking));
      this.#reasoning.firstChild.textContent = (thinking ? `Thinking · ${seconds(time)}` : `Thought for ${seconds(time)}`)
        + ` · ${about}${count(message.reasoningTokens)} tokens`;
    }
  }

  /** The stream has ended, well or not. */
  finish() {
    const { message } = this;
    clearInterval(this.#ticker);
    this.#markdown.finish();
    this.#tick();
    for (const call of message.calls) {
      this.#prose.append(element("pre", "call", `${call.name}(${call.arguments})`));
    }
    this.element.querySelector(".problem")?.remove();
    if (message.problem) this.foot.before(problemLine(message.problem.text, message.problem.retryAfter, this.again));
    this.foot.replaceChildren();
    if (message.content) this.foot.append(copyButton(() => message.content));
    if (this.again && !message.problem) this.foot.append(button("quiet", "Regenerate", this.again));
    this.facts = element("span", "facts soft");
    this.foot.append(this.facts);
    this.tellFacts();
  }

  /** The small print: which model, how many tokens, how fast, at what price. */
  tellFacts() {
    const { message } = this;
    const facts = [];
    if (message.model && (message.content || message.reasoning)) facts.push(`${message.model} · ${MODES[message.mode]}`);
    if (message.usage) {
      const { output } = message.usage;
      facts.push(`${count(output)} tokens`);
      if (message.writingMs > 0 && output > 1) facts.push(`${((output - 1) / message.writingMs * 1000).toFixed(1)} tokens/s`);
    }
    if (message.price) facts.push(money(message.price.cost, message.price.currency));
    if (message.finish === "length") facts.push("cut off at the longest answer allowed");
    if (message.finish === "stopped") facts.push("stopped by you");
    this.facts.textContent = facts.join(" · ");
  }
}

/** One line that says what went wrong, with a button that tries again; counts down where the server named a wait. */
export function problemLine(text, retryAfter, again) {
  const wait = element("span", "wait");
  const line = element("div", "problem", element("span", "what", text), wait);
  line.setAttribute("role", "alert");
  if (retryAfter > 0) {
    const until = performance.now() + retryAfter * 1000;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      wait.textContent = left > 0 ? `Free again in about ${left} s.` : "";
      if (left > 0) setTimeout(tick, 250);
    };
    // A live region would read the countdown aloud every second.
    wait.setAttribute("aria-hidden", "true");
    tick();
  }
  if (again) line.append(button("plain-button", "Retry", again));
  return line;
}
