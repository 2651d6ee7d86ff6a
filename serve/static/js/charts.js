// A line chart in SVG: time on the x axis, one or more series.

import { el, svg } from "./dom.js";

const WIDTH = 560;
const HEIGHT = 190;
const LEFT = 46;
const RIGHT = 10;
const TOP = 10;
const BOTTOM = 22;

/** The smallest of 1, 2, 4, 6, 8 × 10^n that `value` does not exceed: their halves are round as well. */
export function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  for (const factor of [1, 2, 4, 6, 8, 10]) if (value <= factor * power * (1 + 1e-9)) return factor * power;
  return 10 * power;
}

export class Chart {
  /** `series`: labels; `format`: value -> text; `least`: the smallest top of the y axis; `most`: its largest. */
  constructor(title, series, { format = String, least = 1, most = Infinity } = {}) {
    Object.assign(this, { title, series, format, least, most });
    this.svg = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
    const legend = el("span", { class: "legend" });
    this.labels = series.map((label, index) => {
      const value = el("b", {});
      legend.append(el("span", { class: `s${index + 1}` }, el("i"), `${label} `, value));
      return value;
    });
    this.node = el("section", { class: "card" }, el("h2", {}, title, legend), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
  }

  /** `points`: [{time, values}], times in ms ascending; a value may be null. `span`: ms shown. */
  draw(points, span, now) {
    this.points = points;
    this.start = now - span;
    this.span = span;
    const largest = Math.max(0, ...points.flatMap(({ values }) => values.map((value) => value ?? 0)));
    this.top = Math.min(this.most, niceCeiling(Math.max(this.least, largest)));
    const parts = [];
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      const y = this.y(part * this.top);
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
      if (part % 0.5 === 0) parts.push(label(LEFT - 6, y + 4, this.format(part * this.top), "end"));
    }
    for (const part of [0, 0.5, 1]) {
      const anchor = { 0: "start", 0.5: "middle", 1: "end" }[part];
      parts.push(label(LEFT + part * (WIDTH - LEFT - RIGHT), HEIGHT - 6, ago(span * (1 - part)), anchor));
    }
    this.series.forEach((_, index) => parts.push(...this.line(index)));
    this.cursor = svg("g", {});
    this.svg.replaceChildren(...parts, this.cursor);
    this.say(points.at(-1));
    if (this.pointer) this.point(this.pointer);
  }

  x = (time) => LEFT + ((time - this.start) / this.span) * (WIDTH - LEFT - RIGHT);
  y = (value) => TOP + (1 - Math.min(value, this.top) / this.top) * (HEIGHT - TOP - BOTTOM);

  /** The series' line, broken where there is no value, and the area under the first. */
  line(index) {
    const runs = [[]];
    for (const { time, values } of this.points) {
      if (time < this.start) continue;
      if (values[index] == null) runs.push([]);
      else runs.at(-1).push(`${this.x(time).toFixed(1)},${this.y(values[index]).toFixed(1)}`);
    }
    const group = svg("g", { class: `s${index + 1}` });
    for (const run of runs.filter(({ length }) => length)) {
      const path = `M${run.join("L")}`;
      if (index === 0 && run.length > 1) {
        const [first, last] = [run[0], run.at(-1)].map((point) => point.split(",")[0]);
        group.append(svg("path", { class: "area", d: `${path}L${last},${this.y(0)}L${first},${this.y(0)}Z` }));
      }
      group.append(svg("path", { class: "series", d: run.length > 1 ? path : `${path}h0.01` }));
    }
    return [group];
  }

  /** Shows the values nearest to the pointer. */
  point(event) {
    this.pointer = event;
    this.cursor?.replaceChildren();
    if (!event || !this.points?.length) return this.points && this.say(this.points.at(-1));
    const box = this.svg.getBoundingClientRect();
    const time = this.start + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * this.span;
    const near = this.points.reduce((best, point) => (Math.abs(point.time - time) < Math.abs(best.time - time) ? point : best));
    this.cursor.append(svg("line", { class: "cursor", x1: this.x(near.time), x2: this.x(near.time), y1: TOP, y2: HEIGHT - BOTTOM }));
    near.values.forEach((value, index) => {
      if (value != null) this.cursor.append(svg("g", { class: `s${index + 1}` }, svg("circle", { class: "dot", cx: this.x(near.time), cy: this.y(value), r: 4 })));
    });
    this.say(near);
  }

  say(point) {
    this.labels.forEach((node, index) => (node.textContent = point?.values[index] == null ? "–" : this.format(point.values[index])));
    const said = this.series.map((name, index) => `${name} ${this.labels[index].textContent}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}: ${said}`);
  }
}

function label(x, y, text, anchor) {
  const node = svg("text", { x, y, "text-anchor": anchor });
  node.textContent = text;
  return node;
}

const ago = (ms) => (ms === 0 ? "now" : ms < 60000 ? `−${Math.round(ms / 1000)} s` : `−${+(ms / 60000).toFixed(1)} min`);
