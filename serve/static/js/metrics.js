// Prometheus' text format, and what can be read off two readings of it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** [{name, labels, value}] of a text in Prometheus' exposition format. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
    }
    samples.push({ name: match[1], labels, value: number(match[3]) });
  }
  return samples;
}

const number = (text) => ({ "+Inf": Infinity, "-Inf": -Infinity })[text] ?? Number(text);

/** A reading: sums over the models (or of one `model`), but of shares ("…_perc") the largest; histograms as {bound:
 *  cumulative count}. */
export class Reading {
  constructor(text, time, model = "") {
    this.time = time;
    this.values = new Map();
    this.buckets = new Map();
    this.models = new Set();
    for (const { name, labels, value } of parse(text)) {
      if (labels.model_name) this.models.add(labels.model_name);
      if (model && labels.model_name !== model) continue;
      if (name.endsWith("_bucket") && labels.le !== undefined) {
        const histogram = this.buckets.get(name.slice(0, -7)) ?? new Map();
        const bound = number(labels.le);
        histogram.set(bound, (histogram.get(bound) ?? 0) + value);
        this.buckets.set(name.slice(0, -7), histogram);
      } else {
        const known = this.values.get(name) ?? 0;
        this.values.set(name, name.endsWith("_perc") ? Math.max(known, value) : known + value);
      }
    }
  }

  value(name) {
    return this.values.get(name) ?? 0;
  }

  has(name) {
    return this.values.has(name);
  }
}

/** Growth of a counter per second between two readings; a restart of the server counts from zero. */
export function rate(before, after, name) {
  const seconds = (after.time - before.time) / 1000;
  if (seconds <= 0) return 0;
  const [old, now] = [before.value(name), after.value(name)];
  return (now >= old ? now - old : now) / seconds;
}

/** [[bound, cumulative count]] of what a histogram counted between two readings, bounds ascending. */
export function counted(before, after, name) {
  const [old, now] = [before?.buckets.get(name) ?? new Map(), after.buckets.get(name) ?? new Map()];
  const restarted = [...now].some(([bound, count]) => count < (old.get(bound) ?? 0));
  return [...now].map(([bound, count]) => [bound, restarted ? count : count - (old.get(bound) ?? 0)]).sort((a, b) => a[0] - b[0]);
}

/** Prometheus' histogram_quantile: linear inside a bucket, the last finite bound beyond it; null without any count. */
export function quantile(q, buckets) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  const rank = q * total;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= rank && count > below) {
      if (bound === Infinity) return low;
      return low + ((bound - low) * (rank - below)) / (count - below);
    }
    if (bound !== Infinity) [low, below] = [bound, count];
  }
  return low;
}
