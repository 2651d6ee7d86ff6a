// The server's API: keys, errors, streams.

import { store, tabStore } from "./dom.js";

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let key = store.get("key") ?? tabStore.get("key", "");
let askForKey = async () => null;

/** `ask(refused)` shows a dialog and gives {key, keep}, or null where the user does not want to. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function setKey(value, keep) {
  key = value;
  store.set("key", keep && value ? value : null);
  tabStore.set("key", value && !keep ? value : null);
}

let asking = null;

/** fetch with the API key; asks for one where the server wants it, and tries again. Throws ApiError. */
export async function request(path, options = {}, { quiet = false } = {}) {
  for (;;) {
    const used = key;
    const headers = { ...options.headers, ...(used ? { authorization: `Bearer ${used}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer.");
    }
    if (response.ok) return response;
    if (response.status === 401 && !quiet) {
      if (used !== key) continue; // another request has asked meanwhile
      asking ??= askForKey(used !== "").finally(() => (asking = null));
      const given = await asking;
      if (given !== null) {
        setKey(given.key, given.keep);
        continue;
      }
    }
    throw await failure(response);
  }
}

async function failure(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new ApiError(response.status, error.message, error.code);
  } catch {
    return new ApiError(response.status, `The server answered with status ${response.status}.`);
  }
}

export async function listModels() {
  return (await (await request("/v1/models")).json()).data;
}

/** The chunks of a streamed chat completion. Throws ApiError, also for an error event in the middle. */
export async function* streamChat(body, signal) {
  const options = { include_usage: true, continuous_usage_stats: true };
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: options }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error.message, chunk.error.code);
    yield chunk;
  }
}

/** The `data` of server-sent events, whose lines may arrive in any pieces. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split(/\r\n|\n|\r(?!$)/);
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
    if (done) return;
  }
}
