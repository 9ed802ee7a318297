// The gauges: /status once a second while the page can be seen, and what the shown conversation has cost.

import uPlot from "./vendor/uplot.js";
import { status } from "./api.js";
import { $, bytes, count, money, percent, short } from "./format.js";

const SECONDS = 60;
const EVERY_MS = 1000;
const AFTER_ERROR_MS = 5000;

const speeds = { x: Array.from({ length: SECONDS }, (_, i) => i - SECONDS + 1), y: Array(SECONDS).fill(null) };
let plot = null;
let timer = 0;
let modelOf = () => "";
let shown = null; // the model whose speeds the curve holds

/** `selected()` names the model whose gauges are shown. */
export function start(selected) {
  modelOf = selected;
  document.addEventListener("visibilitychange", poll);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlot);
  new ResizeObserver(drawPlot).observe($("spark"));
  poll();
}

/** Asks now, for instance because a key was given or another model chosen. */
export async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  let wait = EVERY_MS;
  try {
    show(await status());
  } catch (error) {
    wait = AFTER_ERROR_MS;
    $("gauge-note").hidden = false;
    $("gauge-note").textContent = error.status === 401 ? "Gauges need an API key." : "No figures from the server just now.";
    curve(null);
  }
  clearTimeout(timer); // of another call that waited meanwhile
  timer = setTimeout(poll, wait);
}

/** Figures of the model with this name, or of all models together where it is not one of them (`auto`, an alias). */
function figures(models, name) {
  const chosen = models.filter((model) => model.id === name);
  const from = chosen.length ? chosen : models;
  const sum = (field) => {
    const known = from.map((model) => model[field]).filter((value) => typeof value === "number");
    return known.length ? known.reduce((total, value) => total + value, 0) : null;
  };
  return { sum, label: chosen.length ? name : models.length > 1 ? "all models" : models[0]?.id ?? "" };
}

const said = (value, format) => (value === null || value === undefined ? "–" : format(value));

function show({ models = [], process = {}, version, uptime_s: uptime }) {
  const { sum, label } = figures(models, modelOf());
  $("gauge-note").hidden = true;
  if (label !== shown) speeds.y.fill(null);
  shown = label;
  $("gauge-model").textContent = label;

  const speed = sum("tokens_per_s");
  $("speed").textContent = said(speed, (value) => (value < 100 ? value.toFixed(1) : count(value)));
  $("prompt-speed").textContent = said(sum("prompt_tokens_per_s"), short);
  curve(speed);

  const here = sum("kv_cache_bytes");
  const old = sum("v32_kv_cache_bytes");
  const capacity = sum("kv_cache_capacity_bytes");
  const largest = Math.max(here ?? 0, old ?? 0);
  $("kv-here").textContent = said(here, bytes);
  $("kv-old").textContent = said(old, bytes);
  fill($("kv-here-bar"), largest ? here / largest : 0);
  fill($("kv-old-bar"), largest ? old / largest : 0);
  const note = !largest ? ["Nothing is held at the moment."] : here && old ? [
    old >= here ? `${(old / here).toFixed(1)} times less than V3.2.` : `${(here / old).toFixed(1)} times as much as V3.2.`,
  ] : [];
  if (capacity) note.push(`Room for ${bytes(capacity)}.`);
  $("kv-note").textContent = note.join(" ");

  $("running").textContent = said(sum("running"), count) + said(sum("max_running"), (most) => ` of ${count(most)}`);
  $("waiting").textContent = said(sum("waiting"), count);
  const read = sum("prompt_tokens_total");
  $("hit-rate").textContent = read ? percent(sum("cached_tokens_total") / read) : "–";
  $("disk").textContent = said(sum("disk_cache_bytes"), bytes);
  $("memory").textContent = said(process.rss_bytes, bytes);
  $("cpu").textContent = said(process.cpu_fraction, percent);
  $("server-note").textContent = version ? `longreach ${version}, up ${said(uptime, span)}` : "";
}

function span(time) {
  if (time < 90) return `${Math.round(time)} s`;
  if (time < 5400) return `${Math.round(time / 60)} min`;
  return time < 172800 ? `${Math.round(time / 3600)} h` : `${Math.round(time / 86400)} days`;
}

const fill = (bar, share) => { bar.style.width = `${Math.min(100, 100 * share)}%`; };

// ---- the curve ----

function curve(speed) {
  speeds.y.push(speed);
  speeds.y.shift();
  plot?.setData([speeds.x, speeds.y]);
}

/** Made anew for a new width or theme: a canvas does not follow the style sheet. */
export function drawPlot() {
  const box = $("spark");
  if (!box.clientWidth) return;
  plot?.destroy();
  const colour = getComputedStyle(box).color;
  plot = new uPlot({
    width: box.clientWidth, height: 56, padding: [3, 0, 3, 0],
    legend: { show: false }, cursor: { show: false }, axes: [{ show: false }, { show: false }],
    scales: { x: { time: false, range: [-SECONDS + 1, 0] }, y: { range: (_, low, high) => [0, Math.max(1, (high ?? 0) * 1.1)] } },
    series: [{}, {
      stroke: colour, width: 1.5, points: { show: false },
      fill: colour.replace("rgb(", "rgba(").replace(")", ", 0.14)"), // a computed colour always reads rgb(r, g, b)
    }],
  }, [speeds.x, speeds.y], box);
}

// ---- this conversation ----

/** What the conversation has used so far. */
export function showSpent(spent) {
  const read = spent.hit + spent.miss;
  $("hits").textContent = read ? percent(spent.hit / read) : "–";
  fill($("hits-bar"), read ? spent.hit / read : 0);
  $("hits-note").textContent = read
    ? `${count(spent.hit)} of ${count(read)} prompt tokens came from the cache; ${count(spent.output)} tokens written.`
    : "Nothing sent yet.";
  const isPriced = spent.cost > 0 || (read > 0 && !spent.unpriced);
  $("cost").textContent = isPriced ? money(spent.cost, spent.currency) : "–";
  $("cost-uncached").textContent = isPriced ? money(spent.uncached, spent.currency) : "–";
  const note = [];
  const answers = (number) => `${count(number)} ${number === 1 ? "answer" : "answers"}`;
  if (spent.unpriced) note.push(`No price is set for the model of ${answers(spent.unpriced)}.`);
  if (spent.uncounted) note.push(`${answers(spent.uncounted)} ended early and ${spent.uncounted === 1 ? "is" : "are"} not in these figures.`);
  $("cost-note").textContent = note.join(" ");
}
