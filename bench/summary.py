"""What the rows say: a verdict on each, the table, the geometric means and the losing rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dlaccel.bench.case import families
from dlaccel.bench.results import Row

LOSS = 0.95  # a ratio below this is a loss
OVERHEAD_MS = 0.02  # where eager takes less than this, the row says what a call costs, not what a kernel does
MEMORY = 1.1  # times eager's peak, above which a row says so


def verdict(row: Row) -> str:
    """faster, same, LOSS, ambiguous, overhead, suspect, or why there is no time.

    LOSS: all processes say so, and eager against itself scatters less. faster: the same, above 1. ambiguous: the ratio is
    beyond the threshold, but that is not so.
    """
    if row.status == "suspect" or not row.timed:
        return f"{row.status}: {row.reason}"
    assert row.ratio is not None
    if eager_ms(row) < OVERHEAD_MS:
        return "overhead"
    low, high = row.interval
    if row.ratio < LOSS:
        return "LOSS" if high < min(LOSS, row.control_p20 or 1) else "ambiguous"
    if row.ratio > 1 / LOSS:
        return "faster" if low > max(1, row.control_p80 or 1) else "ambiguous"
    return "same"


def eager_ms(row: Row) -> float:
    ordered = sorted(row.eager_samples_ms)
    return ordered[len(ordered) // 2] if ordered else 0.0


def losses(rows: Iterable[Row]) -> list[Row]:
    """dlaccel's losing rows."""
    return [row for row in rows if verdict(row) == "LOSS" and row.provider == "dlaccel"]


def undecided(rows: Iterable[Row]) -> list[Row]:
    """dlaccel's rows with a ratio below LOSS that are no losses: ambiguous, overhead and suspect ones."""
    return [r for r in rows if r.provider == "dlaccel" and r.ratio is not None and r.ratio < LOSS and verdict(r) != "LOSS"]


@dataclass(frozen=True)
class Mean:
    """The geometric mean over the rows of a goal. None where one of them was measured and has no ratio that counts."""

    what: str
    mean: float | None
    rows: int
    goal: int  # rows that the goal has
    without: str  # what became of the others that were tried, e.g. "1 failed"

    @property
    def of(self) -> str:
        """ "6 of 6 rows" """
        return f"{self.rows} of {self.goal} rows" + (f": {self.without}" if self.without else "")

    @property
    def text(self) -> str:
        return "no mean" if self.mean is None else f"{self.mean:.2f}x"


def geometric_means(rows: Iterable[Row]) -> list[Mean]:
    """Of the rows that count for an op's goal, by provider, op, dtype, layout and mode; ours first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "goal" in row.tags and row.provider != "eager":
            allocator = ", default allocator" if row.allocator == "default" else ""
            layout = "" if row.layout == "contiguous" else f" {row.layout}"
            what = f"{row.provider}: {row.op} {row.dtype}{layout} {row.mode} on {row.device}{allocator}"
            groups.setdefault(what, []).append(row)
    means = []
    for what, group in groups.items():
        kinds = [verdict(row).split(":")[0] for row in group]
        counted = [row.ratio for row in group if row.status == "passed" and row.ratio and verdict(row) != "overhead"]
        without = Counter(kind for kind in kinds if kind in ("failed", "refused", "suspect", "unavailable", "overhead"))
        if without.keys() == {"unavailable"} and not counted:
            continue  # a library without this op
        mean = math.exp(sum(map(math.log, counted)) / len(counted)) if counted and not without else None
        others = ", ".join(f"{n} {kind}" for kind, n in sorted(without.items()))
        means.append(Mean(what, mean, len(counted), max(len(group), _goal(group[0])), others))
    return sorted(means, key=lambda mean: (not mean.what.startswith("dlaccel:"), mean.what))


def _goal(row: Row) -> int:
    """How many cases the goal has that this row counts for."""
    known = families()
    return sum(
        "goal" in case.tags and (case.layout, row.device in case.devices) == (row.layout, True) and row.mode in case.modes
        for case in (known[row.op].CASES if row.op in known else ())
    )


HEADERS = (
    "op/case", "dtype", "mode", "provider", "eager ms", "ms", "ratio", "processes", "eager/eager", "rate", "% floor",
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
    memory = row.peak_memory_bytes / eager_memory if row.peak_memory_bytes and eager_memory else 0.0
    return (
        *start, f"{eager_ms(row):.3g}", f"{row.median_ms:.3g}", ratio(row.ratio), _span(*row.interval),
        _span(row.control_p20, row.control_p80), _rate(row), f"{row.pct_of_floor:.0f}" if row.pct_of_floor else "",
        f"{memory:.2f}x" if memory else "", verdict(row) + (", more memory" if memory > MEMORY else ""),
    )  # fmt: skip


def ratio(value: float) -> str:
    """With two decimals, more where two would hide that it is below the threshold."""
    digits = next((d for d in (2, 3, 4) if (round(value, d) < LOSS) == (value < LOSS)), 6)
    return f"{value:.{digits}f}"


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
        parts[-1] += "".join(f"\n  {mean.what}: {mean.text}, {mean.of}" for mean in means)
    kinds = ((f"Losing rows of dlaccel (ratio below {LOSS})", losses(rows)), ("Below that, but no loss", undecided(rows)))
    for kind, found in kinds:
        parts.append(f"{kind}: {len(found) or 'none'}")
        for row in found:
            why = "" if verdict(row) == "LOSS" else f", {verdict(row)}"
            parts[-1] += f"\n  {cells(row)[0]} {row.dtype} {row.mode}: {ratio(row.ratio or 0)}{why}"
    return "\n\n".join(parts)
