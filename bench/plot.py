"""Plots of sweeps and load tests. matplotlib is an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmx.runtime.errors import MissingDependencyError, RequestError

_COLOURS = ["#2a6fbb", "#d1742f", "#3c9a5f", "#8a5bb0", "#b83a4b", "#6b6b6b", "#c0a02e", "#40a0a8"]
_LABELS = {"prompt": "prompt, tokens", "batch": "batch", "depth": "context before the prompt, tokens"}


def need_matplotlib() -> Any:
    """The pyplot module, drawing to files. Raises MissingDependencyError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError('A plot needs matplotlib: pip install "llmx[plot]".') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_target(file: Path) -> None:
    """Raises RequestError where `file` is no place for a plot, MissingDependencyError without matplotlib."""
    plt = need_matplotlib()
    kinds = plt.figure().canvas.get_supported_filetypes()
    plt.close("all")
    if file.suffix.lstrip(".").lower() not in kinds:
        raise RequestError(f"{file} is of no kind that a plot can have; end its name in .png or .svg.")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"The folder {file.absolute().parent} for the plot does not exist.")


def sweep(points: list[dict[str, Any]], title: str, file: Path) -> None:
    """Time to first token and decoding speed (an encoder's: texts a second) over the parameter that varies most."""
    keys = [key for key in _LABELS if key in points[0]]
    axis_key = max(keys, key=lambda key: len({p[key] for p in points}))
    others = [key for key in keys if key != axis_key and len({p[key] for p in points}) > 1]
    if "texts_per_s" in points[0]:
        panels = [("texts_per_s", "texts a second", 1.0)]
    else:
        panels = [("ttft_s", "time to first token, ms", 1e3), ("decode_tokens_per_s", "decoded tokens a second", 1.0)]
    plt = need_matplotlib()
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 3.9), squeeze=False)
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault(", ".join(f"{key} {point[key]:,}" for key in others), []).append(point)
    for axis, (key, label, unit) in zip(axes[0], panels, strict=True):
        for (name, group), colour in zip(groups.items(), _COLOURS * len(groups), strict=False):
            shown = sorted((p for p in group if p[key]), key=lambda p: p[axis_key])
            x = [p[axis_key] for p in shown]
            y = [p[key]["median"] * unit for p in shown]
            low, high = ([p[key][end] * unit for p in shown] for end in ("min", "max"))
            axis.plot(x, y, marker="o", markersize=4, color=colour, label=name or None)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        values = sorted({p[axis_key] for p in points})
        if len(values) > 2 and values[0] > 0 and values[-1] > 4 * values[0]:
            axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{v:,}" for v in values])
        axis.minorticks_off()
        axis.set_xlabel(_LABELS[axis_key])
        axis.set_ylabel(label)
        finish(axis)
    if others:
        axes[0][0].legend(fontsize=8, frameon=False)
    save(plt, figure, title, file)


def finish(axis: Any) -> None:
    """From zero up, a light grid, no box."""
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def save(plt: Any, figure: Any, title: str, file: Path) -> None:
    """Write the figure; `file` appears when it is whole."""
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)
