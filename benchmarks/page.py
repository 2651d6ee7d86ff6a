"""docs/benchmarks.md and its plots, made of benchmarks/results/*.json: the page says what was measured and nothing else.

Examples:
    python benchmarks/page.py            # write the page and the plots
    python benchmarks/page.py --check    # exit 1 where they are not what the results make of them

A result's kind is the beginning of its name (decode-, coldstart-, quality-, memory-, export-, embed-, host-). Any other
result is shown as it says itself: `title`, `section` ("CPU", "CUDA", "Serving"), `tables` (`title`, `columns`, `rows`),
`losses` (sentences) and `plots` (`file`, `title`, `x`, `y`, `series` of `name`, `x`, `y`). benchmarks/notes/SECTION.md is
put under its section: what bounds a number, and what was tried.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from common import HERE, RESULTS, ROOT, fail, make_parser
from plots import bars, draw

PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "benchmarks"
SECTIONS = ("CPU", "CUDA", "Serving")
MB = 1e6
_HEAD = """# Benchmarks

Made by `python benchmarks/page.py` of `benchmarks/results/`; `benchmarks/README.md` says how each is measured.
Numbers are medians of interleaved runs, with their range; a ratio is llmx over the peer in the same run, so above 1 llmx
is ahead.
"""

Result = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]


def load() -> dict[str, Result]:
    """Every result by its name without `.json`."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def spread(stats: Result, digits: int = 1, unit: float = 1.0) -> str:
    """`median (min–max)`; the range is left out where there was one run."""
    median, low, high = (f"{stats[key] / unit:,.{digits}f}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}–{high})"


def versions_of(result: Result) -> str:
    """When, where and with what it was measured, in a line."""
    machine = result["machine"]
    found = dict(machine.get("versions", {}))
    for engine in result.get("engines", {}).values():
        found |= {name: value for name, value in engine.get("versions", {}).items() if name != "python"}
    named = ", ".join(f"{name} {value}" for name, value in sorted(found.items()) if name != "llmx")
    where = machine.get("gpu") or f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), {machine['cpus']} CPUs"
    return f"{machine['date']}, llmx {machine['commit']}, {where}; {named}."


def decode(result: Result) -> Iterable[Table]:
    """Prefill and decode speed beside the peers."""
    s, rows = result["settings"], []
    for name, engine in result["engines"].items():
        own = name == "llmx"
        cells = [f"**{name}**" if own else name, engine["weights"]]
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            stats = engine[key]
            cells += [spread(stats), "" if own else f"{stats['llmx_ratio']:.2f}"]
        rows.append([*cells, f"{engine['model_bytes'] / MB:,.0f}"])
    device = s.get("device", "cpu")
    where = f"{s['threads']} threads" if device == "cpu" else device
    title = f"{s['model']}, {s['dtype']}: prompt {s['prompt']}, {s['tokens']} tokens, {where}"
    columns = ["", "weights", "prefill, tokens/s", "llmx ÷ it", "decode, tokens/s", "llmx ÷ it", "model, MB"]
    yield title, columns, rows


def coldstart(result: Result) -> Iterable[Table]:
    """Seconds from starting a process to its first token."""
    s, rows = result["settings"], []
    for name, engine in result["engines"].items():
        ratio = "" if name == "llmx" else f"{engine['first_token_s']['llmx_ratio']:.2f}"
        rows.append([name, engine["weights"], spread(engine["ready_s"], 2), spread(engine["first_token_s"], 2), ratio])
    title = f"{s['model']}, {s['dtype']}: a new process, files in the page cache, prompt {s['prompt']}"
    columns = ["", "weights", "model loaded, s", "first token, s", "llmx's time ÷ its"]
    yield title, columns, rows


def quality(result: Result) -> Iterable[Table]:
    """How far each engine's weights are from PyTorch's in fp32."""
    s = result["settings"]
    rows = [
        [name, f"{e['mean_kl']:.2e}", f"{e['max_kl']:.2e}", f"{e['top1']:.1%}", f"{e['perplexity']:.3f}"]
        for name, e in result["engines"].items()
    ]
    title = f"{s['model']}: {s['positions']} positions of held-out text"
    columns = ["", "mean KL to PyTorch fp32, nats", "largest KL", "same best token", "perplexity"]
    yield title, columns, rows


