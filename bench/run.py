"""Plans a run, starts workers for each case and allocator, one after the other, and keeps the rows as they come."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from dlaccel.bench import provider, results, timing
from dlaccel.bench.case import Case
from dlaccel.bench.ceilings import Ceilings
from dlaccel.bench.gate import MODES
from dlaccel.bench.results import Row, Writer
from dlaccel.bench.worker import Job, judge, merge

TIMEOUT = 900.0  # seconds for one case
TUNED = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}  # malloc keeps what it once had
LISTED, QUICK, ALL = "listed", "quick", "all"


@dataclass(frozen=True)
class Preset:
    """How much to measure. providers None: all there are.

    cases: QUICK (those tagged so), LISTED (those with any tag, and those of a size for GPUs alone), ALL.
    untuned: which cases are measured with the default allocator as well.
    """

    cases: str
    modes: tuple[str, ...]
    untuned: frozenset[str]  # tags; ALL: every case
    providers: tuple[str, ...] | None
    effort: timing.Effort


PRESETS = {
    "quick": Preset(QUICK, ("fwd", "train"), frozenset(), ("dlaccel", "eager"), timing.Effort(0.1, 5)),
    "default": Preset(
        LISTED, ("fwd", "train", "dgrad", "wgrad"), frozenset({QUICK}), ("dlaccel", "eager"), timing.Effort(0.2, 7)
    ),
    "full": Preset(ALL, MODES, frozenset({ALL}), None, timing.Effort(0.6, 15)),
}


def rank(case: Case, device: str) -> int:
    """How much a case matters on a device, 0 the most: rows of a goal first, on a GPU those whose size is a GPU's."""
    if device == "cuda" and "cpu" not in case.devices:
        return 0
    return 1 if "goal" in case.tags else 2 if QUICK in case.tags else 3 if case.tags else 4


@dataclass(frozen=True)
class Selection:
    """What to measure; empty: what the preset says."""

    preset: str = "default"
    ops: Sequence[str] = ()
    cases: Sequence[str] = ()  # op/name
    providers: Sequence[str] = ()
    device: str = "cpu"
    dtypes: Sequence[str] = ()
    layouts: Sequence[str] = ()
    modes: Sequence[str] = ()
    allocators: Sequence[str] = ()

    def chosen(self, families: dict[str, Any]) -> dict[str, list[Case]]:
        """The cases of each op, most valuable first."""
        return {
            op: sorted((c for c in families[op].CASES if self._takes(c)), key=lambda case: rank(case, self.device))
            for op in self.ops or families
        }

    def _takes(self, case: Case) -> bool:
        if self.device not in case.devices or (self.layouts and case.layout not in self.layouts) or not self.wanted(case):
            return False
        if self.cases:
            return str(case) in self.cases
        most = {QUICK: QUICK in case.tags, LISTED: rank(case, self.device) < 4, ALL: True}
        return most[PRESETS[self.preset].cases]

    def wanted(self, case: Case) -> list[tuple[str, str, str]]:
        """(dtype, mode, provider) of a case; the training step in the widest dtype first."""
        preset = PRESETS[self.preset]
        modes = [m for m in case.modes if m in (self.modes or preset.modes)]
        names = self.providers or preset.providers or provider.names()
        ordered = sorted(modes, key=lambda m: m != "train")
        return [(d, m, p) for d in self.dtypes or case.dtypes for m in ordered for p in names]

    def plan(self, families: dict[str, Any]) -> dict[str, list[tuple[Case, str]]]:
        """(case, allocator) by op, each op's in the order of their value: all with the first allocator, then the next."""
        preset = PRESETS[self.preset]
        chosen = self.chosen(families)
        if self.device == "cuda":
            return {op: [(case, "cuda") for case in cases] for op, cases in chosen.items()}
        if self.allocators:
            return {op: [(case, a) for a in self.allocators for case in cases] for op, cases in chosen.items()}
        return {
            op: [(case, "tuned") for case in cases]
            + [(case, "default") for case in cases if ALL in preset.untuned or case.tags & preset.untuned]
            for op, cases in chosen.items()
        }

    def rows(self, families: dict[str, Any]) -> int:
        return sum(len(self.wanted(case)) for cases in self.plan(families).values() for case, _ in cases)

    def seconds(self, families: dict[str, Any]) -> dict[str, float]:
        """By op, about how long it takes where two cores are free (compilation of what compiles not included)."""
        effort = PRESETS[self.preset].effort
        return {
            op: sum(
                timing.processes(self.device) * _START_S
                + sum(_seconds(case, *group, effort) for group in _groups(self.wanted(case)))
                for case, _ in cases
            )
            for op, cases in self.plan(families).items()
        }


# Rough rates of two CPU cores, for estimates only. A process takes _START_S to start, a row _ROW_S besides its calls.
_START_S, _ROW_S, _GFLOPS, _GBPS = 2.5, 0.1, 80.0, 6.0
_REFERENCE_CALLS = 100  # what checking a row costs, in calls of eager: most of it the reference and comparing with it


