"""Sizes as people read them."""

from __future__ import annotations


def human_bytes(size: float) -> str:
    """Decimal units, three digits: 1.23 GB."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:  # what rounds to 1000 belongs to the next unit
            return f"{size:.3g} {unit}"
    size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:,.0f} TB"
