// The conversation: what is sent to the server, what comes back, and what it cost.
//
// Several conversations may be answered at once; the page shows one of them. A message is plain data that the store can
// keep; a turn (turn.js) is its place in the page, and exists only while its conversation is shown.

import { chat, prices } from "./api.js";
import { $ } from "./format.js";
import { framed } from "./files.js";
import { save, settings } from "./store.js";
import { AnswerTurn, UserTurn } from "./turn.js";

const PRICES_STALE_MS = 60_000;

let tariff = null;
let tariffAt = -Infinity;

/** Prices of this moment by model; null where the server names none. */
async function tariffNow() {
  if (performance.now() - tariffAt > PRICES_STALE_MS) {
    try {
      tariff = await prices();
    } catch {
      tariff = null; // the answer is worth more than its price: it is shown as unpriced
    }
    tariffAt = performance.now();
  }
  return tariff;
}

export class Chat {
  conversation = null;
  #running = new Map(); // conversation -> AbortController
  #turns = new WeakMap(); // message -> its turn, where it is shown
  #page;

  /**
   * `page` is what the chat needs of the rest: `changed()` after anything that other parts show, `askKey()` which resolves
   * to whether a key was given, `cannotThink()` of the selected model, `announce(text)` for screen readers, `storageFull()`.
   */
  constructor(page) {
    this.#page = page;
  }

  get isRunning() {
    return this.#running.has(this.conversation);
  }

  /** A file of this conversation whose text this browser no longer has. Without it the next answer would be another one. */
  get missingFile() {
    const files = this.conversation.messages.flatMap((message) => message.files ?? []);
    return files.find((file) => file.text === null);
  }

  show(conversation) {
    this.conversation = conversation;
    $("turns").replaceChildren();
    conversation.messages.forEach((message) => this.#add(message));
    this.#page.changed();
  }

  send(text, files) {
    const { messages } = this.conversation;
    messages.push({ role: "user", text, files });
    if (!this.conversation.title) this.conversation.title = (text || files[0].name).slice(0, 80);
    this.#answer(this.conversation);
  }

  /** Answers the last user message again; what was answered to it before is dropped. */
  again() {
    const { messages } = this.conversation;
    if (messages.at(-1).role === "assistant") messages.pop();
    this.#answer(this.conversation);
  }

  /** The last user message, changed. */
  edit(text) {
    const { messages } = this.conversation;
    const last = messages.findLastIndex((message) => message.role === "user");
    messages.length = last + 1;
    messages[last].text = text;
    if (last === 0) this.conversation.title = text.slice(0, 80);
    this.again();
  }

  stop(conversation = this.conversation) {
    this.#running.get(conversation)?.abort();
  }

  // ---- turns ----

  #add(message) {
    const { messages } = this.conversation;
    const last = message === messages.at(-1);
    const isFree = !this.isRunning && !this.missingFile;
    let turn;
    if (message.role === "user") {
      const newest = message === messages.findLast(({ role }) => role === "user");
      turn = new UserTurn(message, newest && isFree ? (text) => this.edit(text) : null);
    } else {
      turn = new AnswerTurn(message, last && !this.missingFile ? () => this.again() : null);
    }
    this.#turns.set(message, turn);
    $("turns").append(turn.element);
    return turn;
  }

  /** Draws the last turns anew: which of them can be edited or made again has changed. */
  #refresh() {
    const shown = $("turns").children;
    const keep = Math.max(0, Math.min(shown.length, this.conversation.messages.length) - 3);
    while (shown.length > keep) shown[keep].remove();
    this.conversation.messages.slice(keep).forEach((message) => this.#add(message));
  }

  // ---- an answer ----