def _groups(wanted: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, int]]:
    """(dtype, mode, number of providers): what is timed in common rounds."""
    counts: dict[tuple[str, str], int] = {}
    for dtype, mode, _ in wanted:
        counts[dtype, mode] = counts.get((dtype, mode), 0) + 1
    return [(dtype, mode, n) for (dtype, mode), n in counts.items()]


def _seconds(case: Case, dtype: str, mode: str, providers: int, effort: timing.Effort) -> float:
    work = [(case.flops("train" if "train" in case.modes else mode, 4) if case.flops else 0) / _GFLOPS / 1e9]
    work.append((case.bytes("train" if "train" in case.modes else mode, 4) if case.bytes else 0) / _GBPS / 1e9)
    call = max(work)
    in_rounds = max(effort.seconds, effort.rounds * (providers + 1) * call)
    return timing.REPEATS * in_rounds + (_REFERENCE_CALLS + 4 * providers) * call + _ROW_S * providers


def turns(plan: Mapping[str, Sequence[tuple[Case, str]]]) -> Iterator[tuple[Case, str]]:
    """The items of all ops; next is always the op that has had the least time so far, so that a budget is shared fairly."""
    left = {op: list(items) for op, items in plan.items() if items}
    spent = dict.fromkeys(left, 0.0)
    while left:
        op = min(left, key=spent.__getitem__)
        begin = time.monotonic()
        yield left[op].pop(0)
        spent[op] += time.monotonic() - begin
        if not left[op]:
            del left[op]


Worker = Callable[[Job], Iterator[dict[str, Any]]]


class Workers:
    """Runs a job in a process of its own and yields its answers. Raises RuntimeError if it ends badly.

    For a GPU the next process is started in advance: importing torch takes seconds in which the device would idle. On a CPU
    that would disturb what is being timed.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self._spare: tuple[dict[str, str], subprocess.Popen[str], IO[str]] | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._spare is not None:
            self._end(*self._spare[1:])

    @staticmethod
    def _end(process: subprocess.Popen[str], log: IO[str]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, log):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _process(self, job: Job) -> tuple[subprocess.Popen[str], IO[str]]:
        env = {name: value for name, value in os.environ.items() if name not in TUNED}
        env |= TUNED if job.allocator == "tuned" else {}
        threads = str(job.environment["threads"])
        env |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        root = str(Path(results.__file__).resolve().parents[1])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] != env:
            self._end(*spare[1:])
            spare = None
        process, log = spare[1:] if spare is not None else self._start(env)
        if job.environment["device"] == "cuda":
            self._spare = (env, *self._start(env))
        return process, log

    @staticmethod
    def _start(env: dict[str, str]) -> tuple[subprocess.Popen[str], IO[str]]:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by _end
        command = [sys.executable, "-m", "dlaccel.bench.worker"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env), log

    def __call__(self, job: Job) -> Iterator[dict[str, Any]]:
        process, log = self._process(job)
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self.timeout, kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already: its code says why
                process.stdin.write(job.to_json())
                process.stdin.close()
            for line in process.stdout:
                if line.endswith("\n"):  # else it was killed in mid-word
                    yield json.loads(line)
            if code := process.wait():
                log.seek(0)
                last = [line for line in log.read().splitlines() if line.strip()][-1:] or [""]
                how = (
                    f"no answer within {self.timeout:.0f} s"
                    if late.is_set()
                    else f"the process ended with {code}: {last[0].strip()[:300]}"
                )
                raise RuntimeError(how)
        finally:
            timer.cancel()
            self._end(process, log)


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
    worker: Worker | None = None,
    progress: Callable[[Iterable[tuple[Case, str]], int], Iterable[tuple[Case, str]]] = lambda items, _: items,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measures the selection and returns its rows, those of earlier runs with `resume` included.

    Rows are appended to `out`/bench.jsonl as they are made. Without `resume` the rows of the last run move to previous.jsonl.
    Raises OSError if they cannot be written, ValueError if nothing is selected.
    """
    begin = time.time()
    plan = selection.plan(families)
    if not any(plan.values()):
        raise ValueError(f"nothing to measure on {selection.device}: no case has this op, size, layout and mode")
    path = out / "bench.jsonl"
    last, problems = results.read(path) if path.exists() else ([], [])
    clock, threads = _as_before(last, selection.device, clock, threads)
    measured_by, cores = timing.clock_and_threads(selection.device)
    clock = clock or ("wall" if measured_by == "thread" and (threads or 1) > 1 else measured_by)
    threads = threads or (1 if clock == "thread" else min(cores, results.cpus()))
    if clock == "thread" and threads > 1:
        raise ValueError(f"the thread clock adds up the time of all threads: it takes --threads 1, got {threads}")
    if threads > results.cpus():
        raise ValueError(f"--threads {threads}: this process may use {results.cpus()} CPUs")
    if (clock == "cuda") != (selection.device == "cuda"):
        raise ValueError(f"--clock {clock}: a GPU is timed by its own events")
    kept: list[Row] = []
    if path.exists() and resume:
        kept = last
        for problem in problems:
            say(f"left out: {problem}")
    elif path.exists():
        path.replace(out / "previous.jsonl")
        say(f"the rows of the last run are in {out / 'previous.jsonl'} now; this one is timed by the same clock and threads")

    environment = results.provenance(selection.device, threads=threads, clock=clock, precision=precision, seed=seed)
    say(f"{environment['gpu'] or environment['cpu']}; {threads} threads, {clock} clock, load {os.getloadavg()[0]:.2f}")
    if clock != "cuda" and os.getloadavg()[0] > cores:
        say("other processes keep this machine busy: short rows scatter (the eager/eager column shows how much)")
    say(f"torch {environment['torch']}, triton {environment['triton'] or 'absent'}")
    have = {row.resume_key for row in kept if not _now_there(row)}
    names: dict[str, str] = {}  # of providers, by how they were asked for
    effort = PRESETS[selection.preset].effort
    once = timing.REPEATS // timing.processes(selection.device)  # the repeats of one process are one
    deadline = None if budget is None else begin + budget
    roof: Ceilings | None = None
    new: dict[results.Key, Row] = {}

    with Writer(path) as file, Workers() as processes:
        worker = worker or processes
        for case, allocator in progress(turns(plan), sum(map(len, plan.values()))):
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
                roof = Ceilings.from_json(next(iter(worker(Job(environment=environment, allocator=allocator)))))
            job = Job(
                op=case.op, case=case.name, wanted=wanted, environment=environment, allocator=allocator,
                seconds=effort.seconds * once, rounds=effort.rounds * once, deadline=deadline,
            )  # fmt: skip
            empty = {_keyed(blank, w, names).key: (_keyed(blank, w, names), w) for w in wanted}
            for row in _measured(worker, job, empty, roof):
                file.write(row)
                new[row.key] = row
    return [*(row for row in kept if row.key not in new), *new.values()]


