// One message on the page.

import { copy, el, iconButton } from "./dom.js";
import { render } from "./markdown.js";

const NAMES = { user: "You", assistant: "Model", tool: "Tool" };

export class MessageView {
  /** `actions`: edited(text), again(), remove(). */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.drawTime = 0; // milliseconds that drawing took last
    this.body = el("div", { class: "body" });
    this.tools = el("div", { class: "tools" });
    const name = NAMES[message.role] ?? message.role;
    this.node = el("li", { class: `message ${message.role}` }, el("div", { class: "who" }, name), this.body, this.tools);
    this.draw();
  }

  draw(grows = false) {
    const begun = performance.now();
    const { role, content, reasoning_content: reasoning, tool_calls: calls } = this.message;
    this.node.classList.toggle("running", grows);
    if (role === "assistant") this.drawAnswer(content, reasoning, calls ?? [], grows);
    else this.body.textContent = content;
    this.drawTools(grows);
    this.drawTime = performance.now() - begun;
  }

  drawAnswer(content, reasoning, calls, grows) {
    this.text ??= el("div", { class: "markdown" });
    const parts = [];
    if (reasoning) {
      this.thoughts ??= el("details", { class: "reasoning" }, el("summary", {}, "Reasoning"), el("div", { class: "text" }));
      this.thoughts.lastChild.textContent = reasoning;
      if (grows && !content && this.wasOpened === undefined) this.thoughts.open = this.wasOpened = true;
      else if (content && this.wasOpened) this.thoughts.open = this.wasOpened = false;
      parts.push(this.thoughts);
    }
    if (content) {
      render(this.text, content, grows);
      parts.push(this.text);
    }
    for (const { function: call } of calls.filter(Boolean)) {
      parts.push(el("div", { class: "call" }, el("div", { class: "name" }, `calls ${call.name}`), el("pre", { tabindex: "0" }, pretty(call.arguments))));
    }
    if (!parts.length && grows) parts.push(el("span", { class: "waiting", role: "img", "aria-label": "Waiting" }, el("i"), el("i"), el("i")));
    if (parts.length !== this.body.children.length || parts.some((part, i) => part !== this.body.children[i])) {
      this.body.replaceChildren(...parts);
    }
  }

  drawTools(grows) {
    const { role, content } = this.message;
    const stats = el("span", { class: "stats" }, this.stats());
    if (grows) {
      this.tools.replaceChildren(stats);
      return;
    }
    const copying = iconButton("copy", "Copy", () => copy(content, copying));
    const buttons = [copying, iconButton("edit", "Edit", () => this.edit())];
    if (role === "assistant") buttons.push(iconButton("again", "Regenerate", this.actions.again));
    else buttons.push(iconButton("trash", "Delete from here on", this.actions.remove));
    this.tools.replaceChildren(...buttons, stats);
  }

  stats() {
    const { stats, stopped, cut } = this.message;
    const facts = [];
    if (stats) {
      facts.push(`${stats.prompt} + ${stats.output} tokens`);
      if (stats.cached) facts.push(`${stats.cached} cached`);
      if (stats.first !== null) facts.push(`first after ${duration(stats.first)}`);
      if (stats.speed !== null) facts.push(`${stats.speed.toFixed(stats.speed < 100 ? 1 : 0)} tokens/s`);
    }
    if (stopped) facts.push("stopped");
    if (cut) facts.push("cut at the token limit");
    return facts.join(" · ");
  }

  edit() {
    if (this.node.querySelector(".editor")) return;
    const area = el("textarea", { "aria-label": "Edit the message", rows: Math.min(14, this.message.content.split("\n").length + 1) });
    area.value = this.message.content;
    const close = () => {
      editor.replaceWith(this.body);
      this.tools.hidden = false;
      this.node.querySelector('[aria-label="Edit"]')?.focus();
    };
    const save = () => {
      close();
      if (area.value.trim()) this.actions.edited(area.value);
    };
    const label = this.message.role === "assistant" ? "Save" : "Send";
    const buttons = el("div", { class: "actions" }, el("button", { type: "button", onclick: close }, "Cancel"), el("button", { type: "button", class: "primary", onclick: save }, label));
    const editor = el("div", { class: "editor" }, area, buttons);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (!event.shiftKey && label === "Send")) && !event.isComposing) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.body.replaceWith(editor);
    this.tools.hidden = true;
    area.focus();
  }
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
