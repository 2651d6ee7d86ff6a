"""Plots of results, as plain data first: what is drawn can be compared without drawing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Plot = dict[str, Any]
_COLOURS = ["#2a6fbb", "#d1742f", "#3c9a5f", "#8a5bb0", "#b83a4b", "#6b6b6b", "#c0a02e", "#40a0a8"]


def bars(name: str, result: dict[str, Any]) -> Plot:
    """Prefill and decode speed of every engine, with ranges."""
    settings, panels = result["settings"], []
    for key, label in (("prefill_tokens_per_s", "prefill, tokens/s"), ("decode_tokens_per_s", "decode, tokens/s")):
        stats = {engine: facts[key] for engine, facts in result["engines"].items()}
        values = [[engine, s["median"], s["min"], s["max"]] for engine, s in stats.items()]
        panels.append({"label": label, "bars": values})
    return {"file": f"{name}.png", "title": f"{settings['model']}, {settings['dtype']}", "panels": panels}


def draw(plot: Plot, path: Path, digest: str) -> None:
    """Draw `plot` into a PNG that carries `digest` as its description."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "panels" in plot:
        figure, axes = plt.subplots(1, len(plot["panels"]), figsize=(10, 0.8 + 0.42 * len(plot["panels"][0]["bars"])))
        for axis, panel in zip(axes, plot["panels"], strict=True):
            _bars(axis, panel)
        axes[-1].set_yticklabels([])
        figure.suptitle(plot["title"], fontsize=11)
    else:
        figure, axis = plt.subplots(figsize=(7.5, 4.2))
        _lines(axis, plot)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Description": digest, "Software": None})
    plt.close(figure)


def _bars(axis: Any, panel: dict[str, Any]) -> None:
    rows = panel["bars"]
    medians = [row[1] for row in rows]
    spreads = [[row[1] - row[2] for row in rows], [row[3] - row[1] for row in rows]]
    colours = [_COLOURS[0] if row[0] == "llmx" else "#b9c4d0" for row in rows]
    drawn = axis.barh([row[0] for row in rows], medians, xerr=spreads, color=colours, ecolor="#444444", capsize=2)
    axis.bar_label(drawn, labels=[f"{value:,.0f}" for value in medians], padding=4, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(row[3] for row in rows) * 1.18)
    axis.set_xlabel(panel["label"], fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis: Any, plot: Plot) -> None:
    for series, colour in zip(plot["series"], _COLOURS * 3, strict=False):
        axis.plot(series["x"], series["y"], marker="o", markersize=4, color=colour, label=series["name"])
    axis.set_title(plot["title"], fontsize=11)
    axis.set_xlabel(plot["x"], fontsize=9)
    axis.set_ylabel(plot["y"], fontsize=9)
    if plot.get("x_log"):
        axis.set_xscale("log", base=2)
    if plot.get("y_log"):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
