"""Two runs side by side: which rows became faster or slower, judged from their samples.

What is compared is the ratio to eager, which each run measured in the same rounds as its own time, so that a machine that was
busier or clocked lower in one run does not look like a change of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlaccel.bench import results
from dlaccel.bench.results import Row
from dlaccel.bench.timing import percentile

THRESHOLD = 0.05  # smaller changes are no change

SAME, FASTER, SLOWER, AMBIGUOUS, LOST = "SAME", "FASTER", "SLOWER", "AMBIGUOUS", "LOST"


@dataclass(frozen=True)
class Change:
    """One row in both runs. `factor`: its ratio to eager in the second over that in the first."""

    before: Row
    after: Row
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
    """The rows that the first run timed and the second has, eager's control rows left out."""
    second = {row.key: row for row in after}
    return [_change(row, second[row.key]) for row in before if row.timed and row.provider != "eager" and row.key in second]


def _change(before: Row, after: Row) -> Change:
    if not after.timed:
        return Change(before, after, LOST)
    assert before.ratio and after.ratio
    factor = after.ratio / before.ratio
    if abs(factor - 1) < THRESHOLD:
        return Change(before, after, SAME, factor)
    (low, high), (new_low, new_high) = _interval(before), _interval(after)
    verdict = FASTER if new_low > high else SLOWER if new_high < low else AMBIGUOUS
    return Change(before, after, verdict, factor)


def _interval(row: Row) -> tuple[float, float]:
    """p20 to p80 of the paired ratios, widened to hold the median of every repeat."""
    paired = [e / max(t, 1e-9) for e, t in zip(row.eager_samples_ms, row.samples_ms, strict=True)]
    ends = (percentile(paired, 20), percentile(paired, 80), *row.repeat_ratios)
    return min(ends), max(ends)


HEADERS = ("op/case", "dtype", "mode", "provider", "ms before", "ms after", "ratio before", "ratio after", "change", "verdict")


def cells(change: Change) -> tuple[str, ...]:
    a, b = change.before, change.after
    name = f"{a.op}/{a.case}" + (" [default allocator]" if a.allocator == "default" else "")
    after = ("", f"{a.ratio:.2f}", "", "", f"{change.verdict}: {b.status}, {b.reason}")
    if change.factor is not None:
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
