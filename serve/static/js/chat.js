// The conversation: what is said, sent, streamed, edited and said again.

import { ApiError, streamChat } from "./api.js";
import { $, announce, el, store } from "./dom.js";
import { MessageView } from "./message.js";
import { sampling, systemPrompt } from "./settings.js";

/** {role, content, reasoning_content?, tool_calls?, stats?} in order, the system prompt aside. */
let messages = store.get("messages", []);
let views = [];
let running = null; // {controller, view} while an answer streams

export function startChat() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    sendText();
  });
  $("stop").addEventListener("click", stop);
  $("composer-text").addEventListener("input", grow);
  $("composer-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      sendText();
    } else if (event.key === "ArrowUp" && $("composer-text").value === "") {
      event.preventDefault();
      editLast();
    }
  });
  $("scroll").addEventListener("scroll", () => ($("to-end").hidden = atEnd(160)));
  $("to-end").addEventListener("click", toEnd);
  show();
}

export function newChat() {
  stop();
  messages = [];
  save();
  show();
  $("composer-text").focus();
}

export function stop() {
  running?.controller.abort();
}

export function regenerate() {
  const last = messages.at(-1);
  if (running || !last) return;
  if (last.role === "assistant") cut(messages.length - 1);
  if (messages.length) answer();
}

function editLast() {
  const index = messages.findLastIndex((message) => message.role === "user");
  if (index >= 0 && !running) views[index].edit();
}

function sendText() {
  const text = $("composer-text").value.trim();
  if (!text || running) return;
  $("composer-text").value = "";
  grow();
  add({ role: "user", content: text });
  answer();
}

function add(message) {
  messages.push(message);
  const view = new MessageView(message, {
    edited: (text) => edited(view, text),
    again: () => regenerate(),
    remove: () => !running && cut(views.indexOf(view)),
  });
  views.push(view);
  $("messages").append(view.node);
  $("empty").hidden = true;
  save();
  toEnd();
  return view;
}

/** A user's message that is edited is asked anew; an edited answer is only replaced. */
function edited(view, text) {
  const index = views.indexOf(view);
  if (index < 0 || running) return;
  const { role } = messages[index];
  if (role === "assistant") {
    messages[index].content = text;
    view.draw();
    save();
    return;
  }
  cut(index);
  add({ role, content: text });
  answer();
}

function cut(index) {
  messages.length = index;
  for (const view of views.splice(index)) view.node.remove();
  $("empty").hidden = messages.length > 0;
  notice(null);
  save();
}

function show() {
  const kept = messages;
  messages = [];
  views = [];
  $("messages").replaceChildren();
  $("empty").hidden = kept.length > 0;
  $("usage").textContent = "";
  notice(null);
  for (const message of kept) add(message);
}

const save = () => store.set("messages", messages);

// -- an answer ----------------------------------------------------------------------------------------------------

async function answer() {
  notice(null);
  const sent = messages.map(plain);
  const system = systemPrompt();
  if (system) sent.unshift({ role: "system", content: system });
  const message = { role: "assistant", content: "" };
  const view = add(message);
  const controller = new AbortController();
  running = { controller, view };
  busy(true);
  const clock = { sent: performance.now(), first: null, last: null };
  let failed = null;
  try {
    const body = { model: $("model").value || undefined, messages: sent, ...sampling() };
    for await (const chunk of streamChat(body, controller.signal)) {
      if (take(message, chunk)) {
        clock.last = performance.now();
        clock.first ??= clock.last;
      }
      note(message, clock, chunk.usage);
      redraw(view);
    }
  } catch (error) {
    if (error.name !== "AbortError") failed = error;
    else message.stopped = true;
  }
  running = null;
  view.draw(false);
  busy(false);
  const nothing = !message.content && !message.reasoning_content && !message.tool_calls;
  if (nothing && failed && messages.at(-1) === message) cut(messages.length - 1);
  if (failed) notice(failed);
  else announce(message.stopped ? "Stopped." : `The answer is complete: ${message.stats?.output ?? 0} tokens.`);
  save();
  follow();
}

/** A message as the API takes it. */
function plain({ role, content, reasoning_content, tool_calls }) {
  return { role, content, ...(reasoning_content && { reasoning_content }), ...(tool_calls && { tool_calls }) };
}

/** Adds a chunk to `message`; whether it held anything of it. */
function take(message, chunk) {
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  const { content, tool_calls } = choice.delta;
  const reasoning = choice.delta.reasoning_content ?? choice.delta.reasoning;
  if (content) message.content += content;
  if (reasoning) message.reasoning_content = (message.reasoning_content ?? "") + reasoning;
  for (const piece of tool_calls ?? []) {
    const calls = (message.tool_calls ??= []);
    const call = (calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (piece.id) call.id = piece.id;
    if (piece.function?.name) call.function.name = piece.function.name;
    call.function.arguments += piece.function?.arguments ?? "";
  }
  if (choice.finish_reason === "length") message.cut = true;
  return Boolean(content || reasoning || tool_calls?.length);
}

/** Token counts are the server's; the speed is of the tokens after the first. */
function note(message, clock, usage) {
  if (!usage) return;
  const seconds = (clock.last - clock.first) / 1000;
  message.stats = {
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    output: usage.completion_tokens,
    first: clock.first === null ? null : clock.first - clock.sent,
    speed: seconds > 0 && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : null,
  };
  $("usage").textContent = `${usage.prompt_tokens + usage.completion_tokens} tokens of context used`;
}

let drawing = null;

/** Draws at most every 60 ms, and less often where drawing takes longer. */
function redraw(view) {
  if (drawing !== null) return;
  drawing = setTimeout(
    () =>
      requestAnimationFrame(() => {
        drawing = null;
        if (running?.view !== view) return;
        const follows = atEnd(60);
        view.draw(true);
        if (follows) toEnd();
      }),
    Math.max(60, 4 * view.drawTime),
  );
}

function busy(state) {
  $("send").hidden = state;
  $("stop").hidden = !state;
  $("messages").setAttribute("aria-busy", String(state));
  if (state) views.at(-1).draw(true);
}

function notice(error) {
  $("notice").hidden = error === null;
  if (error === null) return;
  const text = error instanceof ApiError ? error.message : `This page failed: ${error.message}`;
  $("notice").replaceChildren(el("span", {}, text), el("button", { type: "button", onclick: regenerate }, "Try again"));
  follow();
}

// -- scrolling ----------------------------------------------------------------------------------------------------

const atEnd = (slack) => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < slack;

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function follow() {
  if (atEnd(240)) toEnd();
}

function grow() {
  const area = $("composer-text");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
