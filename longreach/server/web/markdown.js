// Markdown as it arrives: marked reads it, DOMPurify cleans it, and only the end of the text is read again.
//
//   const shown = new MarkdownStream(element);  shown.append("some *te");  shown.append("xt*");  shown.finish();
//
// A finished block (a paragraph, a list, a block of code) stays in the page as it is. The last two blocks are rendered
// anew at most ten times a second, and less often where that takes long, so a long answer costs no more than a short one.

import DOMPurify from "./vendor/dompurify.js";
import { Lexer, Marked } from "./vendor/marked.js";
import { button, element } from "./format.js";

const INTERVAL_MS = 100;

// ---- from text to safe HTML ----

const escapeHtml = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

// Formulas are shown as they were written: Markdown would eat their backslashes and underscores.
const formula = (level, start, pattern) => ({
  name: `formula-${level}`, level,
  start: (source) => source.match(start)?.index,
  tokenizer: (source) => {
    const match = pattern.exec(source);
    return match ? { type: `formula-${level}`, raw: match[0], text: match[0].trim() } : undefined;
  },
  renderer: (token) => level === "block"
    ? `<p><code>${escapeHtml(token.text)}</code></p>` : `<code>${escapeHtml(token.text)}</code>`,
});

// HTML in an answer is text to be read, but for these tags without attributes, which Markdown has no signs for.
const PLAIN_TAGS = /&#60;(\/?(?:b|br|dd|details|dl|dt|em|i|ins|kbd|s|strong|sub|summary|sup|u))\s*\/?&#62;/gi;

const marked = new Marked({ gfm: true });
marked.use({
  extensions: [
    formula("inline", /\\\(|\\\[|\$\$/, /^(?:\\\([^\n]+?\\\)|\\\[[^\n]+?\\\]|\$\$[^\n]+?\$\$)/),
    formula("block", /\\\[|\$\$/, /^(?:\\\[[\s\S]+?\\\]|\$\$[\s\S]+?\$\$) *(?:\n+|$)/),
  ],
  renderer: {
    // A picture would be a request to whoever the answer names, so it becomes a link that a person may follow.
    image: ({ href, text }) => `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`,
    html: ({ text }) => escapeHtml(text).replace(PLAIN_TAGS, "<$1>"),
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  },
});

const SAFE = {
  RETURN_DOM_FRAGMENT: true,
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "dd", "del", "details", "dl", "dt", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "i", "ins", "kbd", "li", "ol", "p", "pre", "s", "strong", "sub", "summary", "sup", "table", "tbody", "td", "th", "thead",
    "tr", "u", "ul",
  ],
  // No class, id or style: an answer must not be able to look like a part of the page.
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"], // or their values would have to look like addresses
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  // The one class that means something: the language of a block of code, set by marked.
  const language = node.nodeName === "CODE" && /^language-[\w+#.-]+$/.test(node.className);
  if (!language) node.removeAttribute("class");
  if (node.nodeName === "A" && node.hasAttribute("href")) {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

/** HTML, whatever it holds, as nodes that are safe to show. */
export const clean = (html) => DOMPurify.sanitize(html, SAFE);

/** Code gets a line above it with its language and a button; wide tables scroll on their own. */
function finishBlocks(fragment) {
  for (const code of fragment.querySelectorAll("pre > code")) {
    const pre = code.parentElement;
    const copy = button("quiet", "Copy", async () => {
      await copyText(code.textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    copy.setAttribute("aria-label", "Copy this code");
    const bar = element("div", "code-bar", element("span", "", code.className.replace("language-", "") || "text"), copy);
    const box = element("div", "code");
    pre.replaceWith(box);
    pre.tabIndex = 0; // scrolls sideways, so the keyboard must reach it
    box.append(bar, pre);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = element("div", "wide");
    box.tabIndex = 0;
    table.replaceWith(box);
    box.append(table);
  }
  return fragment;
}

/** Copies text; the older way where the page was not opened over HTTPS or on this machine. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element("textarea", "away");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

// ---- the growing text ----

export class MarkdownStream {
  #target;
  #text = "";
  #done = 0; // characters of #text whose blocks are final
  #kept = 0; // child nodes of #target that show them
  #links = {}; // [name]: address lines of final blocks
  #hasLinks = false;
  #timer = 0;
  #pause = INTERVAL_MS;
  #finished = false;

  constructor(target) {
    this.#target = target;
  }

  append(text) {
    // marked counts a line end as one character, and places in the text are counted here.
    this.#text += text.replaceAll("\r", "");
    if (this.#timer) return;
    this.#timer = setTimeout(() => requestAnimationFrame(() => {
      this.#timer = 0;
      if (!this.#finished) this.#draw();
    }), this.#pause);
  }

  /** Shows everything that has come. Nothing is appended after it. */
  finish() {
    clearTimeout(this.#timer);
    this.#finished = true;
    if (this.#hasLinks) {
      // Names of links may be defined below their use, which only a reading of the whole can resolve.
      this.#done = 0;
      this.#kept = 0;
      this.#links = {};
    }
    this.#draw();
  }

  #draw() {
    const started = performance.now();
    const lexer = new Lexer(marked.defaults);
    Object.assign(lexer.tokens.links, this.#links);
    const tokens = lexer.lex(this.#text.slice(this.#done));
    this.#hasLinks ||= Object.keys(tokens.links).length > 0;

    // Two blocks stay open: "1. a", then "2" is a list and a paragraph until the next letter makes it one list again.
    let open = tokens.length;
    for (let blocks = 0; open > 0 && blocks < 2; open--) if (tokens[open - 1].type !== "space") blocks += 1;
    const closed = tokens.slice(0, open);

    while (this.#target.childNodes.length > this.#kept) this.#target.lastChild.remove();
    if (closed.length) {
      this.#target.append(this.#fragment(closed, tokens.links));
      this.#kept = this.#target.childNodes.length;
      for (const token of closed) {
        this.#done += token.raw.length;
        if (token.type === "def") this.#links[token.tag] ??= { href: token.href, title: token.title };
      }
    }
    this.#target.append(this.#fragment(tokens.slice(open), tokens.links));
    this.#pause = Math.max(INTERVAL_MS, 4 * (performance.now() - started));
  }

  #fragment(tokens, links) {
    tokens.links = links;
    return finishBlocks(clean(marked.parser(tokens)));
  }
}
