// Sampling controls: an empty field leaves the model's default.

import { $, el, store } from "./dom.js";

const CONTROLS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, range: true },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, range: true },
  { name: "top_k", label: "Top-k", min: 0, max: 100000, step: 1 },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1000000, step: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 2, step: 0.01 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1 },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
];

let values = store.get("settings", {});

export function buildSettings() {
  $("system").value = values.system ?? "";
  $("system").addEventListener("input", () => keep("system", $("system").value || undefined));
  $("controls").replaceChildren(...CONTROLS.map(control), stopControl());
}

export function resetSettings() {
  values = {};
  store.set("settings", values);
  buildSettings();
}

/** The system prompt, or "". */
export const systemPrompt = () => values.system ?? "";

/** The request's fields that are set. */
export function sampling() {
  const fields = {};
  for (const { name } of CONTROLS) if (values[name] !== undefined) fields[name] = values[name];
  if (values.stop) fields.stop = values.stop.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  return fields;
}

function keep(name, value) {
  if (value === undefined) delete values[name];
  else values[name] = value;
  store.set("settings", values);
}

function control({ name, label, min, max, step, range }) {
  const id = `set-${name}`;
  const number = el("input", { id, type: "number", min, max, step: step < 1 ? "any" : step, placeholder: "default", inputmode: "decimal" });
  const slider = range ? el("input", { type: "range", min, max, step, "aria-label": `${label}, slider` }) : null;
  number.value = values[name] ?? "";
  if (slider) slider.value = values[name] ?? 1;
  number.addEventListener("input", () => {
    const valid = number.checkValidity();
    number.setAttribute("aria-invalid", String(!valid));
    number.title = valid ? "" : number.validationMessage;
    if (!valid) return;
    keep(name, number.value === "" ? undefined : Number(number.value));
    if (slider) slider.value = number.value === "" ? 1 : number.value;
  });
  slider?.addEventListener("input", () => {
    number.value = slider.value;
    number.setAttribute("aria-invalid", "false");
    keep(name, Number(slider.value));
  });
  return el("div", { class: "control" }, el("label", { for: id }, label), number, slider);
}

function stopControl() {
  const area = el("textarea", { id: "set-stop", rows: 2, placeholder: "none" });
  area.value = values.stop ?? "";
  area.addEventListener("input", () => keep("stop", area.value || undefined));
  return el("div", { class: "control wide" }, el("label", { for: "set-stop" }, "Stop at (one on each line)"), area);
}
