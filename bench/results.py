"""Rows of measurements: one JSON object a line, appended and flushed as each is made.

A row says what was run (op, case, mode, dtype, layout, device, provider), whether the answer was right (status, reason), how
long it took (only if it was), and on what it was measured.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

SCHEMA = 1
TIMED = ("passed", "suspect")
STATUSES = (*TIMED, "failed", "unavailable", "refused")

Key = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    `passed`: right, and timed. `suspect`: right, but above 105 % of the measured ceiling, so left out of summaries. `failed`:
    wrong answer or exception. `refused`: out of memory, timed out, or more than three times the ceiling. `unavailable`: the
    provider is not installed or has no such op.
    """

    op: str
    case: str
    mode: str
    dtype: str
    provider: str
    status: str
    reason: str = ""
    device: str = "cpu"
    layout: str = "contiguous"
    backend: str = ""  # what the provider says it ran
    shape: dict[str, int] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    eager_form: str = ""

    # Times. Sample i of `eager_samples_ms` was taken next to sample i of `samples_ms`.
    samples_ms: list[float] = field(default_factory=list)
    eager_samples_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None  # eager's time / this provider's; above 1 is faster: the median of `repeat_ratios`
    ratio_p20: float | None = None  # of all paired ratios
    ratio_p80: float | None = None
    repeat_ratios: list[float] = field(default_factory=list)  # the median paired ratio of each repeat
    processes: int = 1  # that the repeats were made in; equal parts of the samples, in order
    control_p20: float | None = None  # eager against eager in the same rounds, the median of the processes
    control_p80: float | None = None
    host_us: float | None = None  # host time of one call; CUDA only
    graph_ms: float | None = None  # replayed from a CUDA graph, warm cache; only below 50 us
    first_call_s: float | None = None  # compilation included
    gbps: float | None = None
    tflops: float | None = None
    pct_of_floor: float | None = None  # 100 x (least possible time / median)

    # Cost model, ceilings and errors.
    bytes: int | None = None
    flops: int | None = None
    working_set: int | None = None  # bytes of the inputs and of the gradient of the output
    ceiling_gbps: float | None = None  # of that working set
    ceiling_tflops: float | None = None
    peak_memory_bytes: int | None = None
    eager_peak_memory_bytes: int | None = None
    error_vs_fp64: float | None = None
    eager_error_vs_fp64: float | None = None

    # Provenance.
    schema: int = SCHEMA
    gpu: str = ""
    driver: str = ""
    cpu: str = ""
    threads: int = 0
    clock: str = ""  # "thread" (CPU time of one thread), "wall", or "cuda" (events)
    load: float = 0.0
    allocator: str = ""  # "tuned" or "default" malloc; "cuda" on a GPU
    precision: str = ""  # of float32 products: "ieee" or "tf32"
    torch: str = ""
    triton: str = ""
    numpy: str = ""
    python: str = ""
    provider_version: str = ""
    git_sha: str = ""
    git_dirty: bool = False
    sources: str = ""  # hash of the code
    seed: int = 0
    time_utc: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}; this version reads schema {SCHEMA}")
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")
        if self.status in TIMED:
            if not self.samples_ms or len(self.samples_ms) != len(self.eager_samples_ms):
                raise ValueError(f"a row with status {self.status} needs samples, and as many of eager")
            if self.median_ms is None or self.ratio is None or not self.repeat_ratios:
                raise ValueError(f"a row with status {self.status} needs median_ms, ratio and repeat_ratios")
            ratios = (self.ratio, self.ratio_p20, self.ratio_p80, self.control_p20, self.control_p80, *self.repeat_ratios)
            if not all(0 < r < math.inf for r in ratios if r is not None):
                raise ValueError("a ratio is a number above 0")
            if not all(0 <= ms < math.inf for ms in (self.median_ms, *self.samples_ms, *self.eager_samples_ms)):
                raise ValueError("a time is a number from 0")
        elif held := [name for name in _TIMES if getattr(self, name) not in (None, [])]:
            raise ValueError(f"a row with status {self.status} cannot hold {', '.join(held)}")

    @property
    def timed(self) -> bool:
        return self.status in TIMED

    def untimed(self, status: str, reason: str) -> Row:
        """The same row without its times."""
        nothing: dict[str, Any] = {name: [] if isinstance(getattr(self, name), list) else None for name in _TIMES}
        return replace(self, status=status, reason=reason, **nothing)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the ratio may lie: from the least to the largest of its processes' ratios.

        Rows of one process, as older versions made them, do not show how processes differ: p20 to p80 of their pairs, and at
        least their repeats.
        """
        ends = self.repeat_ratios
        if self.processes == 1:
            ends = [*ends, *(r for r in (self.ratio_p20, self.ratio_p80) if r is not None)]
        return min(ends), max(ends)

    @property
    def key(self) -> Key:
        """What is measured, whatever the outcome."""
        return (self.op, self.case, self.dtype, self.mode, self.layout, self.device, self.provider, self.allocator)

    @property
    def environment(self) -> dict[str, str]:
        """What two rows must share for their times to be comparable."""
        names = ("gpu", "cpu", "threads", "clock", "allocator", "precision")
        return {name: str(getattr(self, name)) for name in names}

    @property
    def resume_key(self) -> Key:
        """Rows with equal resume keys need not be measured again."""
        versions = (self.torch, self.triton, self.git_sha, self.sources)
        return (*self.key, *self.environment.values(), *versions, str(self.seed))


def check_types(row: object) -> None:
    """Raises ValueError for a field of a dataclass that does not hold what it is declared to hold."""
    kind: Any = type(row)
    for name, declared in _declared(kind).items():
        if not _holds(getattr(row, name), declared):
            raise ValueError(f"{name}: {str(getattr(row, name))[:40]!r} is not {getattr(declared, '__name__', declared)}")


@functools.cache
def _declared(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _holds(value: Any, declared: Any) -> bool:
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    outer, inner = get_origin(declared), get_args(declared)
    if outer is list:
        return isinstance(value, list) and all(_holds(v, inner[0]) for v in value)
    if outer is dict:
        return isinstance(value, dict) and all(_holds(k, inner[0]) and _holds(v, inner[1]) for k, v in value.items())
    if outer in (Union, UnionType):
        return any(_holds(value, one) for one in inner)
    if outer is Literal:
        return value in inner
    return declared is Any or isinstance(value, declared)


_TIMES = ("samples_ms", "eager_samples_ms", "median_ms", "p20_ms", "p80_ms", "ratio", "ratio_p20", "ratio_p80",
          "repeat_ratios", "control_p20", "control_p80", "host_us", "graph_ms", "gbps", "tflops", "pct_of_floor")  # fmt: skip
_FIELDS = frozenset(f.name for f in fields(Row))


def provenance(device: str, *, threads: int, clock: str, precision: str, seed: int) -> dict[str, Any]:
    """The fields of Row that are the same for a whole run."""
    root = Path(__file__).resolve().parents[1]
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else "",
        "cpu": cpu_name(),
        "threads": threads,
        "clock": clock,
        "precision": precision,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "numpy": package_version("numpy"),
        "python": platform.python_version(),
        "git_sha": _output("git", "-C", str(root), "rev-parse", "HEAD") or sources(),
        "git_dirty": bool(_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")),
        "sources": sources(),
        "seed": seed,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_name() -> str:
    """What tells one CPU from another (virtual machines often hide the model's name), and how many this process may use."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    known = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    model = known.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{name.removeprefix('cpu ')} {known[name]}" for name in ("cpu family", "model", "stepping") if name in known]
    return f"{model} ({', '.join([*numbers, torch.backends.cpu.get_cpu_capability()])}), {cpus()} CPUs"


@functools.cache
def sources() -> str:
    """A hash of the code that may change a result, the benchmark's and the tests' included: a commit with local changes says
    less, and where there is no repository this stands for it. Tables that were measured meanwhile do not count."""
    found = hashlib.sha256()
    packages = {
        name: Path(importlib.import_module(name).__path__[0]) for name in ("dlaccel", "dlaccel.kernels", "dlaccel.bench")
    }
    for name, folder in (packages | {"tests": packages["dlaccel"].parent / "tests"}).items():
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{name}/{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:40]


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def parse(line: str) -> Row:
    """Raises ValueError saying what is wrong with the line."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not complete JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(values.keys() - _FIELDS):
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    try:
        return Row(**values)
    except TypeError as error:
        raise ValueError(str(error).replace("Row.__init__() ", "")) from None


def read(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a file, and one sentence for each line that could not be read.

    A key that was measured twice keeps the newer row.
    """
    rows: dict[Key, Row] = {}
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = parse(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            rows[row.key] = row
    return list(rows.values()), problems


class Writer:
    """Appends rows; what it has written survives the end of the process at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        # A run that was killed may have left half a line: end it, so that it spoils no row but itself.
        if self._file.tell() and path.read_bytes()[-1:] != b"\n":
            self._file.write(b"\n")

    def write(self, row: Row | Mapping[str, Any]) -> None:
        """Raises OSError when the disk is full, after taking back the half-written line."""
        line = json.dumps(asdict(row) if isinstance(row, Row) else dict(row)) + "\n"
        start = self._file.seek(0, os.SEEK_END)
        rest = line.encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.ftruncate(self._file.fileno(), start)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all: on a full disk the old one stays. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def files(path: Path) -> list[Path]:
    """The result files that `path`, a file or a folder, stands for. Raises FileNotFoundError."""
    found = [path] if path.is_file() else sorted(path.glob("bench*.jsonl"))
    if not found:
        raise FileNotFoundError(f"{path}: no result file (bench*.jsonl) here")
    return found


def read_all(paths: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """`read` over several files."""
    rows: dict[Key, Row] = {}
    problems: list[str] = []
    for path in paths:
        found, bad = read(path)
        rows |= {row.key: row for row in found}
        problems += bad
    return list(rows.values()), problems
