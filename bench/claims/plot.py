"""Figures from rows. Measured: coloured; cited: grey; projected: hollow. No figure of two kinds without a legend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlaccel.bench.claims.lab import readable
from dlaccel.bench.claims.row import Row, Status

STYLE: dict[Status, dict[str, Any]] = {
    "measured": {"markerfacecolor": "#0b6e99", "markeredgecolor": "#0b6e99"},
    "cited": {"markerfacecolor": "#b5b5b5", "markeredgecolor": "#8a8a8a"},
    "projected": {"markerfacecolor": "white", "markeredgecolor": "#6f6f6f"},
}


def available() -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


@contextmanager
def figure(path: Path, width: float = 8, height: float = 3.5, **subplots: Any) -> Iterator[Any]:
    """(figure, axes) that is written to `path` at the end."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(width, height), layout="constrained", **subplots)
    yield fig, axes
    fig.savefig(path, dpi=80)
    plt.close(fig)


def label(row: Row) -> str:
    """Whose number, and of what; a measured one with its date."""
    where = f"{row.device}, {row.time_utc[:10]}" if row.status == "measured" else row.device
    return f"{row.quantity}\n{where}"


def dots(rows: Sequence[Row], path: Path, title: str, unit: str, name: Callable[[Row], str] = label) -> Path:
    """One dot a row on a logarithmic axis, where bars would have no length to compare, with its number."""
    from matplotlib.lines import Line2D

    rows = sorted((row for row in rows if row.value is not None), key=lambda row: row.value or 0)
    with figure(path, 9, 1.1 + 0.42 * len(rows)) as (_, ax):
        for y, row in enumerate(rows):
            value = row.value or 0
            if row.low is not None and row.high is not None:
                ax.plot([row.low, row.high], [y, y], color="black", lw=1, marker="|", ms=5)
            ax.plot(value, y, marker="o", ms=7, ls="", **STYLE[row.status])
            shown = readable(value)
            if row.status != "measured" and row.low is not None and row.high is not None:
                shown = f"{readable(row.low)} to {readable(row.high)}"
            mark = " projected" if row.status == "projected" else ""
            ax.annotate(f"   {shown}{mark}", (max(value, row.high or 0), y), va="center", fontsize=8)
        ax.set_yticks(range(len(rows)), [name(row) for row in rows], fontsize=7)
        ax.set_xscale("log")
        ax.grid(axis="x", alpha=0.3)
        ax.margins(x=0.25)
        ax.set_xlabel(unit)
        ax.set_title(title, fontsize=11)
        kinds = [kind for kind in STYLE if any(row.status == kind for row in rows)]
        handles = [Line2D([], [], marker="o", ls="", **STYLE[kind]) for kind in kinds]
        ax.legend(handles, kinds, loc="lower right", fontsize=8)
    return path
