"""Plans a run, starts one worker for each case and allocator, and keeps the rows as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlaccel.bench import provider, results, timing
from dlaccel.bench.case import Case
from dlaccel.bench.results import Row, Writer
from dlaccel.bench.worker import Job

TIMEOUT = 900.0  # seconds for one case
TUNED = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}  # malloc keeps what it once had


@dataclass(frozen=True)
class Preset:
    """How much to measure. None: all there is."""

    tag: str | None
    modes: tuple[str, ...] | None
    allocators: tuple[str, ...]
    providers: tuple[str, ...] | None
    effort: timing.Effort


PRESETS = {
    "quick": Preset("quick", ("fwd", "train"), ("tuned",), ("dlaccel", "eager"), timing.Effort(0.2, 5)),
    "default": Preset(None, None, ("tuned", "default"), ("dlaccel", "eager"), timing.Effort(0.2, 7)),
    "full": Preset(None, None, ("tuned", "default"), None, timing.Effort(0.6, 15)),
}


@dataclass(frozen=True)
class Selection:
    """What to measure; empty: what the preset says."""

    preset: str = "default"
    ops: Sequence[str] = ()
    cases: Sequence[str] = ()  # whole names or parts of them
    providers: Sequence[str] = ()
    device: str = "cpu"
    dtypes: Sequence[str] = ()
    layouts: Sequence[str] = ()
    modes: Sequence[str] = ()
    allocators: Sequence[str] = ()

    def chosen(self, families: dict[str, Any]) -> list[Case]:
        """The cases, most valuable first: rows of a goal, then the quick ones, the ops taking turns."""
        preset = PRESETS[self.preset]
        by_op: list[list[Case]] = []
        for op in self.ops or families:
            cases = [
                case for case in families[op].CASES
                if self.device in case.devices
                and (any(c in case.name for c in self.cases) if self.cases else preset.tag is None or preset.tag in case.tags)
                and (not self.layouts or case.layout in self.layouts)
            ]  # fmt: skip
            by_op.append(sorted(cases, key=lambda case: ("goal" not in case.tags, "quick" not in case.tags)))
        return [cases[i] for i in range(max(map(len, by_op), default=0)) for cases in by_op if i < len(cases)]

    def wanted(self, case: Case) -> list[tuple[str, str, str]]:
        """(dtype, mode, provider) of a case; the training step in the widest dtype first."""
        preset = PRESETS[self.preset]
        modes = [m for m in case.modes if m in (self.modes or preset.modes or case.modes)]
        dtypes = [d for d in case.dtypes if d in (self.dtypes or case.dtypes)]
        names = self.providers or preset.providers or provider.names()
        return [(d, m, p) for d in dtypes for m in sorted(modes, key=lambda m: m != "train") for p in names]


Worker = Callable[[Job], Iterator[dict[str, Any]]]


def spawn(job: Job, *, timeout: float = TIMEOUT) -> Iterator[dict[str, Any]]:
    """Runs a job in a process of its own and yields its answers. Raises RuntimeError if it ends badly."""
    env = {name: value for name, value in os.environ.items() if name not in TUNED}
    env |= TUNED if job.allocator == "tuned" else {}
    threads = str(job.environment["threads"])
    env |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    root = str(Path(results.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "dlaccel.bench.worker"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        begin = time.monotonic()
        try:
            process.stdin.write(job.to_json())
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if code:
            log.seek(0)
            last = [line for line in log.read().splitlines() if line.strip()][-1:] or [""]
            late = time.monotonic() - begin >= timeout
            ending = f"no answer within {timeout:.0f} s" if late else f"the process ended with {code}: {last[0].strip()[:300]}"
            raise RuntimeError(ending)


def run(
    selection: Selection,
    families: dict[str, Any],
    out: Path,
    *,
    resume: bool = False,
    budget: float | None = None,
    threads: int | None = None,
    clock: str | None = None,
    precision: str = "ieee",
    seed: int = 0,
    worker: Worker = spawn,
    progress: Callable[[list[tuple[Case, str]]], Iterable[tuple[Case, str]]] = list,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measures the selection and returns its rows, those of earlier runs with `resume` included.

    Rows are appended to `out`/bench.jsonl as they are made. Without `resume` the rows of the last run move to previous.jsonl.
    Raises OSError if they cannot be written.
    """
    begin = time.time()
    path = out / "bench.jsonl"
    kept: list[Row] = []
    if path.exists() and resume:
        kept, problems = results.read(path)
        for problem in problems:
            say(f"left out: {problem}")
    elif path.exists():
        path.replace(out / "previous.jsonl")

    measured_by, cores = timing.clock_and_threads(selection.device)
    clock = clock or measured_by
    threads = threads or (1 if clock == "thread" else cores)
    environment = results.provenance(selection.device, threads=threads, clock=clock, precision=precision, seed=seed)
    say(f"{environment['gpu'] or environment['cpu']}; {threads} threads, {clock} clock, load {os.getloadavg()[0]:.2f}")
    if clock != "cuda" and os.getloadavg()[0] > cores:
        say("other processes keep this machine busy: short rows scatter (the eager/eager column shows how much)")
    say(f"torch {environment['torch']}, triton {environment['triton'] or 'absent'}")
    have = {row.resume_key for row in kept if row.status != "unavailable"}
    names: dict[str, str] = {}  # of providers, by how they were asked for
    allocators = ["cuda"] if selection.device == "cuda" else selection.allocators or PRESETS[selection.preset].allocators
    plan = [(case, allocator) for allocator in allocators for case in selection.chosen(families)]
    effort = PRESETS[selection.preset].effort
    deadline = None if budget is None else begin + budget
    roof: dict[str, Any] | None = None
    new: dict[results.Key, Row] = {}

    with Writer(path) as file:
        for case, allocator in progress(plan):
            if deadline is not None and time.time() > deadline:
                say(f"budget of {budget:.0f} s used; --resume continues")
                break
            blank = Row(op=case.op, case=case.name, mode="", dtype="", provider="", status="failed", layout=case.layout,
                        tags=sorted(case.tags), allocator=allocator, **environment)  # fmt: skip
            wanted = selection.wanted(case)
            names |= {spec: provider.load(spec).name for _, _, spec in wanted if spec not in names}
            wanted = [w for w in wanted if _keyed(blank, w, names).resume_key not in have]
            if not wanted:
                continue
            if roof is None:
                roof = next(iter(worker(Job(environment=environment, allocator="tuned"))))
            job = Job(
                op=case.op, case=case.name, wanted=wanted, environment=environment, allocator=allocator,
                seconds=effort.seconds, rounds=effort.rounds, deadline=deadline, ceilings=roof,
            )  # fmt: skip
            missing = {_keyed(blank, w, names).key: _keyed(blank, w, names) for w in wanted}
            try:
                for answer in worker(job):
                    row = Row(**answer)
                    file.write(row)
                    new[row.key] = row
                    missing.pop(row.key, None)
            except RuntimeError as error:  # it crashed, or ran too long: what it had not answered is refused
                for empty in missing.values():
                    row = replace(empty, status="refused", reason=str(error), time_utc=results.now())
                    file.write(row)
                    new[row.key] = row
    return [*(row for row in kept if row.key not in new), *new.values()]


def _keyed(blank: Row, wanted: tuple[str, str, str], names: dict[str, str]) -> Row:
    dtype, mode, spec = wanted
    return replace(blank, dtype=dtype, mode=mode, provider=names[spec])
