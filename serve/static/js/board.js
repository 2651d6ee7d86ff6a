// The server, drawn live from /metrics.

import { request } from "./api.js";
import { Chart } from "./charts.js";
import { $, el } from "./dom.js";
import { counted, quantile, rate, Reading } from "./metrics.js";

const PERIOD = 1000; // ms between readings
const KEPT = 900; // readings
const SMOOTH = 5; // readings that a rate spans

const LATENCIES = [
  ["First token", "vllm:time_to_first_token_seconds"],
  ["Between tokens", "vllm:inter_token_latency_seconds"],
  ["Whole request", "vllm:e2e_request_latency_seconds"],
  ["Queue", "vllm:request_queue_time_seconds"],
  ["Prefill", "vllm:request_prefill_time_seconds"],
  ["Decode", "vllm:request_decode_time_seconds"],
];
const TOKENS = ["vllm:generation_tokens_total", "vllm:prompt_tokens_total"];
const QUANTILES = [0.5, 0.9, 0.95, 0.99];

export class Board {
  constructor() {
    this.texts = []; // {text, time}: kept as text, so that another model can be looked at afterwards
    this.readings = [];
    this.model = "";
    this.timer = null;
  }

  start() {
    this.build();
    if (this.timer === null) this.poll();
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  build() {
    if (this.charts) return;
    this.charts = {
      requests: new Chart("Requests", ["running", "waiting"], { format: whole, least: 4 }),
      tokens: new Chart("Tokens per second", ["generated", "prompt"], { format: short, least: 10 }),
      cache: new Chart("Cache", ["in use", "prefix hits"], { format: percent, least: 1, most: 1 }),
      first: new Chart("Time to first token", ["p50", "p90", "p99"], { format: seconds, least: 0.01 }),
    };
    $("charts").replaceChildren(...Object.values(this.charts).map(({ node }) => node));
    $("metrics-model").addEventListener("change", () => {
      this.model = $("metrics-model").value;
      this.readings = this.texts.map(({ text, time }) => new Reading(text, time, this.model));
      this.draw();
    });
    $("metrics-window").addEventListener("change", () => this.draw());
    $("metrics-pause").addEventListener("click", () => this.pause(!this.paused));
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.timer !== null) this.poll();
    });
  }

  pause(paused) {
    this.paused = paused;
    $("metrics-pause").setAttribute("aria-pressed", String(paused));
    $("metrics-pause").textContent = paused ? "Go on" : "Pause";
  }

  async poll() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), PERIOD);
    if (this.paused || document.hidden || this.reading) return;
    this.reading = true;
    try {
      const text = await (await request("/metrics")).text();
      this.add(text, Date.now());
      $("metrics-state").textContent = "";
    } catch (error) {
      $("metrics-state").textContent = error.message;
      if (error.status === 401) this.pause(true); // the user would rather not give a key
    } finally {
      this.reading = false;
    }
  }

  add(text, time) {
    this.texts.push({ text, time });
    this.readings.push(new Reading(text, time, this.model));
    if (this.texts.length > KEPT) {
      this.texts.shift();
      this.readings.shift();
    }
    this.offerModels();
    this.draw();
  }

  offerModels() {
    const known = [...new Set(this.readings.flatMap(({ models }) => [...models]))].sort();
    const select = $("metrics-model");
    if (known.length === select.options.length - 1) return;
    select.replaceChildren(el("option", { value: "" }, "All"), ...known.map((name) => el("option", { value: name }, name)));
    select.value = this.model;
  }

  draw() {
    const now = this.readings.at(-1);
    if (!now) return;
    const span = 1000 * Number($("metrics-window").value);
    const shown = this.readings.filter(({ time }) => time >= now.time - span);
    const before = (index) => shown[Math.max(0, index - SMOOTH)];
    const points = (values) => shown.map((reading, index) => ({ time: reading.time, values: values(reading, before(index)) }));
    const draw = (name, values) => this.charts[name].draw(points(values), span, now.time);
    draw("requests", (r) => [r.value("vllm:num_requests_running"), r.value("vllm:num_requests_waiting")]);
    draw("tokens", (r, b) => (r === b ? [null, null] : TOKENS.map((name) => rate(b, r, name))));
    draw("cache", (r, b) => [r.value("vllm:kv_cache_usage_perc"), hits(b, r)]);
    const minute = (reading) => shown.findLast(({ time }) => time <= reading.time - 60000) ?? shown[0];
    draw("first", (r) => {
      const buckets = counted(minute(r), r, LATENCIES[0][1]);
      return [0.5, 0.9, 0.99].map((q) => quantile(q, buckets));
    });
    this.drawFigures(now, before(shown.length - 1));
    this.drawTable(now, shown[0]);
  }

  drawFigures(now, before) {
    const figures = [
      ["Running", whole(now.value("vllm:num_requests_running"))],
      ["Waiting", whole(now.value("vllm:num_requests_waiting"))],
      ["Tokens per second", short(rate(before, now, "vllm:generation_tokens_total"))],
      ["Requests per minute", short(60 * rate(before, now, "vllm:request_success_total"))],
      ["Cache in use", percent(now.value("vllm:kv_cache_usage_perc"))],
      ["Tokens generated", short(now.value("vllm:generation_tokens_total"))],
    ];
    $("figures").replaceChildren(...figures.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  /** Of the window's requests, or of all where it had none. */
  drawTable(now, first) {
    const rows = LATENCIES.map(([label, name]) => {
      const recent = counted(first, now, name);
      const buckets = recent.at(-1)?.[1] ? recent : counted(null, now, name);
      const cells = QUANTILES.map((q) => quantile(q, buckets)).map((value) => (value === null ? "–" : seconds(value)));
      return el("tr", {}, el("th", { scope: "row" }, label), ...cells.map((text) => el("td", {}, text)), el("td", {}, whole(buckets.at(-1)?.[1] ?? 0)));
    });
    const names = ["", ...QUANTILES.map((q) => `p${100 * q}`), "count"];
    const head = el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name))));
    $("latency").replaceChildren(el("caption", { class: "hidden" }, "Latency percentiles"), head, el("tbody", {}, ...rows));
  }
}

/** The part of the looked-up prompt tokens whose state was kept; null where none was looked up. */
function hits(before, now) {
  const queries = rate(before, now, "vllm:prefix_cache_queries_total");
  return queries > 0 ? Math.min(1, rate(before, now, "vllm:prefix_cache_hits_total") / queries) : null;
}

const whole = (value) => Math.round(value).toLocaleString("en");
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;

function short(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return value >= 100 || Number.isInteger(value) ? whole(value) : value.toFixed(1);
}

function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 1) return `${value < 0.01 ? (1000 * value).toFixed(1) : Math.round(1000 * value)} ms`;
  return `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;
}
