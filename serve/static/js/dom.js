// Small helpers for building elements.

export const $ = (id) => document.getElementById(id);

/** An element; `attributes` are set as attributes, functions as listeners ("onclick"), and `children` appended. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const icon = (name) => svg("svg", { "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));

export const iconButton = (name, label, onclick) =>
  el("button", { type: "button", class: "icon", title: label, "aria-label": label, onclick }, icon(name));

/** Tells a screen reader. */
export function announce(text) {
  $("announce").textContent = text;
}

/** Copies `text`, and shows on `button` for a moment that it did. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "hidden" }); // without https there is no clipboard interface
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied");
  const use = button.querySelector("use");
  use.setAttribute("href", "#i-check");
  setTimeout(() => use.setAttribute("href", "#i-copy"), 1500);
}

/** What the browser keeps, where it allows it: "localStorage", or "sessionStorage" for the tab's life. */
class Store {
  constructor(kind) {
    this.kind = kind;
  }

  get(name, fallback = null) {
    try {
      const text = window[this.kind].getItem(`llmx.${name}`);
      return text === null ? fallback : JSON.parse(text);
    } catch {
      return fallback;
    }
  }

  set(name, value) {
    try {
      if (value === null) window[this.kind].removeItem(`llmx.${name}`);
      else window[this.kind].setItem(`llmx.${name}`, JSON.stringify(value));
    } catch {
      // full, or forbidden: the page works without
    }
  }
}

export const store = new Store("localStorage");
export const tabStore = new Store("sessionStorage");