def memory(result: Result) -> Iterable[Table]:
    """Private memory of a process that has run both graphs."""
    mib, rows = 1 << 20, []
    for name, run in result["runs"].items():
        sizes = [f"{run[key] / mib:,.0f}" for key in ("weights", "state", "Private_Dirty", "Rss")]
        rows.append([name, f"{run['open_s']:.2f}", *sizes])
    s = result["settings"]
    title = f"{s['model']}: prompt {s['prompt']}, {s['tokens']} tokens"
    yield title, ["", "open, s", "weights, MiB", "state, MiB", "private, MiB", "resident, MiB"], rows


def export(result: Result) -> Iterable[Table]:
    """Time and peak memory of an export."""
    s, rows = result["settings"], []
    for name, e in result["exporters"].items():
        peak = f"{e['peak_rss_over_weights']:.2f}"
        rows.append(
            [name, spread(e["seconds"]), f"{e['seconds_over_llmx']:.2f}", spread(e["peak_rss_bytes"], 0, MB), peak]
        )
    columns = ["", "seconds", "its ÷ llmx's", "peak resident, MB", "÷ weights"]
    yield f"{s['model']} to {s['dtype']}", columns, rows


def embed(result: Result) -> Iterable[Table]:
    """Sentence embeddings beside sentence-transformers."""
    speeds = result["texts_per_second"]
    rows = [[name, spread(stats)] for name, stats in speeds.items()]
    title = f"all-MiniLM-L6-v2, {result['texts']} texts (ratio {result['ratio']:.2f}, lowest cosine {result['lowest_cosine']:.7f})"
    yield title, ["", "texts/s"], rows


def host(result: Result) -> Iterable[Table]:
    """What a step spends outside onnxruntime's run call."""
    s, rows = result["settings"], []
    for batch, facts in result["batches"].items():
        share = facts["host_share"]
        low, high = f"{share['min']:.1%}", f"{share['max']:.1%}"
        rows.append(
            [batch, spread(facts["step_ms"], 2), spread(facts["host_us"], 0), f"{share['median']:.1%} ({low}–{high})"]
        )
    title = f"{s['model']}, {s['dtype']}, vocabulary {s['vocab_size']:,}, greedy"
    yield title, ["batch", "step, ms", "outside the run call, µs", "share"], rows


KINDS: dict[str, tuple[str, str, Callable[[Result], Iterable[Table]]]] = {
    "decode": ("CPU", "Prefill and decode", decode),
    "host": ("CPU", "Host time of a step", host),
    "coldstart": ("CPU", "Cold start", coldstart),
    "quality": ("CPU", "What the weights cost in quality", quality),
    "memory": ("CPU", "Memory", memory),
    "export": ("CPU", "Export", export),
    "embed": ("CPU", "Encoders", embed),
}


def losses(name: str, result: Result) -> list[str]:
    """Sentences on where llmx is behind in this result."""
    found = list(result.get("losses", []))
    s, kind = result.get("settings", {}), name.split("-")[0]
    if kind == "decode":
        for peer, engine in result["engines"].items():
            for key, what in (("prefill_tokens_per_s", "prefills"), ("decode_tokens_per_s", "decodes")):
                ratio = engine[key]["llmx_ratio"]
                if ratio < 0.995 and not peer.startswith("llmx"):
                    where = s.get("device", "cpu").upper()
                    found.append(f"{where}, {s['model']}, {s['dtype']}: {peer} {what} {1 / ratio:.2f} times as fast.")
    if kind == "coldstart":
        for peer, engine in result["engines"].items():
            ratio = engine["first_token_s"]["llmx_ratio"]
            if ratio > 1.005:
                found.append(
                    f"{s['model']}, {s['dtype']}: {peer} has its first token in {1 / ratio:.2f} of llmx's time."
                )
    if kind == "export":
        for peer, facts in result["exporters"].items():
            if facts["seconds_over_llmx"] < 0.995:
                part = f"in {facts['seconds_over_llmx']:.2f} of llmx's time"
                found.append(f"{peer} exports {s['model']} to {s['dtype']} {part}.")
    if kind == "embed" and result["ratio"] < 0.995:
        found.append(f"sentence-transformers embeds {1 / result['ratio']:.2f} times as fast.")
    return found


