"""What the experiments share: the machine and its clock, rows made from what was measured on it, the device table."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dlaccel.bench import results, timing
from dlaccel.bench.claims.row import Baseline, Hardware, Row

PRESETS = ("quick", "default", "full")
LECTURE = 'the lecture ("Introduction to Deep Learning", K. Fouladi, University of Tehran, 2018)'
NO_GPU = "torch sees no CUDA device on this machine"


class Progress(Protocol):
    """Reports what an experiment is doing, and how much of it is done (0 to 1)."""

    def __call__(self, note: str, done: float) -> None: ...


@dataclass(frozen=True)
class Spread:
    """Samples of one quantity; the median counts."""

    samples: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        return timing.percentile(self.samples, percent)

    def per(self, amount: float) -> Spread:
        """From seconds to a rate."""
        return Spread([amount / s for s in self.samples])


@dataclass
class Machine:
    """One device with the clock it is timed by. On the CPU see `timing`: a quiet machine is timed with all its cores by the
    wall clock, a busy one with one thread by that thread's CPU time."""

    device: str
    clock: str
    threads: int
    watch: timing.Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = timing.stopwatch(self.clock)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else results.cpu_name()

    @property
    def hardware(self) -> Hardware:
        return "gpu" if self.device == "cuda" else "cpu"

    def environment(self, precision: str = "ieee") -> dict[str, Any]:
        known = _provenance(self.device, self.threads, self.clock, precision)
        return known | {"load": round(os.getloadavg()[0], 2)}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Torch runs with this machine's number of threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def time(self, call: Callable[[], object], seconds: float = 0.3, least: int = 5) -> Spread:
        """Seconds of one call, sampled for that long after one call that is not counted."""

        def run() -> None:
            call()

        with self.active():
            run()
            samples: list[float] = []
            begin = time.perf_counter()
            while len(samples) < least or (time.perf_counter() - begin < seconds and len(samples) < 10_000):
                samples.append(max(self.watch.time(run), 1e-9))
        return Spread(samples)


@functools.cache
def _provenance(device: str, threads: int, clock: str, precision: str) -> dict[str, Any]:
    known = results.provenance(device, threads=threads, clock=clock, precision=precision, seed=0)
    return {name: value for name, value in known.items() if value != ""}


def machine(device: str = "cpu") -> Machine:
    """This machine as it is now: how busy it is decides threads and clock."""
    clock, threads = timing.clock_and_threads(device)
    return Machine(device, clock, threads)


def machines(device: str) -> list[Machine]:
    """The CPU, and the GPU beside it where the run is for one."""
    return [machine("cpu")] + ([machine("cuda")] if device == "cuda" else [])


@dataclass(frozen=True)
class Notebook:
    """Builds the rows of one claim."""

    claim: int
    preset: str

    def measured(
        self, id: str, quantity: str, value: float | Spread, unit: str, on: Machine, *, precision: str = "ieee", **more: Any
    ) -> Row:
        if isinstance(value, Spread):
            more = {"low": value.percentile(20), "high": value.percentile(80)} | more
            value = value.median
        return self._row(
            id, quantity, "measured", value=value, unit=unit, device=on.name, hardware=on.hardware,
            environment=on.environment(precision), source=more.pop("source", "this run"), time_utc=results.now(), **more,
        )  # fmt: skip

    def cited(self, id: str, quantity: str, value: float, unit: str, device: str, source: str, **more: Any) -> Row:
        return self._row(id, quantity, "cited", value=value, unit=unit, device=device, source=source, **more)

    def projected(
        self, id: str, quantity: str, value: float, unit: str, device: str, formula: str, source: str, **more: Any
    ) -> Row:
        return self._row(
            id, quantity, "projected", value=value, unit=unit, device=device, formula=formula, source=source, **more
        )

    def not_measured(self, id: str, quantity: str, reason: str, source: str = LECTURE, **more: Any) -> Row:
        return self._row(id, quantity, "not_measured", reason=reason, source=source, **more)

    def no_gpu(self, id: str, quantity: str, **more: Any) -> Row:
        return self.not_measured(id, quantity, NO_GPU, hardware="gpu", **more)

    def _row(self, id: str, quantity: str, status: Any, **values: Any) -> Row:
        return Row(claim=self.claim, id=id, quantity=quantity, status=status, preset=self.preset, **values)


def baseline(row: Row, what: str = "") -> Baseline:
    """A row as what others are divided by."""
    if row.value is None:
        raise ValueError(f"{row.quantity!r} holds no number")
    return Baseline(what=what or f"{row.quantity}, {row.device}", value=row.value, status=row.status)


def readable(value: float) -> str:
    """Three significant digits, without exponents where people read them."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


@functools.cache
def devices() -> dict[str, dict[str, Any]]:
    """devices.json by id."""
    table = json.loads(Path(__file__).with_name("devices.json").read_text())
    return {device["id"]: device for device in table["devices"]}


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """ "ieee" or "tf32" for matrix products and convolutions on a GPU."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
