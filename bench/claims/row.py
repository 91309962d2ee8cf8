"""One number of the claims report, and what kind of number it is.

    measured      by this program, on the machine that `environment` describes
    cited         from the publication that `source` names
    projected     computed by `formula` from cited numbers; nobody ran it
    not_measured  no number; `reason` says why

A row that breaks these rules cannot be built, so no table or figure can show one kind as another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dlaccel.bench.results import check_types

SCHEMA = 1
CLAIMS = range(1, 9)
Status = Literal["measured", "cited", "projected", "not_measured"]
STATUSES: tuple[Status, ...] = ("measured", "cited", "projected", "not_measured")
Hardware = Literal["cpu", "gpu", "other"]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a value is divided by, in the same unit."""

    what: str
    value: float
    status: Status

    def __post_init__(self) -> None:
        check_types(self)
        if self.status == "not_measured":
            raise ValueError(f"baseline {self.what!r}: status {self.status!r} holds no number")
        if not self.value > 0:
            raise ValueError(f"baseline {self.what!r}: {self.value} cannot be divided by")


@dataclass(frozen=True, kw_only=True)
class Row:
    """`claim` is one of the eight, `id` the lecture's statement it belongs to (H: hardware, A: algorithms)."""

    claim: int
    id: str
    quantity: str
    status: Status
    value: float | None = None
    unit: str = ""
    # Measured: 20th and 80th percentile. Projected, cited: the range of the source, and `value` its geometric middle.
    low: float | None = None
    high: float | None = None
    baseline: Baseline | None = None
    formula: str = ""
    device: str = ""  # the machine or chip the number belongs to
    hardware: Hardware = "cpu"
    source: str = ""
    reason: str = ""
    note: str = ""
    series: dict[str, list[float]] = field(default_factory=dict)  # what a figure needs beyond the value
    preset: str = ""
    environment: dict[str, Any] = field(default_factory=dict)  # threads, clock, load, versions, commit
    schema: int = SCHEMA
    time_utc: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.status} row {self.quantity!r}: {problem}")

    def _problem(self) -> str | None:
        if self.schema != SCHEMA:
            return f"schema {self.schema}; this version reads schema {SCHEMA}"
        if self.claim not in CLAIMS or not self.quantity or self.id[:1] not in ("H", "A"):
            return "needs a claim from 1 to 8, the id of a statement and a quantity"
        if not self.source:
            return "needs a source"
        if (self.value is None) != (self.status == "not_measured"):
            return "exactly the rows that were not measured have no value"
        if self.value is None and (self.baseline or self.series or self.low is not None or self.high is not None):
            return "no value, so no baseline, range or series"
        if self.value is not None and not self.device:
            return "a number needs the device it belongs to"
        if (self.status == "measured") != bool(self.environment):
            return "exactly the measured rows carry the environment they were measured in"
        if self.status == "measured" and (missing := {"cpu", "threads", "load"} - self.environment.keys()):
            return f"environment lacks {', '.join(sorted(missing))}"
        if self.status == "measured" and not isinstance(self.environment["threads"], int):
            return f"environment has {self.environment['threads']!r} threads"
        if self.status == "projected" and not self.formula:
            return "needs its formula"
        if (self.status == "not_measured") != bool(self.reason):
            return "exactly the rows that were not measured have a reason"
        return None

    @property
    def ratio(self) -> float | None:
        return None if self.baseline is None or self.value is None else self.value / self.baseline.value

    @property
    def ratio_status(self) -> Status:
        """The weaker of the two numbers a ratio is made of."""
        both = (self.status, self.baseline.status if self.baseline else self.status)
        return max(both, key=STATUSES.index)

    @property
    def key(self) -> tuple[str, ...]:
        """A newer row with the same key replaces an older one."""
        return (str(self.claim), self.quantity, self.device, self.preset)


_FIELDS = frozenset(f.name for f in fields(Row))


def dump(row: Row) -> str:
    """One line of strict JSON; numbers that JSON cannot hold become the strings "inf", "-inf", "nan"."""
    values = asdict(row) | {"ratio": row.ratio, "ratio_status": row.ratio_status if row.baseline else None}
    return json.dumps(_strict(values), allow_nan=False)


def parse(line: str) -> Row:
    """Raises ValueError saying what is wrong with the line."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not complete JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    ratio = values.pop("ratio", None)
    values.pop("ratio_status", None)
    if unknown := sorted(values.keys() - _FIELDS):
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    for name in ("value", "low", "high"):
        values[name] = _number(values.get(name))
    try:
        values["series"] = {name: [_number(v) for v in numbers] for name, numbers in dict(values.get("series", {})).items()}
        values["baseline"] = Baseline(**values["baseline"]) if values.get("baseline") else None
        row = Row(**values)
        same = row.ratio is None or math.isclose(row.ratio, _number(ratio) or math.nan, rel_tol=1e-6)
    except TypeError as error:
        raise ValueError(str(error).replace("Row.__init__() ", "")) from None
    if not same and row.ratio is not None and math.isfinite(row.ratio):
        raise ValueError(f"{row.quantity!r}: ratio {ratio} is not value / baseline")
    return row


def read(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a file, newest of each key, and one sentence for each line that could not be read."""
    rows: dict[tuple[str, ...], Row] = {}
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = parse(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            rows[row.key] = row
    return list(rows.values()), problems


def recorded(folder: Path) -> Iterator[Row]:
    """Rows measured on a GPU and kept in `folder`/<device>/claims.jsonl. Raises ValueError where a line is damaged."""
    for path in sorted(folder.glob("*/claims.jsonl")):
        rows, problems = read(path)
        if problems:
            raise ValueError(problems[0])
        yield from (row for row in rows if row.status == "measured" and row.hardware == "gpu")


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
