"""Rows of measurements: one JSON object a line, appended and flushed as each is made.

A row says what was run (op, case, mode, dtype, layout, device, provider), whether the answer was right (status, reason), how
long it took (only if it was), and on what it was measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

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
    control_p20: float | None = None  # eager against eager in the same rounds
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
    ceiling_gbps: float | None = None
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
    seed: int = 0
    time_utc: str = ""

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}; this version reads schema {SCHEMA}")
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")
        if self.status in TIMED:
            if not self.samples_ms:
                raise ValueError(f"a row with status {self.status} needs samples")
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
        versions = (self.torch, self.triton, self.git_sha, str(self.git_dirty))
        return (*self.key, *self.environment.values(), *versions, str(self.seed))


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
        "git_sha": _output("git", "-C", str(root), "rev-parse", "HEAD") or source_hash(root),
        "git_dirty": bool(_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")),
        "seed": seed,
    }


def source_hash(root: Path) -> str:
    """Instead of a commit, where there is no repository: of the code that may change a result."""
    digest = hashlib.sha256()
    for folder in ("bench", "dlaccel", "kernels", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:40]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpu_name() -> str:
    """Model name and number of CPUs this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {cpus} CPUs"


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
