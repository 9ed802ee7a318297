// Numbers as people read them, and the two helpers for building elements that every module uses.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => whole.format(value);

/** 1,234 stays as it is; from ten thousand on it becomes 12.3k, 1.05M, 284B. */
export function short(value) {
  if (value < 10000) return count(value);
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value).replace("K", "k");
}

/** Binary units, three digits: 812 B, 3.31 KiB, 1.2 GiB. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(value) : Number(value.toPrecision(3))}\u00a0${units[unit]}`;
}

export function seconds(milliseconds) {
  const value = milliseconds / 1000;
  if (value < 60) return `${value.toFixed(1)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 60 ? `${minutes} min ${Math.floor(value % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** An answer of a small model costs millionths of a dollar, so digits are counted from the first that is not zero. */
export function money(value, currency) {
  if (value === 0) return new Intl.NumberFormat("en", { style: "currency", currency }).format(0);
  const digits = value < 1 ? { maximumSignificantDigits: 3 } : { maximumFractionDigits: 2 };
  return new Intl.NumberFormat("en", { style: "currency", currency, ...digits }).format(value);
}

export const percent = (share) => `${Math.round(share * 100)} %`;

export const $ = (id) => document.getElementById(id);

/** `element("p", "soft", "text")`, or with further nodes as children. Text is never read as HTML. */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function button(className, label, action) {
  const made = element("button", className, label);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}
