"""Two runs side by side: which rows became faster or slower, judged from the processes that measured them.

What is compared is the ratio to eager, which each run measured in the same rounds as its own time, so that a machine that was
busier or clocked lower in one run does not look like a change of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlaccel.bench import results
from dlaccel.bench.results import Row

THRESHOLD = 0.05  # smaller changes are no change
# The range of three normal values is 1.7 standard deviations, and the difference of two medians of three has one of 0.95: two
# ranges are 3.6 of those. That ranges do not overlap is not enough: without any change it happens in one row of ten.
SPREADS = 2.0

SAME, FASTER, SLOWER, AMBIGUOUS, LOST, MISSING = "SAME", "FASTER", "SLOWER", "AMBIGUOUS", "LOST", "MISSING"


@dataclass(frozen=True)
class Change:
    """One row in both runs. `factor`: its ratio to eager in the second over that in the first."""

    before: Row
    after: Row | None
    verdict: str
    factor: float | None = None


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Why the two runs cannot be compared: one sentence for each part of the environment that differs."""
    shared = {row.key for row in before if row.timed} & {row.key for row in after if row.timed}
    found = []
    for name in ("gpu", "cpu", "threads", "clock", "precision"):
        a, b = (sorted({row.environment[name] for row in rows if row.key in shared}) for rows in (before, after))
        if a != b:
            found.append(f"{name}: {' and '.join(a) or 'none'} in the first, {' and '.join(b) or 'none'} in the second")
    return found


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """The rows that the first run timed, eager's control rows left out."""
    second = {row.key: row for row in after}
    return [_change(row, second.get(row.key)) for row in before if row.timed and row.provider != "eager"]


def _change(before: Row, after: Row | None) -> Change:
    """FASTER and SLOWER: the change is more than SPREADS times what processes of either run differ by, and more than eager
    scatters against itself."""
    if after is None or not after.timed:
        return Change(before, after, MISSING if after is None else LOST)
    assert before.ratio and after.ratio
    factor = after.ratio / before.ratio
    if abs(factor - 1) < THRESHOLD:
        return Change(before, after, SAME, factor)
    spread = max((high - low) / row.ratio for row in (before, after) for low, high in (row.interval,) if row.ratio)
    quiet_low = min(before.control_p20 or 1, after.control_p20 or 1)
    quiet_high = max(before.control_p80 or 1, after.control_p80 or 1)
    faster = factor - 1 > SPREADS * spread and factor > quiet_high
    slower = 1 / factor - 1 > SPREADS * spread and factor < quiet_low
    return Change(before, after, FASTER if faster else SLOWER if slower else AMBIGUOUS, factor)


HEADERS = ("op/case", "dtype", "mode", "provider", "ms before", "ms after", "ratio before", "ratio after", "change", "verdict")


def cells(change: Change) -> tuple[str, ...]:
    a, b = change.before, change.after
    name = f"{a.op}/{a.case}" + (" [default allocator]" if a.allocator == "default" else "")
    after = ("", f"{a.ratio:.2f}", "", "", change.verdict + (f": {b.status}, {b.reason}" if b else ""))
    if b is not None and change.factor is not None:
        after = (
            f"{b.median_ms:.3g}",
            f"{a.ratio:.2f}",
            f"{b.ratio:.2f}",
            f"{100 * (change.factor - 1):+.1f} %",
            change.verdict,
        )
    return (name, a.dtype, a.mode, a.provider, f"{a.median_ms:.3g}", *after)


# ---- baselines ------------------------------------------------------------------------------------------------------


def baseline_path(out: Path, name: str) -> Path:
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"a baseline's name is a plain word, got {name!r}")
    return out / "baselines" / f"{name}.jsonl"


def save(rows: Sequence[Row], out: Path, name: str) -> Path:
    """Keeps the rows under a name; replaces what was there, only once all is written."""
    path = baseline_path(out, name)
    temporary = path.with_suffix(".part")
    temporary.unlink(missing_ok=True)
    with results.Writer(temporary) as file:
        for row in rows:
            file.write(row)
    return temporary.replace(path)


def baselines(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "baselines").glob("*.jsonl"))


def find(what: str, out: Path) -> list[Path]:
    """Result files: of a path, or of a baseline's name. Raises FileNotFoundError."""
    path = Path(what)
    if not path.exists() and what in baselines(out):
        return [baseline_path(out, what)]
    if not path.exists():
        known = ", ".join(baselines(out)) or "none"
        raise FileNotFoundError(f"{what}: neither a file or folder of results nor a baseline (saved: {known})")
    return results.files(path)