def _measured(
    worker: Worker, job: Job, empty: Mapping[results.Key, tuple[Row, tuple[str, str, str]]], roof: Ceilings
) -> Iterator[Row]:
    """The rows of one case, each from several processes one after the other: those that failed at once, the others at last.

    `empty`: by key the row without its outcome, and how it was asked for. What was begun before the deadline is finished.
    """
    parts: dict[results.Key, list[Row]] = {}
    for left in reversed(range(timing.processes(job.environment["device"]))):
        if parts:
            job = replace(job, wanted=[empty[key][1] for key in parts], deadline=None, checked=True)
        if not job.wanted:
            return
        asked = [key for key, (_, wanted) in empty.items() if wanted in job.wanted]
        got: dict[results.Key, Row] = {}
        try:
            for answer in worker(job):
                row = Row(**answer)
                got[row.key] = row
                if not row.timed or not left:  # one that a graph has been captured of comes a second time
                    whole = merge([*parts.get(row.key, ()), row])
                    yield judge(whole, roof) if whole.timed else whole
        except RuntimeError as error:  # it crashed, or ran too long: what it had not answered is refused
            for key in asked:
                if key not in got:
                    yield replace(empty[key][0], status="refused", reason=str(error), time_utc=results.now())
        parts = {key: [*parts.get(key, ()), row] for key, row in got.items() if row.timed}
        if not parts:
            return


def _as_before(kept: Sequence[Row], device: str, clock: str | None, threads: int | None) -> tuple[str | None, int | None]:
    """Clock and threads of the rows that a run continues or replaces, unless others are asked for.

    What is measured now would otherwise not be comparable with what was there: a run makes the machine busy, and so, started
    again, would find that it has to be timed in another way.
    """
    mine = [row for row in kept if row.timed and row.device == device and row.cpu == results.cpu_name()]
    last = max(mine, key=lambda row: row.time_utc, default=None)
    if last is None or (clock and threads):
        return clock, threads
    return (clock, None) if clock else (None, threads) if threads else (last.clock, last.threads)


def _now_there(row: Row) -> bool:
    """Whether a row says that its provider is not here, and now it is."""
    return row.status == "unavailable" and row.reason.startswith(provider.NOT_HERE) and _available(row.provider)


@functools.cache
def _available(name: str) -> bool:
    try:
        return provider.load(name).available() is None
    except Exception:  # a file that was given by its path
        return True


def _keyed(blank: Row, wanted: tuple[str, str, str], names: dict[str, str]) -> Row:
    dtype, mode, spec = wanted
    return replace(blank, dtype=dtype, mode=mode, provider=names[spec])
