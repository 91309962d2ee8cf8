"""What the rows say: a verdict on each, the table, the geometric means and the losing rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dlaccel.bench.results import Row

LOSS = 0.95  # a ratio below this is a loss
OVERHEAD_MS = 0.02  # where eager takes less than this, the row says what a call costs, not what a kernel does


def verdict(row: Row) -> str:
    """faster, same, LOSS, overhead, suspect, or why there is no time."""
    if row.status == "suspect" or not row.timed:
        return f"{row.status}: {row.reason}"
    assert row.ratio is not None
    if eager_ms(row) < OVERHEAD_MS:
        return "overhead"
    return "LOSS" if row.ratio < LOSS else "faster" if row.ratio > 1 / LOSS else "same"


def eager_ms(row: Row) -> float:
    ordered = sorted(row.eager_samples_ms)
    return ordered[len(ordered) // 2] if ordered else 0.0


def losses(rows: Iterable[Row]) -> list[Row]:
    """dlaccel's losing rows."""
    return [row for row in rows if verdict(row) == "LOSS" and row.provider == "dlaccel"]


def geometric_means(rows: Iterable[Row]) -> list[tuple[str, float, int]]:
    """(what, ratio, number of rows) of the rows that count for an op's goal, by provider, op, dtype, layout and mode."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.status == "passed" and "goal" in row.tags and row.provider != "eager" and row.ratio:
            allocator = ", default allocator" if row.allocator == "default" else ""
            layout = "" if row.layout == "contiguous" else f" {row.layout}"
            what = f"{row.provider}: {row.op} {row.dtype}{layout} {row.mode} on {row.device}{allocator}"
            groups.setdefault(what, []).append(row.ratio)
    means = [(what, math.exp(sum(map(math.log, r)) / len(r)), len(r)) for what, r in groups.items()]
    return sorted(means, key=lambda mean: (not mean[0].startswith("dlaccel:"), mean[0]))


HEADERS = (
    "op/case", "dtype", "mode", "provider", "eager ms", "ms", "ratio", "p20-p80", "eager/eager", "rate", "% floor",
    "memory/eager's", "verdict",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    name = f"{row.op}/{row.case}" + (" [default allocator]" if row.allocator == "default" else "")
    start = (name, row.dtype, row.mode, row.provider)
    if not row.timed:
        return (*start, *[""] * (len(HEADERS) - len(start) - 1), verdict(row))
    assert row.median_ms is not None and row.ratio is not None
    eager_memory = row.eager_peak_memory_bytes
    memory = row.peak_memory_bytes / eager_memory if row.peak_memory_bytes and eager_memory else None
    return (
        *start, f"{eager_ms(row):.3g}", f"{row.median_ms:.3g}", f"{row.ratio:.2f}", _span(row.ratio_p20, row.ratio_p80),
        _span(row.control_p20, row.control_p80), _rate(row), f"{row.pct_of_floor:.0f}" if row.pct_of_floor else "",
        f"{memory:.2f}x" if memory else "", verdict(row),
    )  # fmt: skip


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2f}-{high:.2f}"


def _rate(row: Row) -> str:
    """The rate that is nearer to its ceiling."""
    arithmetic = row.tflops / row.ceiling_tflops if row.tflops and row.ceiling_tflops else 0.0
    memory = row.gbps / row.ceiling_gbps if row.gbps and row.ceiling_gbps else 0.0
    if row.tflops and arithmetic >= memory:
        return f"{1e3 * row.tflops:.3g} GFLOP/s"
    return f"{row.gbps:.3g} GB/s" if row.gbps else ""


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned text; by tabulate where it is installed."""
    try:
        from tabulate import tabulate
    except ImportError:
        return "\n".join("\t".join(line) for line in (headers, *lines))
    return str(tabulate(lines, headers, tablefmt="simple", disable_numparse=True))


def order(row: Row) -> tuple[object, ...]:
    return (row.device, row.op, "goal" not in row.tags, row.case, row.layout, row.allocator != "tuned", row.dtype, row.mode,
            row.provider != "dlaccel", row.provider)  # fmt: skip


def text(rows: Iterable[Row]) -> str:
    """Table, geometric means over the goal rows, losing rows."""
    rows = sorted(rows, key=order)
    shown = [row for row in rows if row.provider != "eager" or not row.timed]
    parts = [table(HEADERS, [cells(row) for row in shown])]
    if means := geometric_means(rows):
        parts.append("Geometric mean over the goal rows (times as fast as eager):")
        parts[-1] += "".join(f"\n  {what}: {mean:.2f}x over {n} rows" for what, mean, n in means)
    lost = losses(rows)
    parts.append(f"Losing rows of dlaccel (ratio below {LOSS}): {len(lost) or 'none'}")
    parts[-1] += "".join(f"\n  {cells(row)[0]} {row.dtype} {row.mode}: {row.ratio:.2f}" for row in lost)
    return "\n\n".join(parts)
