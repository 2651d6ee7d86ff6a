// Markdown to sanitised HTML. Whatever a model writes, nothing of it runs and nothing is fetched.

import DOMPurify from "../vendor/purify.js";
import hljs from "../vendor/highlight.js";
import { Marked } from "../vendor/marked.js";
import { copy, el, icon } from "./dom.js";

const marked = new Marked({ gfm: true, breaks: true });

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong", "del",
    "a", "table", "thead", "tbody", "tr", "th", "td", "sup", "sub", "kbd", "mark", "input", "details", "summary", "b", "i",
  ],
  ALLOWED_ATTR: ["href", "title", "class", "start", "align", "type", "checked", "disabled", "open"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  ADD_URI_SAFE_ATTR: ["start", "align", "type", "checked", "disabled", "open"], // hold no address
};

/** Fills `node` with the rendered `text`. While an answer still `grows`, its code is not highlighted yet. */
export function render(node, text, grows = false) {
  const fragment = DOMPurify.sanitize(marked.parse(text), { ...ALLOWED, RETURN_DOM_FRAGMENT: true });
  for (const box of fragment.querySelectorAll("input")) {
    if (box.type === "checkbox") box.disabled = true;
    else box.remove();
  }
  for (const node of fragment.querySelectorAll("[class]")) {
    const kept = [...node.classList].filter((name) => node.tagName === "CODE" && /^language-[\w+#.-]+$/.test(name));
    node.className = kept.join(" ");
  }
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = el("div", { class: "scroll-x", tabindex: "0" });
    table.replaceWith(box);
    box.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) code.parentNode.replaceWith(codeBlock(code, grows));
  node.replaceChildren(fragment);
}

function codeBlock(code, grows) {
  const language = /language-([\w+#.-]+)/.exec(code.className)?.[1] ?? "";
  const text = code.textContent;
  const shown = el("code", {});
  if (!grows && language && hljs.getLanguage(language)) {
    // highlight.js escapes the code itself; the sanitiser makes sure of it.
    const html = hljs.highlight(text, { language, ignoreIllegals: true }).value;
    shown.append(
      DOMPurify.sanitize(html, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }),
    );
  } else shown.textContent = text;
  const button = el("button", { type: "button", "aria-label": "Copy the code" }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(text.replace(/\n$/, ""), button));
  return el(
    "div",
    { class: "code" },
    el("div", { class: "caption" }, el("span", {}, language || "text"), button),
    el("pre", { tabindex: "0" }, shown),
  );
}