def markdown(table: Table) -> str:
    title, columns, rows = table
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def figures(name: str, result: Result) -> list[Result]:
    """The plots of a result, as `plots.draw` takes them."""
    if name.startswith("decode-"):
        return [bars(name, result)]
    return [dict(plot) for plot in result.get("plots", [])]


def placed(name: str, result: Result) -> tuple[str, str, Callable[[Result], Iterable[Table]]]:
    """Section, heading and tables of a result."""
    kind = name.split("-")[0]
    if "tables" in result or kind not in KINDS:
        if not {"title", "section", "tables"} <= set(result) or result["section"] not in SECTIONS:
            fail(
                f"{name}.json is of no kind that the page knows; give it `title`, `section` and `tables` (page.py --help)."
            )
        return (
            result["section"],
            result["title"],
            lambda r: [(t["title"], t["columns"], t["rows"]) for t in r["tables"]],
        )
    section, heading, tables = KINDS[kind]
    on_gpu = result.get("settings", {}).get("device", "cpu").startswith("cuda")
    return "CUDA" if on_gpu else section, heading, tables


def build(results: dict[str, Result]) -> tuple[str, list[Result]]:
    """The page's text and its plots."""
    text, plots = [_HEAD], []
    behind = [sentence for name, result in results.items() for sentence in losses(name, result)]
    text += ["## Where llmx is behind", "", *(f"- {s}" for s in behind or ["Nowhere in what is measured here."]), ""]
    order = list(KINDS)
    names = sorted(results, key=lambda n: (order.index(k) if (k := n.split("-")[0]) in order else len(order), n))
    for section in SECTIONS:
        text += [f"## {section}", ""]
        heading = ""
        for name in names:
            where, title, tables = placed(name, results[name])
            if where != section:
                continue
            if title != heading:
                text += [f"### {title}", ""]
                heading = title
            for table in tables(results[name]):
                text += [markdown(table), ""]
            text += [f"<small>{versions_of(results[name])}</small>", ""]
            for plot in figures(name, results[name]):
                text += [f"![{plot['title']}](benchmarks/{plot['file']})", ""]
                plots.append(plot)
        note = HERE / "notes" / f"{section.lower()}.md"
        if note.is_file():
            text += [note.read_text().strip(), ""]
    return "\n".join(text).rstrip() + "\n", plots


def digest(plot: Result) -> str:
    """What a plot's file carries, to tell whether it shows these numbers."""
    return hashlib.sha256(json.dumps(plot, sort_keys=True).encode()).hexdigest()


def stale(text: str, plots: list[Result]) -> list[str]:
    """Files that are not what the results make of them."""
    found = [] if PAGE.is_file() and PAGE.read_text() == text else [str(PAGE.relative_to(ROOT))]
    for plot in plots:
        path = IMAGES / plot["file"]
        if not path.is_file() or digest(plot).encode() not in path.read_bytes():
            found.append(str(path.relative_to(ROOT)))
    unused = {path.name for path in IMAGES.glob("*.png")} - {plot["file"] for plot in plots}
    return found + sorted(f"docs/benchmarks/{name}" for name in unused)


def write(text: str, plots: list[Result]) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        path = IMAGES / plot["file"]
        if not path.is_file() or digest(plot).encode() not in path.read_bytes():
            draw(plot, path, digest(plot))
    for path in IMAGES.glob("*.png"):
        if path.name not in {plot["file"] for plot in plots}:
            path.unlink()
    PAGE.write_text(text)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    args: argparse.Namespace = parser.parse_args()
    text, plots = build(load())
    if args.check:
        names = stale(text, plots)
        if names:
            fail(f"{', '.join(names)}: not what benchmarks/results makes of it; run `python benchmarks/page.py`.")
        return
    write(text, plots)
    print(f"{PAGE.relative_to(ROOT)}: {len(plots)} plots", file=sys.stderr)


if __name__ == "__main__":
    main()