  #body(conversation) {
    const messages = [];
    if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
    for (const message of conversation.messages) {
      if (message.role === "user") messages.push({ role: "user", content: framed(message) });
      else if (message.content) messages.push({ role: "assistant", content: message.content });
    }
    const body = { model: settings.model, messages, stream: true, stream_options: { include_usage: true } };
    const isThinking = settings.mode !== "off" && !this.#page.cannotThink();
    body.thinking = { type: isThinking ? "enabled" : "disabled" };
    if (isThinking) body.reasoning_effort = settings.mode;
    if (settings.temperature !== null) body.temperature = settings.temperature;
    if (settings.maxTokens !== null) body.max_tokens = settings.maxTokens;
    return body;
  }

  async #answer(conversation) {
    const body = this.#body(conversation);
    const message = {
      role: "assistant", content: "", reasoning: "", calls: [], model: body.model,
      mode: body.reasoning_effort ?? "off", reasoningTokens: 0, reasoningCounted: false, thoughtMs: null, writingMs: 0,
      usage: null, price: null, finish: null, problem: null,
      live: { opened: performance.now(), thinking: 0, queued: false },
    };
    const controller = new AbortController();
    conversation.messages.push(message);
    this.#running.set(conversation, controller);
    if (this.conversation === conversation) this.#refresh();
    this.#store(conversation);
    this.#page.announce("Waiting for the answer.");

    while (true) {
      try {
        for await (const chunk of chat(body, controller.signal)) this.#take(message, chunk);
        message.finish ??= "stop";
      } catch (error) {
        if (error.name === "AbortError") {
          message.finish = "stopped";
        } else if (error.status === 401 && await this.#page.askKey()) {
          continue; // with the new key
        } else {
          // Anything that is not the server's refusal is a mistake in here: show it, and let the console have it.
          if (error.status === undefined) console.error(error);
          message.problem = { text: error.message, retryAfter: error.retryAfter ?? 0 };
        }
      }
      break;
    }
    await this.#close(conversation, message);
  }

  #take(message, chunk) {
    const turn = this.#turns.get(message);
    const { live } = message;
    if (chunk.waiting) {
      live.queued = true;
      return;
    }
    if (chunk.model) message.model = chunk.model;
    const [choice] = chunk.choices ?? [];
    const { reasoning_content: reasoning, content, tool_calls: calls } = choice?.delta ?? {};
    const now = performance.now();
    if (reasoning || content) live.first ??= now;
    if (reasoning) {
      live.thinking ||= now;
      message.reasoning += reasoning;
      message.reasoningTokens += 1; // a chunk holds about one token; the true number comes with the usage
      turn?.reason(reasoning);
    }
    if ((content || calls) && live.thinking && message.thoughtMs === null) {
      message.thoughtMs = now - live.thinking;
      this.#page.announce("Thinking is done; the answer is being written.");
    }
    if (content) {
      message.content += content;
      turn?.write(content);
    }
    for (const part of calls ?? []) {
      const call = (message.calls[part.index ?? 0] ??= { name: "", arguments: "" });
      call.name += part.function?.name ?? "";
      call.arguments += part.function?.arguments ?? "";
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (live.first) message.writingMs = now - live.first;
    if (chunk.usage) {
      const { prompt_tokens: prompt = 0, completion_tokens: output = 0, completion_tokens_details: details } = chunk.usage;
      const hit = chunk.usage.prompt_cache_hit_tokens ?? chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      message.usage = { hit, miss: prompt - hit, output };
      if (details?.reasoning_tokens !== undefined) {
        message.reasoningTokens = details.reasoning_tokens;
        message.reasoningCounted = true;
      }
    }
  }

  /** The answer has ended: what it cost, its last look, and the buttons that are allowed again. */
  async #close(conversation, message) {
    if (message.reasoning) message.thoughtMs ??= performance.now() - message.live.thinking;
    message.live = null;
    this.#running.delete(conversation);
    if (this.conversation === conversation) {
      this.#turns.get(message).finish();
      const before = conversation.messages.at(-2);
      // The question may be edited again; its turn was drawn while the answer ran.
      const old = this.#turns.get(before);
      if (before.role === "user" && old.element.isConnected) {
        const turn = new UserTurn(before, this.missingFile ? null : (text) => this.edit(text));
        old.element.replaceWith(turn.element);
        this.#turns.set(before, turn);
      }
      this.#page.announce(message.problem ? "" : message.content.length < 2000
        ? `Answer: ${message.content}` : "The answer is complete.");
    }
    this.#page.changed();
    await this.#account(conversation, message);
    this.#store(conversation);
    this.#turns.get(message)?.tellFacts();
  }

  /** Adds the answer's tokens and price to its conversation's, at the prices of now. */
  async #account(conversation, message) {
    const { spent } = conversation;
    const { usage } = message;
    if (!usage) {
      // Stopped or broken off in the middle: the server counts it, but did not get to say how much.
      if (message.finish === "stopped" || message.content || message.reasoning) spent.uncounted += 1;
      return;
    }
    spent.hit += usage.hit;
    spent.miss += usage.miss;
    spent.output += usage.output;
    const now = await tariffNow();
    const price = now?.models?.[message.model] ?? now?.models?.[settings.model];
    if (!price) {
      spent.unpriced += 1;
      return;
    }
    const writing = usage.output * price.output;
    const cost = (usage.hit * price.hit + usage.miss * price.miss + writing) / 1e6;
    message.price = { cost, currency: now.currency };
    spent.currency = now.currency;
    spent.cost += cost;
    spent.uncached += ((usage.hit + usage.miss) * price.miss + writing) / 1e6;
  }

  #store(conversation) {
    if (conversation.deleted) return;
    if (!save(conversation)) this.#page.storageFull();
    this.#page.changed();
  }

  /** Stores what has come so far: the page is about to go. */
  keepRunning() {
    for (const conversation of this.#running.keys()) if (!conversation.deleted) save(conversation);
  }
}
