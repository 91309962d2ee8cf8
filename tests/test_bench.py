"""The benchmark harness: what it refuses, keeps and prints. A made-up op and planted providers; no time is judged."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlaccel.bench import __main__ as cli
from dlaccel.bench import (
    compare,
    figures,
    gate,
    gpu,
    kernel_times,
    model,
    provider,
    report,
    results,
    run,
    summary,
    timing,
    verify,
    worker,
)  # fmt: skip
from dlaccel.bench.case import Case, families, normal
from dlaccel.bench.ceilings import Ceilings
from dlaccel.bench.claims.row import Row as ClaimRow
from dlaccel.bench.claims.row import dump
from dlaccel.bench.provider import Provider, Unavailable, load, switched
from dlaccel.bench.results import Row

# A made-up op: relu(x * scale).


def eager(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).relu_()


def make_case(name: str = "24x16", **options: Any) -> Case:
    options = {
        "bytes": lambda mode, itemsize: 2 * 24 * 16 * itemsize,
        "modes": ("fwd", "train"),
        "dtypes": ("float32",),
    } | options
    return Case("toy", name, lambda g, dtype: (normal((24, 16), g, dtype), normal((16,), g, dtype)), shape={"M": 24}, **options)


def wrong_result(x: Tensor, scale: Tensor) -> Tensor:
    return eager(x, scale) * 1.001


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, rows: int) -> Tensor:
        y = torch.empty_like(x)
        y[:rows] = (x * scale)[:rows].relu()
        ctx.save_for_backward(x, scale, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, y = ctx.saved_tensors
        dz = dy * (y > 0)
        return dz * scale, (dz * x).sum(0), None


def unwritten_output(x: Tensor, scale: Tensor) -> Tensor:
    return _Function.apply(x, scale, 23)


def lazy() -> Callable[[Tensor, Tensor], Tensor]:
    """Computes once, then returns that again."""
    kept: list[Tensor] = []

    def f(x: Tensor, scale: Tensor) -> Tensor:
        if not kept or torch.is_grad_enabled():
            kept[:] = [eager(x, scale)]
        return kept[0]

    return f


def lazy_when_timed() -> Callable[[Tensor, Tensor], Tensor]:
    """Computes as often as the gate looks, then returns the last output again."""
    kept: list[Tensor] = []
    calls = 0

    def f(x: Tensor, scale: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls <= 3:
            kept[:] = [eager(x, scale).detach()]
        return kept[0]

    return f


def half_the_work(x: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([eager(x[:12], scale), torch.zeros_like(x[12:])])


def overwrites_input(x: Tensor, scale: Tensor) -> Tensor:
    y = eager(x, scale)
    with torch.no_grad():
        x.zero_()
    return y


def wrong_gradient(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale.detach()).relu() + 0 * scale


def raises(x: Tensor, scale: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this")


def module(name: str, f: Any, **options: Any) -> Provider:
    return Provider(SimpleNamespace(NAME=name, available=lambda: None, implementation=lambda case: f, **options))  # type: ignore[arg-type]


CHEATS = {
    "wrong_result": (wrong_result, "fwd", "output: error"),
    "unwritten_output": (unwritten_output, "fwd", "output: NaN"),
    "last_output_again": (lazy(), "fwd", "output: error"),
    "last_output_when_timed": (lazy_when_timed(), "fwd", "in the timed loop, output: error"),
    "half_the_work": (half_the_work, "fwd", "output: error"),
    "input_changed": (overwrites_input, "fwd", "input 0 was overwritten"),
    "wrong_gradient": (wrong_gradient, "train", "grad 1: "),
    "raises": (raises, "fwd", "RuntimeError: no kernel for this"),
}
BLANK = Row(op="toy", case="c", mode="fwd", dtype="float32", provider="p", status="failed")
GENEROUS = Ceilings({"float32": 1e9}, {1: 1e9})  # nothing is too fast for this machine


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Row]]:
    """Runs the harness in this process on the made-up op with the given providers."""

    def measure(
        providers: dict[str, Provider], *cases: Case, roof: Ceilings = GENEROUS, stop_after: int | None = None, **options: Any
    ) -> list[Row]:
        known = {"eager": module("eager", eager), **providers}
        monkeypatch.setattr(run.provider, "load", known.__getitem__)
        family = SimpleNamespace(eager=eager, reference=eager, CASES=cases or (make_case(),))
        answered = 0

        def in_process(job: worker.Job) -> Iterator[dict[str, Any]]:
            nonlocal answered
            if not job.op:
                yield roof.to_json()
                return
            job = worker.Job.from_json(job.to_json())  # as it would arrive in another process
            case = next(c for c in family.CASES if c.name == job.case)
            for row in worker.rows(job, case, eager, eager, known):
                if answered == stop_after:
                    raise KeyboardInterrupt
                answered += 1
                yield json.loads(json.dumps(asdict(row)))

        chosen = run.Selection(preset="quick", cases=[str(c) for c in family.CASES], providers=list(known))
        monkeypatch.setitem(run.PRESETS, "quick", replace(run.PRESETS["quick"], effort=timing.Effort(0.0, 3)))
        return run.run(chosen, {"toy": family}, tmp_path, worker=in_process, say=lambda text: None, **options)

    return measure


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheating_provider_gets_no_time(cheat: str, bench: Callable[..., list[Row]]) -> None:
    function, mode, reason = CHEATS[cheat]
    rows = {row.provider: row for row in bench({cheat: module(cheat, function)}, make_case(modes=(mode,)))}
    assert rows[cheat].status == "failed"
    assert rows[cheat].reason.startswith(reason)
    assert rows[cheat].median_ms is None
    assert rows["eager"].status == "passed", "one provider's failure is its own"


def test_overwriting_inputs_is_accepted_where_the_library_documents_it(bench: Callable[..., list[Row]]) -> None:
    rows = bench({"open": module("open", overwrites_input, OVERWRITES=("toy",))}, make_case(modes=("fwd",)))
    assert {row.provider: row.status for row in rows} == {"eager": "passed", "open": "passed"}
    assert next(row for row in rows if row.provider == "open").reason == "overwrites its input, as documented"


def test_too_fast_to_be_true() -> None:
    row = replace(timed_row([1.0]), bytes=10**6, working_set=1)
    for excess, status in ((1.0, "passed"), (1.04, "passed"), (1.1, "suspect"), (5.0, "refused")):
        judged = worker.judge(row, Ceilings({}, {1: 1 / excess}))
        assert judged.status == status, excess
    assert judged.median_ms is None and judged.samples_ms == []
    assert "5.00 x the measured ceiling" in judged.reason


def test_five_times_over_the_roofline_is_refused_in_a_run(bench: Callable[..., list[Row]]) -> None:
    rows = bench({}, make_case(modes=("fwd",)), roof=Ceilings({}, {1: 1e-9}))
    assert [row.status for row in rows] == ["refused"]
    assert cli.exit_code(rows) == cli.NOTHING


def test_a_row_without_a_passed_gate_cannot_hold_a_time() -> None:
    for held in ({"median_ms": 1.0}, {"samples_ms": [1.0]}, {"ratio": 2.0}, {"gbps": 1.0}):
        with pytest.raises(ValueError, match="cannot hold " + next(iter(held))):
            replace(BLANK, **held)
    with pytest.raises(ValueError, match="status 'fine' is none of"):
        replace(BLANK, status="fine")


def test_the_stopwatch_takes_off_its_own_time() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-6  # reading the clock takes a microsecond
        return now

    def call() -> None:
        nonlocal now
        now += 5e-6

    watch = timing.Stopwatch(clock)
    assert watch.time(lambda: None) == pytest.approx(0, abs=1e-12)
    assert watch.time(call) == pytest.approx(5e-6)


def test_ratio_is_the_median_of_what_processes_find_in_pairs() -> None:
    # A disturbance that hits both sides of a pair leaves the ratio alone.
    assert timing.ratios([2, 20, 2], [1, 10, 1]) == [2, 2, 2]
    parts = [timed_row([5.0, 5.0, 4.0], eager=10.0, processes=1), timed_row([5.0]), timed_row([2.5], status="suspect")]
    row = worker.merge(parts)
    assert row.repeat_ratios == [2, 2, 4] and row.ratio == 2 and row.interval == (2, 4) and row.processes == 3
    assert row.samples_ms == [5.0, 5.0, 4.0, 5.0, 2.5] and row.median_ms == 5.0
    failed = parts[1].untimed("failed", "in the timed loop, output: error 3")
    assert worker.merge([parts[0], failed, parts[2]]) is failed
    assert timing.percentile([1, 2, 3, 4, 5], 20) == pytest.approx(1.8)


def test_bandwidth_between_two_measured_sizes() -> None:
    roof = Ceilings({}, {1 << 15: 60.0, 1 << 22: 92.0, 1 << 24: 54.0, 1 << 27: 25.0})
    assert roof.bandwidth(1) == roof.bandwidth(1 << 15) == 92.0, "small copies are slow because calls take time"
    assert roof.bandwidth(1 << 24) == 54.0 and roof.bandwidth(1 << 27) == roof.bandwidth(1 << 30) == 25.0
    assert roof.bandwidth(67_000_000) == pytest.approx(54 * (25 / 54) ** (2 / 3), rel=0.01)
    assert Ceilings().bandwidth(1) is None


def test_work_in_another_thread_is_timed() -> None:
    def burn() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    with ThreadPoolExecutor(1) as pool:
        assert timing.stopwatch("thread").time(lambda: pool.submit(burn).result()) >= 0.05


def test_implementations_do_not_always_follow_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case, order = make_case(), []
    values = gate.values_of(case, torch.float32, "cpu", 0, eager=eager, reference=eager)
    steps = {}
    for name in ("eager", "control", "other"):
        called = lambda x, s, name=name: (order.append(name), eager(x, s))[1]  # noqa: E731
        steps[name] = gate.Step(case, called, "fwd", tuple(map(gate.copy, values.tensors)), values.dy)
    samples = timing.interleave(steps, [values], timing.stopwatch("wall"), timing.Effort(0, 30))
    assert len({len(sample.times) for sample in samples.values()}) == 1
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(names) == sorted(steps) for names in rounds) and len(set(rounds)) == 6


def test_eager_against_itself_is_recorded(bench: Callable[..., list[Row]]) -> None:
    row = next(r for r in bench({}, make_case(modes=("train",))) if r.provider == "eager")
    assert row.control_p20 is not None and row.control_p20 <= row.ratio_p80  # type: ignore[operator]
    assert len(row.samples_ms) == len(row.eager_samples_ms) == 3 * 3
    assert len(row.repeat_ratios) == 3 == row.processes


def test_peak_memory_counts_what_is_live_at_once() -> None:
    def f(x: Tensor, scale: Tensor) -> Tensor:
        a = x + 1
        b = a + 1
        del a
        return b + 1

    case = make_case()
    values = gate.values_of(case, torch.float32, "cpu", 0, eager=eager, reference=eager)
    step = gate.Step(case, f, "fwd", tuple(map(gate.copy, values.tensors)), values.dy)
    peak = timing.peak_memory(step, values)
    assert peak is not None and 0 <= peak - 2 * 24 * 16 * 4 < 64  # torch wraps each 1 in a tensor


def test_modes_take_the_gradients_they_name() -> None:
    case = make_case()
    values = gate.values_of(case, torch.float32, "cpu", 0, eager=eager, reference=eager)
    names = {}
    for mode in gate.MODES:
        step = gate.Step(case, eager, mode, tuple(map(gate.copy, values.tensors)), gate.copy(values.dy))
        assert gate.check(step, values) is None
        names[mode] = sorted(step.outputs())
    assert names == {"fwd": ["output"], "bwd": ["grad 0", "grad 1"], "train": ["grad 0", "grad 1", "output"],
                     "dgrad": ["grad 0"], "wgrad": ["grad 1"]}  # fmt: skip


def test_a_reference_that_does_not_fit_on_the_gpu_runs_on_the_host() -> None:
    tries: list[torch.dtype] = []

    def reference(x: Tensor, scale: Tensor) -> Tensor:
        tries.append(x.dtype)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("no room for float64")
        return eager(x, scale)

    case = make_case()
    values = gate.values_of(case, torch.float32, "cpu", 0, eager=eager, reference=reference)
    assert tries == [torch.float64] * 2 and {t.device.type for t in values.exact.values()} == {"cpu"}
    step = gate.Step(case, eager, "train", tuple(map(gate.copy, values.tensors)), gate.copy(values.dy))
    assert gate.check(step, values) is None


def test_state_is_compared_and_fresh_in_every_call() -> None:
    def counting(x: Tensor, total: Tensor) -> Tensor:
        with torch.no_grad():
            total += x.sum()
        return x * 2

    case = Case("toy", "c", lambda g, dtype: (normal((4,), g, dtype), torch.zeros((), dtype=dtype)), state=(1,))
    values = gate.values_of(case, torch.float32, "cpu", 0, eager=counting, reference=counting)
    tensors = tuple(map(gate.copy, values.tensors))
    assert gate.check(gate.Step(case, counting, "train", tensors, gate.copy(values.dy)), values) is None
    wrong = gate.check(gate.Step(case, lambda x, total: x * 2, "train", tensors, gate.copy(values.dy)), values)
    assert wrong is not None and wrong.startswith("state 1: ")


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("name", ["native", "cudnn"])
def test_the_switches_of_a_provider_leave_the_precision(name: str, precision: str) -> None:
    library: Any = torch.backends.cudnn

    def state() -> tuple[Any, ...]:
        return library.enabled, torch.backends.mkldnn.enabled, library.conv.fp32_precision

    with switched(library.conv, fp32_precision=precision):
        before = state()
        with load(name).context():
            inside = state()
        assert inside[2] == precision and (inside != before) == (name == "native")
        assert state() == before


def test_unplugging_a_provider_changes_nothing_else(bench: Callable[..., list[Row]]) -> None:
    def missing(case: Case) -> Any:
        raise Unavailable("has no toy")

    def broken() -> str | None:
        raise ImportError("libfoo.so not found")

    good = {"good": module("good", lambda x, s: torch.relu(x * s))}
    bad = {
        "missing": Provider(SimpleNamespace(NAME="missing", available=lambda: None, implementation=missing)),  # type: ignore[arg-type]
        "broken": Provider(SimpleNamespace(NAME="broken", available=broken, implementation=missing)),  # type: ignore[arg-type]
        "half": module("half", lambda x, s: torch.relu(x * s), MODES=("fwd",)),
    }
    alone, beside = bench(good), bench(good | bad)
    status = {(r.provider, r.mode): (r.status, r.reason) for r in beside}
    for row in alone:
        assert status[row.provider, row.mode] == (row.status, row.reason) == ("passed", "")
    assert status["missing", "fwd"] == ("unavailable", "has no toy")
    assert status["broken", "fwd"] == ("unavailable", "not here: ImportError: libfoo.so not found")
    assert status["half", "train"] == ("unavailable", "has no train, only fwd") and status["half", "fwd"][0] == "passed"


def test_a_run_that_was_killed_continues_where_it_stopped(bench: Callable[..., list[Row]], tmp_path: Path) -> None:
    cases = [make_case("a"), make_case("b")]
    whole = {row.key for row in bench({}, *cases)}
    (tmp_path / "bench.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        bench({}, *cases, stop_after=7)  # two rows, each from three processes
    path = tmp_path / "bench.jsonl"
    kept, problems = results.read(path)
    assert len(kept) == 2 and not problems
    with path.open("a") as file:
        file.write('{"op": "toy", "case"')  # the row in progress
    resumed = bench({}, *cases, resume=True)
    assert {row.key for row in resumed} == whole
    assert all(row in resumed for row in kept), "what was measured is not measured again"
    rows, problems = results.read(path)
    assert {row.key for row in rows} == whole
    assert [p.split(": ", 1) for p in problems] == [[f"{path}:3", "not complete JSON (Expecting ':' delimiter at column 21)"]]


@pytest.mark.parametrize("nth", range(3))
def test_a_worker_that_dies_leaves_refused_rows(
    nth: int, bench: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def dies(*args: Any, rows: Any = worker.rows) -> Iterator[Row]:
        nonlocal calls
        calls += 1
        if calls == nth + 1:
            raise RuntimeError("the process ended with -9: ")
        yield from rows(*args)

    monkeypatch.setattr(worker, "rows", dies)
    rows = bench({})
    assert {(r.status, r.reason) for r in rows} == {("refused", "the process ended with -9: ")}
    assert [r.mode for r in rows] == ["train", "fwd"]


def test_errors_of_the_reference_are_not_the_providers(
    bench: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise ValueError("Overflow")

    monkeypatch.setattr(gate, "values_of", fails)
    rows = bench({"dlaccel": module("dlaccel", eager)})
    assert {(r.status, r.reason) for r in rows} == {("refused", "eager or reference: ValueError: Overflow")}
    assert cli.exit_code(rows) == cli.NOTHING


def test_changed_code_is_measured_again(bench: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both trees are the same commit with local changes."""
    before = bench({}, clock="wall")
    assert bench({}, resume=True) == before
    monkeypatch.setattr(results, "sources", lambda: "edited")
    assert {row.sources for row in bench({}, resume=True)} == {"edited"}


def test_a_run_is_timed_as_the_one_it_replaces(bench: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or `compare previous.jsonl results` would refuse them."""
    monkeypatch.setattr(timing, "clock_and_threads", lambda device: ("wall", 1))
    bench({})
    monkeypatch.setattr(timing, "clock_and_threads", lambda device: ("thread", 1))
    assert {row.clock for row in bench({})} == {"wall"}
    assert {row.clock for row in bench({}, clock="thread")} == {"thread"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clock": "thread", "threads": 2}, "the thread clock adds up"),
        ({"threads": 5000}, "this process may use"),
    ],
)
def test_timing_that_makes_no_sense(options: dict[str, Any], message: str, bench: Callable[..., list[Row]]) -> None:
    with pytest.raises(ValueError, match=message):
        bench({}, **options)


def test_unreadable_lines_are_named(tmp_path: Path) -> None:
    good = json.dumps(asdict(BLANK))
    path = tmp_path / "bench.jsonl"
    bad = {
        good[:30]: "not complete JSON",
        "[]": "not a JSON object",
        good[:-1] + ', "speed": 1}': "unknown fields speed",
        '{"op": "toy"}': "missing",
        good.replace('"schema": 1', '"schema": 9'): "schema 9",
        good.replace('"op": "toy"', '"op": ["toy"]'): "op: ",
        good.replace('"tags": []', '"tags": null'): "tags: ",
        good.replace('"load": 0.0', '"load": "high"'): "load: 'high' is not float",
        good.replace('"time_utc": ""', '"time_utc": null'): "time_utc: ",
    }
    timed = asdict(timed_row([5.0, 5.0, 5.0]))
    for broken, what in (
        ({"ratio": None}, "needs median_ms, ratio"), ({"ratio": "1.0"}, "ratio: '1.0' is not float"),
        ({"median_ms": None}, "needs median_ms, ratio"), ({"ratio": 0}, "above 0"), ({"ratio": -1.0}, "above 0"),
        ({"ratio": math.nan}, "above 0"), ({"eager_samples_ms": [1.0]}, "as many of eager"),
        ({"samples_ms": [-1.0] * 3}, "from 0"),
        ({"repeat_ratios": [0.0]}, "above 0"), ({"samples_ms": 3}, "samples_ms: '3' is not list"),
    ):  # fmt: skip
        bad[json.dumps(timed | broken)] = what
    path.write_text("\n".join([good, *bad]))
    rows, problems = results.read(path)
    assert len(rows) == 1
    for number, (problem, what) in enumerate(zip(problems, bad.values(), strict=True), start=2):
        assert problem.startswith(f"{path}:{number}: ") and what in problem


def test_a_full_disk_keeps_the_rows_before(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from dlaccel.bench.results import Row, Writer
row = Row(op="toy", case="c", mode="fwd", dtype="float32", provider="p", status="failed")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))  # the third row does not fit
with Writer(Path(sys.argv[1])) as file:
    try:
        for _ in range(3):
            file.write(row)
    except OSError:
        sys.exit(7)
"""
    path = tmp_path / "bench.jsonl"
    line = len(json.dumps(asdict(BLANK))) + 1
    code = code.replace("BYTES", str(int(2.5 * line)))
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 7
    assert path.stat().st_size == 2 * line
    assert results.read(path)[1] == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """report.html, verify.json and claims.html on a full disk."""
    code = """
import resource, signal, sys
from pathlib import Path
from dlaccel.bench.results import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
write_whole(path, "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(path, "new" * 1000)
except OSError:
    sys.exit(7)
"""
    path = tmp_path / "report.html"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 7
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_full_disk_in_a_run(tmp_path: Path) -> None:
    """The command line says so, keeps the rows before and leaves no process behind."""
    code = """
import resource, signal, sys
from dlaccel.bench.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # of eight rows two or three
sys.exit(main(sys.argv[1:]))
"""
    out = tmp_path / "results"
    options = ["run", "--op", "linear_relu", "--case", "8x8x8", "--preset", "quick", "--device", "cpu", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, *options], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == cli.USAGE, done.stdout + done.stderr
    assert f"cannot write {out / 'bench.jsonl'}: File too large; what was written before is kept" in done.stderr
    assert "Traceback" not in done.stderr
    rows, problems = results.read(out / "bench.jsonl")
    assert rows and not problems


def test_ctrl_c_in_a_run(tmp_path: Path) -> None:
    out = tmp_path / "results"
    options = ["run", "--op", "linear_relu", "--preset", "full", "--device", "cpu", "--provider", "eager", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "dlaccel.bench", *options]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    end = time.monotonic() + 200
    while time.monotonic() < end and not ((out / "bench.jsonl").exists() and (out / "bench.jsonl").stat().st_size):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the worker too
    said = process.communicate(timeout=60)[0]
    assert process.returncode == cli.INTERRUPTED, said
    assert "interrupted; what was measured is in" in said and "Traceback" not in said
    rows, problems = results.read(out / "bench.jsonl")
    assert rows and not problems


def test_verdicts() -> None:
    def row(*ratios: float, eager_ms: float = 1.0, **more: Any) -> Row:
        return timed_row([eager_ms / r for r in ratios or (1,)], eager=eager_ms, tags=["goal"], **more)

    assert [summary.verdict(row(r)) for r in (0.94, 0.951, 1.0, 1.06)] == ["LOSS", "same", "same", "faster"]
    assert summary.verdict(row(0.5, eager_ms=0.019)) == "overhead"
    # Not where processes disagree, or where eager differs as much from itself.
    assert [summary.verdict(row(*r)) for r in ((0.9, 0.92, 0.96), (1.1, 1.3, 0.99))] == ["ambiguous", "ambiguous"]
    quiet, noisy = {"control_p20": 0.98, "control_p80": 1.02}, {"control_p20": 0.88, "control_p80": 1.15}
    assert [summary.verdict(row(r, **c)) for c in (quiet, noisy) for r in (0.9, 1.1)] == [
        "LOSS", "faster", "ambiguous", "ambiguous"
    ]  # fmt: skip
    more = row(2.0, peak_memory_bytes=120, eager_peak_memory_bytes=100)
    assert summary.cells(more)[-2:] == ("1.20x", "faster, more memory")

    lost = replace(row(0.9496), case="d")
    text = summary.text(
        [row(2.0), lost, replace(row(0.3, eager_ms=0.01), case="e", mode="bwd"), replace(row(0.9, 0.9, 1.0), case="f")]
    )
    assert "Losing rows of dlaccel (ratio below 0.95): 1\n  toy/d float32 fwd: 0.9496" in text
    assert "Below that, but no loss: 2\n  toy/e float32 bwd: 0.30, overhead\n  toy/f float32 fwd: 0.90, ambiguous" in text


def test_a_mean_says_of_how_many_rows_it_is() -> None:
    good = [timed_row([5.0], op="linear_relu", case=str(i), mode="train", tags=["goal"]) for i in range(6)]

    def only(rows: list[Row]) -> tuple[str, str]:
        (mean,) = summary.geometric_means(rows)
        return mean.text, mean.of

    assert only(good) == ("2.00x", "6 of 6 rows")
    assert only(good[:1]) == ("2.00x", "1 of 6 rows"), "the others were not measured"
    for status in ("failed", "refused"):
        assert only([*good[:5], good[5].untimed(status, "why")]) == ("no mean", f"5 of 6 rows: 1 {status}")
    assert only([*good[:5], replace(good[5], status="suspect")]) == ("no mean", "5 of 6 rows: 1 suspect")
    assert only([*good[:5], replace(good[5], eager_samples_ms=[0.01])]) == ("no mean", "5 of 6 rows: 1 overhead")
    assert not summary.geometric_means([row.untimed("unavailable", "has no such op") for row in good])


def test_a_resumed_run_is_timed_as_it_began(
    bench: Callable[..., list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself made the machine busy; timed in another way its rows could not be compared."""
    cases = [make_case("a"), make_case("b")]
    with pytest.raises(KeyboardInterrupt):
        bench({}, *cases, stop_after=6, clock="wall", threads=2)
    monkeypatch.setattr(timing, "clock_and_threads", lambda device: ("thread", 1))
    resumed = bench({}, *cases, resume=True)
    assert {(row.clock, row.threads) for row in resumed} == {("wall", 2)} and len(resumed) == 4
    other = bench({}, *cases, resume=True, clock="thread")
    assert {(row.clock, row.threads) for row in other} == {("thread", 1)}, "unless asked for"


def test_what_is_not_here_is_asked_again_only_once_it_is(
    bench: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here: list[str | None] = ["import foo: ModuleNotFoundError"]
    foo = {"foo": Provider(SimpleNamespace(NAME="foo", available=lambda: here[0], implementation=lambda case: eager))}  # type: ignore[arg-type]
    asked: list[str] = []
    monkeypatch.setattr(worker, "rows", lambda *args, f=worker.rows: (asked.append(args[1].name), f(*args))[1])
    case = make_case(modes=("fwd",))
    bench(foo, case)
    bench(foo, case, resume=True)
    assert asked == ["24x16"] * 3, "once in each process"
    here[0] = None
    run._available.cache_clear()
    rows = bench(foo, case, resume=True)
    assert asked == ["24x16"] * 6 and {row.provider: row.status for row in rows} == {"eager": "passed", "foo": "passed"}
    run._available.cache_clear()


def test_a_budget_is_shared_by_all_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    seconds = {"slow": 10.0, "fast": 3.0, "middle": 5.0}
    plan = {op: [(replace(make_case(f"{i}"), op=op), "tuned") for i in range(9)] for op in seconds}
    spent = dict.fromkeys(seconds, 0.0)
    order = []
    for case, _ in run.turns(plan):
        order.append(case)
        now[0] += seconds[case.op]
        spent[case.op] += seconds[case.op]
        if now[0] > 60:
            break
    assert max(spent.values()) - min(spent.values()) <= max(seconds.values())
    for op in seconds:
        names = [case.name for case in order if case.op == op]
        assert names == sorted(names) and names[0] == "0", "the most valuable first"
    assert sum(1 for _ in run.turns(plan)) == 27


def test_bytes_are_the_least_traffic() -> None:
    """Each input once, each output once; parameters of a channel do not count."""
    known = families()

    def count(op: str, name: str, mode: str, *tensors: tuple[int, ...]) -> None:
        case = next(case for case in known[op].CASES if case.name == name)
        assert case.bytes is not None
        assert case.bytes(mode, 4) == 4 * sum(map(math.prod, tensors)), (op, mode)

    x, w, y = (128, 784), (512, 784), (128, 512)
    count("linear_relu", "128x784x512", "fwd", x, w, y)
    count("linear_relu", "128x784x512", "bwd", x, w, y, y, x, w)
    count("linear_relu", "128x784x512", "train", x, w, y, x, w, y, y, x, w)
    x, y = (8, 64, 112, 112), (8, 64, 56, 56)
    count("depthwise_conv2d", "8x64x112 K3 s2", "fwd", x, y)
    count("depthwise_conv2d", "8x64x112 K3 s2", "dgrad", y, x)
    count("depthwise_conv2d", "8x64x112 K3 s2", "wgrad", x, y)
    count("depthwise_conv2d", "8x64x112 K3 s2", "train", x, y, x, y, x)
    x, y = (8, 240, 28, 28), (8, 40, 28, 28)
    count("separable_conv2d", "8x240x28->40 K5", "bwd", x, y, x)
    x, y = (8, 64, 56, 56), (8, 64, 56, 56)
    count("batch_norm", "8x64x56x56 relu", "fwd", x, x, y)
    count("batch_norm", "8x64x56x56 relu", "bwd", x, y, x, y, x)


def test_presets_measure_what_matters_first() -> None:
    known = families()
    for device in ("cpu", "cuda"):
        sizes = {}
        for preset in run.PRESETS:
            chosen = run.Selection(preset=preset, device=device)
            sizes[preset] = {str(case) for cases in chosen.chosen(known).values() for case in cases}
            assert all(chosen.plan(known).values()), "every op has rows"
            assert chosen.rows(known) == sum(
                len(chosen.wanted(case)) for items in chosen.plan(known).values() for case, _ in items
            )
        assert sizes["quick"] < sizes["default"] < sizes["full"]
    goals = {str(case) for f in known.values() for case in f.CASES if "goal" in case.tags}
    cpu, cuda = (run.Selection(device=device).chosen(known) for device in ("cpu", "cuda"))
    assert goals <= {str(case) for cases in cpu.values() for case in cases}
    for op, cases in cpu.items():
        assert "goal" in cases[0].tags, op
        assert "cpu" not in cuda[op][0].devices, f"{op}: on a GPU its own sizes first"
    seconds = {preset: sum(run.Selection(preset=preset).seconds(known).values()) for preset in run.PRESETS}
    assert seconds["quick"] < 6 * 60 < seconds["default"] < 50 * 60 < seconds["full"]


def test_the_next_process_is_started_in_advance_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = [], []

    def start(env: dict[str, str]) -> Any:
        lines = iter([json.dumps({"gbps": {}, "gflops": {}}) + "\n"])
        pipe = SimpleNamespace(write=lambda text: None, close=lambda: None)
        started.append(SimpleNamespace(stdin=pipe, stdout=lines, wait=lambda: 0, kill=lambda: None))
        return started[-1], SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(run.Workers, "_start", staticmethod(start))
    monkeypatch.setattr(run.Workers, "_end", staticmethod(lambda process, log: ended.append(process)))
    for device, many in (("cpu", 3), ("cuda", 4)):
        started.clear()
        ended.clear()
        with run.Workers() as workers:
            for _ in range(3):
                assert list(workers(worker.Job(environment={"device": device, "threads": 1}, allocator="cuda"))) == [
                    {"gbps": {}, "gflops": {}}
                ]
        assert len(started) == many and ended == started, "none is left behind"


def test_a_process_that_is_killed_says_so(tmp_path: Path) -> None:
    job = worker.Job(op="linear_relu", case="8x8x8", environment={"device": "cpu"}, wanted=[("float32", "fwd", "dlaccel")])
    with run.Workers(timeout=0.2) as workers, pytest.raises(RuntimeError, match=r"no answer within 0 s"):
        list(workers(replace(job, environment={"device": "cpu", "threads": 1})))
    with run.Workers() as workers, pytest.raises(RuntimeError, match="the process ended with 1: KeyError: 'precision'"):
        list(workers(replace(job, environment={"device": "cpu", "threads": 1})))


# ---- compare --------------------------------------------------------------------------------------------------------


def timed_row(ms: list[float], eager: float = 10.0, processes: int = 3, **more: Any) -> Row:
    """One sample a process, or all in one."""
    paired = timing.ratios([eager] * len(ms), ms)
    values = {
        "provider": "dlaccel", "status": "passed", "samples_ms": ms, "eager_samples_ms": [eager] * len(ms),
        "median_ms": sorted(ms)[len(ms) // 2], "ratio": sorted(paired)[len(ms) // 2], "processes": processes,
        "repeat_ratios": paired if processes > 1 else [sorted(paired)[len(ms) // 2]], "cpu": "A", "threads": 1,
    }  # fmt: skip
    return replace(BLANK, **values | more)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (timed_row([5.0, 5.1, 4.9]), compare.SAME),
        (timed_row([5.2, 5.1, 5.3]), compare.SAME),  # under 5 %
        (timed_row([10.0, 10.1, 9.9]), compare.SLOWER),
        (timed_row([2.5, 2.6, 2.4]), compare.FASTER),
        (timed_row([6.0, 4.0, 9.0]), compare.AMBIGUOUS),  # 17 % slower, but a process of the second was as fast
        (timed_row([4.3, 4.3, 4.8]), compare.AMBIGUOUS),  # 16 % faster in two processes, 4 % in the third
        (timed_row([6.0, 6.0, 6.0], control_p20=0.8, control_p80=1.1), compare.AMBIGUOUS),  # eager differs more from itself
        (timed_row([4.2, 4.2, 4.2], control_p20=0.9, control_p80=1.3), compare.AMBIGUOUS),
        (None, compare.MISSING),
    ],
)
def test_compare_judges_from_the_processes(after: Row | None, verdict: str) -> None:
    (change,) = compare.compare([timed_row([5.0, 5.1, 4.9])], [after] if after else [])
    assert change.verdict == verdict
    assert compare.cells(change)[-1] == verdict


def test_rows_of_older_versions_are_compared_by_their_pairs() -> None:
    """They have their repeats from one process and do not say so."""
    old = json.loads(json.dumps(asdict(timed_row([5.0, 5.1, 4.9], repeat_ratios=[2.0] * 3, ratio_p20=1.8, ratio_p80=2.2))))
    del old["processes"], old["working_set"], old["sources"]
    row = results.parse(json.dumps(old))
    assert row.processes == 1 and row.interval == (1.8, 2.2)
    assert summary.cells(row)[-1] == "faster"
    (change,) = compare.compare([row], [timed_row([5.4, 5.4, 5.4])])
    assert change.verdict == compare.AMBIGUOUS


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def save(name: str, *rows: Row) -> str:
        with results.Writer(tmp_path / name / "bench.jsonl") as file:
            for row in rows:
                file.write(row)
        return str(tmp_path / name)

    fast, slow = timed_row([5.0, 5.1, 4.9]), timed_row([10.0, 10.1, 9.9])
    a, b = save("a", fast), save("b", slow)
    lost = save("lost", fast.untimed("failed", "output: error 3"))
    other = save("other", replace(fast, cpu="B", threads=2))
    assert cli.main(["compare", a, a]) == cli.OK
    assert cli.main(["compare", a, b]) == cli.REGRESSION
    assert cli.main(["compare", b, a]) == cli.OK
    assert cli.main(["compare", a, lost]) == cli.REGRESSION
    assert "LOST: failed, output: error 3" in capsys.readouterr().out
    assert cli.main(["compare", a, other]) == cli.USAGE
    error = capsys.readouterr().err
    assert "cpu: A in the first, B in the second" in error and "threads: 1 in the first, 2 in the second" in error
    capsys.readouterr()
    assert cli.main(["compare", save("two", fast, replace(fast, case="another")), a]) == cli.OK
    assert re.search(r"toy/another .*MISSING", capsys.readouterr().out)
    assert cli.main(["compare", a, save("none", replace(fast, case="another"))]) == cli.NOTHING

    out = ["--out", str(tmp_path)]
    assert cli.main(["baseline", "save", "good", "--results", a, *out]) == cli.OK
    assert cli.main(["compare", "good", b, *out]) == cli.REGRESSION
    assert cli.main(["compare", "godo", b, *out]) == cli.USAGE
    assert "saved: good" in capsys.readouterr().err
    assert cli.main(["baseline", "show", *out]) == cli.OK
    assert cli.main(["baseline", "show", "good", *out]) == cli.OK
    assert "toy/c" in capsys.readouterr().out
    assert cli.main(["baseline", "save", "../evil", "--results", a, *out]) == cli.USAGE


# ---- verify ---------------------------------------------------------------------------------------------------------


def found_by_verify(provider: Provider) -> dict[str, tuple[str, str]]:
    family = SimpleNamespace(SAMPLES=[make_case("plain"), make_case("again")], eager=eager, reference=eager)
    found = verify.findings(provider.name, provider, "toy", family, list(verify.ROWS), "cpu")
    return {f"{f.row}: {f.sample}" if f.row == "values" else f.row: (f.outcome, f.reason) for f in found}


def test_verify_finds_nothing_wrong_with_eager() -> None:
    found = found_by_verify(module("eager", eager))
    absent = {"channels_last inputs", "channels_last gradient"}  # the made-up op has no third dimension
    assert {row for row, (outcome, _) in found.items() if outcome == verify.ABSENT} == absent
    assert {outcome for row, (outcome, _) in found.items() if row not in absent} == {verify.OK}
    assert len(found) == len(verify.ROWS) + 1


class _Fused(torch.autograd.Function):
    """What hand-written kernels often get wrong: strides, the layout of the gradient, second derivatives, inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, flaw: str) -> Tensor:
        if flaw == "inputs unchanged":
            y = x.mul_(scale).relu()
            x.div_(scale)
            x[0, 0] = 0
        else:
            y = (x * scale).relu()
        if flaw == "strided inputs" and not x.is_contiguous():
            y = torch.zeros_like(y)
        if flaw == "large mean":
            y = y.clamp(max=100)
        if flaw == "large values":
            y = y.exp().log().relu()  # overflows
        if flaw == "an input of NaN":
            y = torch.where(x * scale > 0, x * scale, 0)
        if flaw == "an input of -inf":
            y = y + 0 * x
        if flaw == "values in bfloat16" and x.dtype == torch.bfloat16:
            y = y.abs().bfloat16() * 1.05
        ctx.save_for_backward(x.clone(), scale, y)
        ctx.flaw = flaw
        return y + torch.rand(()) * 1e-7 if flaw == "bitwise repeatable" else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, y = ctx.saved_tensors
        if ctx.flaw == "double backward":
            dy, scale, x = dy.detach(), scale.detach(), x.detach()
        if ctx.flaw == "stride-0 gradient" and 0 in dy.stride():
            dy = dy.as_strided(dy.shape, (1, 1))
            dy = dy * torch.arange(dy.shape[0])[:, None]
        dz = dy * (y > 0)
        both = all(ctx.needs_input_grad[:2])
        if ctx.flaw == "some gradients only" and not both:
            dz = dz * 2
        return dz * scale, (dz * x).sum(0), None


@pytest.mark.parametrize(
    "flaw",
    ["values in bfloat16", "large values", "large mean", "an input of -inf", "an input of NaN", "inputs unchanged",
     "strided inputs", "stride-0 gradient", "some gradients only", "double backward", "bitwise repeatable"],
)  # fmt: skip
def test_verify_sees_each_flaw_in_its_row(flaw: str) -> None:
    found = found_by_verify(module("fused", lambda x, scale: _Fused.apply(x, scale, flaw)))
    wrong = {row for row, (outcome, _) in found.items() if outcome == verify.WRONG}
    assert flaw in wrong
    assert not any(row.startswith("values: ") for row in wrong), "a flaw that plain values do not show"


def test_a_finding_says_how_to_see_it_alone() -> None:
    finding = verify.Finding("toy", "double backward", "no bias", "dlaccel/triton", verify.WRONG, "bad")
    command = (
        "python -m dlaccel.bench verify --device cpu --op toy --row 'double backward' --provider dlaccel --backend triton "
        "--sample 'no bias'"
    )
    assert finding.reproduce() == command
    absent = verify.Finding("toy", "values", "bias", "liger", verify.ABSENT, "takes no bias")
    text = verify.text([finding, absent], {"quack": "no GPU"}, summary.table, "cpu")
    assert command in text
    assert "liger has - in 1 row: takes no bias" in text and "quack is not in the table: no GPU" in text


MINE = """
import os, time, torch
NAME = "mine"
def available():
    time.sleep(float(os.environ.get("MINE_SLEEPS", 0)))
class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        y = (x @ weight.T + (0 if bias is None else bias)).relu()
        ctx.save_for_backward(x, weight, y)
        return y
    @staticmethod
    def backward(ctx, dy):
        x, weight, y = ctx.saved_tensors
        if "MINE_CRASHES" in os.environ:
            os._exit(9)
        if 0 in dy.stride():
            dy = 2 * dy  # the planted flaw
        dz = (dy * (y > 0)).flatten(0, -2) if y.dim() > 1 else (dy * (y > 0))[None]
        return (dz @ weight).view_as(x), dz.T @ x.reshape(-1, x.shape[-1]), dz.sum(0)
def implementation(case):
    return lambda x, weight, bias=None: Fused.apply(x, weight, bias)
"""


def test_the_command_of_a_finding_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also for a provider that is a file."""
    mine = tmp_path / "my provider.py"
    mine.write_text(MINE)
    where = ["--op", "linear_relu", "--provider", str(mine), "--device", "cpu"]
    assert cli.main(["verify", *where, "--row", "stride-0 gradient", "--row", "some gradients only"]) == cli.OK
    shown = capsys.readouterr().out
    assert re.search(r"\[stride-0 gradient\] +WRONG", shown) and re.search(r"\[some gradients only\] +ok", shown)
    reason, command = re.findall(r"(grad 0: error .*)\n    (python .*)", shown)[0]
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = command.replace("python", shlex.quote(sys.executable), 1)
    again = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert reason in again.stdout and "[some gradients only]" not in again.stdout


def test_a_provider_that_hangs_or_crashes_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    arguments = (["linear_relu"], ["values"], "cpu", "bias")
    monkeypatch.setenv("MINE_CRASHES", "1")
    found, absent = verify.verify([(str(mine), ""), ("eager", "")], *arguments)
    assert [f.outcome for f in found] == [verify.OK] and found[0].provider == "eager"
    assert absent[str(mine)].startswith("the process ended with 9, after 0 findings")
    monkeypatch.setenv("MINE_SLEEPS", "60")
    found, absent = verify.verify([(str(mine), "")], *arguments, timeout=2.0)
    assert not found and absent[str(mine)].startswith("no answer within 2 s, after 0 findings")


def test_verify_keeps_what_it_has_found_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a run that is ended; within a provider too."""
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    kept: list[int] = []
    monkeypatch.setattr(verify, "KEEP_EVERY", 0.0)
    providers = [("eager", ""), (str(mine), "")]
    found, _ = verify.verify(providers, ["linear_relu"], ["values"], "cpu", keep=lambda found, absent: kept.append(len(found)))
    assert kept == sorted(kept) and kept[-1] == len(found) and {1, 2, len(found) // 2} <= {*kept}


def test_verify_and_its_eager_multiply_float32_alike() -> None:
    """cuDNN's default is TF32, whose error would be the yardstick."""
    job = {"provider": "eager", "label": "eager", "device": "cpu", "ops": [], "rows": [], "sample": None}
    code = """
import torch
from dlaccel.bench import verify
verify.main()
assert torch.backends.cudnn.conv.fp32_precision == "ieee"
"""
    subprocess.run(python(code), input=json.dumps(job), text=True, check=True)


# ---- report ---------------------------------------------------------------------------------------------------------


def rows_to_show() -> list[Row]:
    good = replace(
        timed_row([5.0, 5.1, 4.9]), case="fast", tags=["goal"], bytes=10**6, flops=10**7, gbps=20.0, tflops=0.002, p20_ms=4.9,
        p80_ms=5.1, ratio_p20=1.9, ratio_p80=2.1, ceiling_gbps=30.0, ceiling_tflops=0.1, time_utc="2026-01-02T03:04:05+00:00",
        git_sha="0123456789abcdef", torch="2.x", allocator="tuned",
    )  # fmt: skip
    lost = replace(good, case="slow <b>", ratio=0.5, mode="train", repeat_ratios=[0.5] * 3, ratio_p20=0.5, ratio_p80=0.5)
    return [good, lost, replace(BLANK, provider="dlaccel", case="bad", reason="output: error 3", cpu="A")]


def test_report_is_one_page_that_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with results.Writer(tmp_path / "bench.jsonl") as file:
        for row in rows_to_show():
            file.write(row)
    (tmp_path / "bench.jsonl").open("a").write('{"half": ')
    finding = verify.Finding("toy", "double backward", "no bias", "attorch", verify.WRONG, "second derivative 3: error")
    verify.save(tmp_path / "verify.json", [finding], {"quack": "no GPU here"}, "cpu")
    claim = ClaimRow(
        claim=3, id="H8", quantity="copy", status="projected", value=12.5, unit="GB/s", device="D", source="S", formula="a / b"
    )
    (tmp_path / "claims.jsonl").write_text(dump(claim) + "\n[]")
    assert cli.main(["report", str(tmp_path)]) == cli.OK
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and ' src="http' not in page and "@import" not in page and "<link" not in page
    for shown in (
        "toy/slow &lt;b&gt;", "output: error 3", "bench.jsonl:4: not complete JSON", "claims.jsonl:2: ", "0123456789ab",
            "2026-01-02", "0.50",
        "second derivative 3: error", "--provider attorch", "no GPU here", "Made on: ", "12.5", "projected",
    ):  # fmt: skip
        assert shown in page, shown
    assert page.index("<dt>allocator</dt>") < page.index("Goal rows, geometric mean") < page.index("<details>")
    if figures.problem() is None:
        pictures = sorted(p.name for p in (tmp_path / "figures").iterdir())
        assert pictures == ["m0-roofline-float32.png", "m0-speedup-toy-float32.png", "m0-throughput-toy-train.png"]
        assert page.count("<svg") == 3
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(ids) == len(set(ids)), "figures do not share ids"
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.replace('href="#here1"', ""))) <= {
            pair for name in ids for pair in ((name, ""), ("", name))
        }  # fmt: skip
    assert "left out: " in capsys.readouterr().err


def test_the_roofline_says_at_which_size_a_bandwidth_was_measured() -> None:
    pytest.importorskip("matplotlib")
    good = replace(rows_to_show()[0], working_set=67_000_000)
    figure = figures.roofline([good, replace(good, case="small", working_set=30_000, ceiling_gbps=90.0)], "toy")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    figures.close(figure)
    assert labels[1:] == ["30 GB/s at 67 MB, 100 GFLOP/s", "90 GB/s at 0.03 MB, 100 GFLOP/s"]


def test_a_cpu_is_told_from_another_of_its_makers() -> None:
    """A virtual machine's model name may be no more than "AMD EPYC"."""
    name = results.cpu_name()
    assert torch.backends.cpu.get_cpu_capability() in name and name.endswith(f", {results.cpus()} CPUs")
    if "cpu family" in Path("/proc/cpuinfo").read_text():
        assert re.search(r"\(family \d+, model \d+, stepping \d+, ", name)


def test_report_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "problem", lambda: "matplotlib is not installed")
    page = report.write(tmp_path, rows_to_show(), []).read_text()
    assert "No figures: matplotlib is not installed" in page and "toy/fast" in page


def test_report_of_a_damaged_verify_file(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text('{"findings": [')
    page = report.write(tmp_path, rows_to_show(), []).read_text()
    assert "verify.json: not what `verify --out` writes" in page and "toy/fast" in page


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == cli.USAGE
    assert "neither bench*.jsonl nor claims.jsonl" in capsys.readouterr().err


# ---- measured beside predicted --------------------------------------------------------------------------------------

H100 = "NVIDIA H100 80GB HBM3"


def kernel_rows(count: int = 40, factor: float = 1.5) -> list[kernel_times.KernelTime]:
    """Made-up times: `factor` x the committed predictions."""
    predicted = list(kernel_times.predictions(H100).items())[:count]
    return [
        kernel_times.KernelTime(
            op=op, case=case, dtype=dtype, kernel=kernel, nth=nth, samples_ms=[row["predicted_us"] * factor / 1e3] * 3,
            median_ms=row["predicted_us"] * factor / 1e3, gpu=H100, git_sha="0123456789abcdef", time_utc="2026-01-02T03:04:05",
        )
        for (op, case, dtype, kernel, nth), row in predicted
    ]  # fmt: skip


def test_report_sets_measured_kernels_beside_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RECORDED", tmp_path / "recorded")
    out = tmp_path / "out"
    nothing = report.write(out, rows_to_show(), []).read_text()
    assert "No GPU run is recorded" in nothing and not list((out / "figures").glob("k*"))

    rows = kernel_rows()
    unknown = replace(rows[0], kernel="of_another_time_kernel")
    elsewhere = replace(rows[1], gpu="NVIDIA T4")
    with results.Writer(tmp_path / "recorded" / "h100" / kernel_times.FILE) as file:
        for row in (*rows, unknown, elsewhere):
            file.write(asdict(row))
    with (tmp_path / "recorded" / "h100" / kernel_times.FILE).open("a") as file:
        file.write('{"op": ')
    page = report.write(out, rows_to_show(), []).read_text()
    assert "No GPU run is recorded" not in page
    assert H100 in page and "0123456789ab, 2026-01-02" in page and "1.50" in page
    assert f"geometric mean of {len(rows)} kernels" in page
    assert "of_another_time_kernel" not in page and "T4" not in page
    assert f"kernels.jsonl:{len(rows) + 3}: not a kernel" in page
    one, row = rows[0], kernel_times.predictions(H100)[rows[0].launch]
    assert one.kernel in page and f"{row['predicted_us']:.4g}" in page and f"{1.5 * row['predicted_us']:.4g}" in page
    if figures.problem() is None:
        assert (out / "figures" / "k0-kernels.png").stat().st_size > 10_000


def test_what_was_measured_keeps_its_prediction(tmp_path: Path) -> None:
    """`inspect --predict` never rewrites a prediction after the fact: kernel times count as measured."""
    one = kernel_rows(1)[0]
    with results.Writer(tmp_path / "h100" / kernel_times.FILE) as file:
        file.write(asdict(one))
    assert model._measured_ops(model.GPUS["H100"], tmp_path) == {one.op}
    assert model._measured_ops(model.GPUS["H200"], tmp_path) == set()


def test_launches_of_equal_calls_are_told_apart() -> None:
    events = [("b", 3.0, 30.0), ("a", 1.0, 10.0), ("memset", 0.0, 1.0), ("a", 2.0, 20.0), ("a", 5.0, 11.0), ("a", 6.0, 21.0),
              ("b", 7.0, 31.0)]  # fmt: skip
    found = kernel_times.by_launch(events, {"a", "b"}, calls=2)
    assert found == {("a", 0): [10.0, 11.0], ("a", 1): [20.0, 21.0], ("b", 0): [30.0, 31.0]}
    with pytest.raises(RuntimeError, match="a: 3 launches in 2 calls"):
        kernel_times.by_launch(events[:-2], {"a"}, calls=2)


def test_kernel_times_resume_and_a_case_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = {key: row for key, row in kernel_times.predictions(H100).items() if key[0] in ("linear_relu", "cross_entropy")}
    cases = list(dict.fromkeys(key[:3] for key in predicted))
    asked: list[tuple[str, str]] = []

    def step(case: Case, dtype: torch.dtype) -> Any:
        asked.append((str(case), str(dtype)))
        if len(asked) == 2:
            raise torch.OutOfMemoryError("no room")
        return str(case)

    kernels = {key[3] for key in predicted}
    monkeypatch.setattr(kernel_times, "training_step", step)
    monkeypatch.setattr(
        kernel_times, "profiled", lambda call, rounds: [(k, float(i), 5.0) for k in kernels for i in range(rounds)]
    )
    path, everything = tmp_path / kernel_times.FILE, ["linear_relu", "cross_entropy"]
    environment = {"gpu": H100, "git_sha": "sha", "cpu": "not a field"}
    count, problems, broke = kernel_times.measure(predicted, path, everything, environment)
    assert problems == [f"{'/'.join(cases[1][:2])} {cases[1][2]}: OutOfMemoryError: no room"] and broke is None
    assert len({name.partition("/")[0] for name, _ in asked[:4]}) == 2, "ops take turns"
    rows, bad = kernel_times.read(path)
    assert len(rows) == count and not bad and {row.launch[:3] for row in rows} == {*cases} - {cases[1]}
    assert rows[0].median_ms == pytest.approx(0.005) and rows[0].gpu == H100
    kernel_times.measure(predicted, path, everything, environment)
    assert len(asked) == len(cases) + 1, "only what failed is measured again"

    asked.clear()
    monkeypatch.setattr(kernel_times, "gpu_is_lost", lambda: True)
    following = environment | {"git_sha": "next"}
    count, problems, broke = kernel_times.measure(predicted, path, everything, following)
    assert len(asked) == 2 and broke == f"{'/'.join(cases[1][:2])} {cases[1][2]}"
    kernel_times.measure(predicted, path, everything, following, [broke])
    assert len(asked) == len(cases) and f"{'/'.join(cases[1][:2])}" not in {name for name, _ in asked[2:4]}


def test_kernel_times_of_all_ops_take_turns() -> None:
    predicted = kernel_times.predictions(H100)
    order = kernel_times.in_turns(dict.fromkeys(key[:3] for key in predicted))
    ops = {op for op, *_ in order}
    first = order[: 2 * 2 * len(ops)]
    assert {(op, dtype): sum(one[0] == op and one[2] == dtype for one in first) for op, _, dtype in first} == dict.fromkeys(
        itertools.product(ops, ("bfloat16", "float32")), 2
    )
    assert len(order) == len({*order}) == len({key[:3] for key in predicted})


def test_kernel_times_without_predictions_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "provenance", lambda *_, **__: {"gpu": "NVIDIA T4", "git_sha": ""})
    backends: Any = torch.backends
    with switched(backends.cudnn.conv, fp32_precision="tf32"), switched(backends.cuda.matmul, fp32_precision="tf32"):
        assert kernel_times.main(["--out", str(tmp_path)]) == 2
        assert backends.cudnn.conv.fp32_precision == backends.cuda.matmul.fp32_precision == "ieee"
    assert "has nothing for NVIDIA T4, only for " in capsys.readouterr().err and not [*tmp_path.iterdir()]


# ---- what a GPU machine runs ----------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def visited(tmp_path: Path, *todo: gpu.Unit, budget: float = 100, sha: str = "sha") -> tuple[int, str]:
    """(exit code, what it says) of a visit."""
    said: list[str] = []
    code = gpu.visit(todo, tmp_path / "steps.jsonl", tmp_path / "state", budget, sha, said.append)
    return code, "\n".join(said)


def test_a_gpu_visit_goes_on_whatever_fails_and_continues_where_it_stopped(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    note = f"import sys; open({str(trace)!r}, 'a').write(sys.argv[1] + ' ')"
    todo = [
        gpu.Unit("a", [*python(note + "; print('shown')"), "a"], 60),
        gpu.Unit("fails", [*python(note + "; raise SystemExit(5)"), "fails"], 60),
        gpu.Unit("missing", ["/no/such/program"], 60),
        gpu.Unit("b", [*python(note), "b"], 60),
    ]
    code, said = visited(tmp_path, *todo)
    assert code == 1 and trace.read_text() == "a fails b ", "what fails is not repeated in one call"
    assert "    shown" in said and (tmp_path / "state" / "a.log").read_text() == "shown\n"
    assert said.splitlines()[-4:] == [
        f"{how:16} {name}" for how, name in (("done", "a"), ("failed (5)", "fails"), ("failed (127)", "missing"), ("done", "b"))
    ]
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"unit": "te')  # killed in mid-write
    (tmp_path / "state" / "passed-sha.txt").write_text("tests/a.py::mended\n")
    (tmp_path / "state" / "passed-sha.failed").write_text("FAILED tests/a.py::bad\nwhy\n\nFAILED tests/a.py::mended\nwhy\n")
    code, said = visited(tmp_path, *todo)
    assert code == 1 and trace.read_text() == "a fails b fails "
    assert said.endswith("1 failures in passed-sha.failed:\ntests/a.py::bad")
    assert visited(tmp_path, *todo, sha="another commit")[0] == 1 and trace.read_text().endswith("a fails b ")


def test_the_unit_with_the_fewest_shares_is_next() -> None:
    def ended(unit: str, seconds: float, code: int | None = None) -> gpu.Outcome:
        return gpu.Outcome(unit, code, seconds, "sha", "")

    todo = [gpu.Unit("a", [], 100), gpu.Unit("b", [], 50), gpu.Unit("c", [], 10)]

    def after(*before: gpu.Outcome, failed: str = "") -> str | None:
        unit = gpu.next_unit(todo, before, {failed})
        return None if unit is None else unit.name

    assert after() == "a"
    assert after(ended("a", 40)) == "a", "the budget was used before its share"
    assert after(ended("a", 40), ended("a", 60)) == "b"
    assert after(ended("a", 100), ended("b", 3, code=1)) == "b" and after(ended("a", 100), failed="b") == "c"
    assert after(ended("a", 100), ended("b", 50), ended("c", 10)) == "a"
    assert after(ended("a", 100), ended("b", 5, code=0), ended("c", 10, code=0)) == "a"
    assert after(*(ended(name, 1, code=0) for name in "abc")) is None


def gone(pid: str) -> None:
    """Waits for the end of a killed process: it still needs a moment of the CPU."""
    state, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


SLEEPS = """
import os, subprocess, sys, time
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({file!r}, "w").write(f"{{os.getpid()}} {{started.pid}}\\n")
time.sleep(60)"""


def test_a_unit_is_ended_with_what_it_started_when_its_share_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker left behind would hold the GPU."""
    monkeypatch.setattr(gpu, "LEAST", 2.0)
    code = SLEEPS.format(file=str(tmp_path / "pids"))
    refreshed: list[bool] = []
    monkeypatch.setattr(gpu, "REFRESH", 0.5)
    todo = [gpu.Unit("sleeps", python(code), 3), gpu.Unit("next", python(""), 3)]
    log, said = tmp_path / "steps.jsonl", []
    assert gpu.visit(todo, log, tmp_path, 7.0, "sha", said.append, refreshed.append) == 0
    codes = [(json.loads(line)["unit"], json.loads(line)["code"]) for line in log.read_text().splitlines()]
    assert codes[:2] == [("sleeps", None), ("next", 0)] and said[-2:] == ["to be continued  sleeps", "done             next"]
    assert refreshed[0] is False and True in refreshed
    for pid in (tmp_path / "pids").read_text().split():
        gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_unit_outlives_the_visit(tmp_path: Path, number: signal.Signals) -> None:
    pids = tmp_path / "pids"
    code = f"""
from pathlib import Path
from dlaccel.bench import gpu
todo = [gpu.Unit("sleeps", [{sys.executable!r}, "-c", {SLEEPS.format(file=str(pids))!r}], 60)]
gpu.visit(todo, Path({str(tmp_path)!r}) / "steps.jsonl", Path({str(tmp_path)!r}), 60, "sha")
"""
    process = subprocess.Popen(python(code), cwd=gpu.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not pids.exists() or not pids.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    process.wait()
    unit, worker = pids.read_text().split()
    gone(unit)
    if number == signal.SIGTERM:  # else it ends when its pipes do, as workers of the harness and of pytest-xdist
        gone(worker)
    else:
        os.kill(int(worker), signal.SIGKILL)


def test_results_are_archived_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build").mkdir()
    first = tmp_path / "build" / "a.log"
    first.write_text("text")
    assert gpu.archive(tmp_path / "r.tar.gz", [first, tmp_path / "build" / "gone"], tmp_path)
    with tarfile.open(tmp_path / "r.tar.gz") as tar:
        assert tar.getnames() == ["build/a.log"]
    monkeypatch.setattr(gpu, "LARGEST", 10)
    assert not gpu.archive(tmp_path / "r.tar.gz", [first, first], tmp_path)
    with tarfile.open(tmp_path / "r.tar.gz") as tar:
        assert tar.getnames() == ["build/a.log"] and not list(tmp_path.glob("*.part"))


def test_the_state_of_a_visit_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By OUT to the next machine, whose call is given the archives."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "device_name", lambda: "h1")
    monkeypatch.setattr(results, "provenance", lambda *_, **__: {"git_sha": "sha"})
    code = (
        "import os, pathlib; p = pathlib.Path(os.environ['TRITON_CACHE_DIR']); p.mkdir(); (p / 'a.cubin').touch(); print('ran')"
    )
    monkeypatch.setattr(gpu, "units", lambda out, sha: [gpu.Unit("a", python(code), 60)])
    for machine in ("one", "two"):
        root, out = tmp_path / machine, tmp_path / f"out of {machine}"
        root.mkdir()
        out.mkdir()
        monkeypatch.setattr(gpu, "ROOT", root)
        monkeypatch.setattr(gpu, "STATE", root / "build" / "gpu")
        monkeypatch.setenv("OUT", str(out))
        given = [word for file in (tmp_path / "out of one").glob("*.tar.gz") for word in ("--given", str(file))]
        assert gpu.main(given if machine == "two" else []) == 0
    assert (tmp_path / "two" / "build" / "gpu" / "a.log").read_text() == "ran\n", "it was not run again"
    assert (tmp_path / "two" / "build" / "gpu" / "triton" / "a.cubin").exists()
    assert len((tmp_path / "two" / "bench" / "results" / "h1" / "steps.jsonl").read_text().splitlines()) == 1
    assert "done             a" in (out / "log.txt").read_text()


def test_the_units_of_a_gpu_visit_name_real_files_and_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    todo = gpu.units(tmp_path, "sha")
    names = [unit.name for unit in todo]
    assert len({*names}) == len(todo), "what is done is known by its name"
    assert [n for n in names if n.split()[0] != "compile"][:5] == [
        "smoke",
        "kernels",
        "goal rows",
        "tests",
        f"tune {next(iter(families()))}",
    ]
    assert sum(unit.share for unit in todo[:4]) < 540 - gpu.LEAST, "one call comes to the tests"
    for unit in todo:
        words = [word for word in unit.command if word.endswith(".py")]
        assert all((gpu.ROOT / word).exists() for word in words), unit
        if "dlaccel.bench" in unit.command:
            verb, *options = unit.command[unit.command.index("dlaccel.bench") + 1 :]
            args = cli.parser(verb).parse_args([verb, *options])
            assert {*getattr(args, "provider", [])} <= {*provider.names()}
    files = gpu.gpu_tests()
    assert {*files[:2]} == {"tests/test_contract.py", "tests/test_gpu.py"} and "tests/test_batch_norm.py" in files
    assert not {"tests/test_bench.py", "tests/test_claims.py", "tests/test_layout.py", "tests/test_packaging.py"} & {*files}
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_the_first_tests_on_a_gpu_start_every_kernel() -> None:
    """But both passes in one launch, which no call starts, and the divisor, which a gradient computed by the forward takes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from dlaccel.bench.compile import find_case, launches
    from tests.test_gpu import SMOKE

    assert SMOKE.keys() == families().keys()
    found = {
        (launch.name, dtype)
        for op, names in SMOKE.items()
        for name in names
        for dtype in (torch.bfloat16, torch.float32)
        for launch in launches(op, find_case(op, name), dtype, "sm_90")
    }
    text = "".join(path.read_text() for path in sorted((gpu.ROOT / "kernels").glob("*.py")))
    kernels = {*re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)} - {
        "forward_kernel",
        "backward_kernel",
        "divisor_kernel",
    }
    assert {name for name, _ in found} == kernels and len(kernels) > 15
    for name in kernels - {"linear_relu_tma_kernel", "separable_forward_kernel"}:  # float32 with TF32 alone, or not at all
        assert {(name, torch.bfloat16), (name, torch.float32)} <= found | {("linear_relu_kernel", torch.bfloat16)}


@pytest.mark.parametrize("processes", [0, 2])
def test_passed_tests_are_left_out_when_run_again(tmp_path: Path, processes: int) -> None:
    if processes:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_some.py").write_text("""
import pathlib, pytest
def test_good(): pass
def test_bad(): assert pathlib.Path("mended").exists(), "not mended"
def test_skipped(): pytest.skip("no")
""")
    env = os.environ | {"PYTHONPATH": str(gpu.ROOT)}
    passed = tmp_path / "done" / "passed.txt"

    def run_again() -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.passed", "--passed", str(passed), "test_some.py"]
        command += ["-n", str(processes)] if processes else []
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert run_again()[0] == 1
    assert sorted(passed.read_text().split()) == ["test_some.py::test_good", "test_some.py::test_skipped"]
    failures = passed.with_suffix(".failed").read_text()
    assert failures.startswith("FAILED test_some.py::test_bad\n") and "not mended" in failures
    code, out = run_again()
    assert code == 1 and "1 failed" in out and "1 passed" not in out
    (tmp_path / "mended").touch()
    code, out = run_again()
    assert code == 0 and "1 passed" in out
    assert run_again()[0] == 0


def test_a_process_with_a_broken_gpu_ends(tmp_path: Path) -> None:
    """Or every test behind the one that broke it would fail."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_some.py").write_text("""
import pytest
from dlaccel.bench import timing
broken = False
timing.gpu_is_lost = lambda: broken
def test_breaks():
    global broken
    broken = True
    assert False, "illegal access"
@pytest.mark.parametrize("i", range(3))
def test_after(i): assert not broken
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.passed", "--passed", "passed.txt", "-n", "1", "test_some.py"]
    env = os.environ | {"PYTHONPATH": str(gpu.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert len((tmp_path / "passed.txt").read_text().split()) == 3
    assert "illegal access" in (tmp_path / "passed.failed").read_text()


def test_without_a_repository_the_code_stands_for_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what was done with other code would count as done."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setattr(results, "_output", lambda *command: "")
    monkeypatch.setattr(importlib.import_module("dlaccel.kernels"), "__path__", [str(kernels)])
    shas = []
    for text in ("a", "b", "b"):
        (kernels / "a.py").write_text(text)
        (kernels / f"{len(shas)}.json").touch()  # tuned or measured meanwhile
        results.sources.cache_clear()
        shas.append(results.provenance("cpu", threads=1, clock="", precision="", seed=0)["git_sha"])
    results.sources.cache_clear()
    assert shas[0] != shas[1] == shas[2] and all(re.fullmatch("[0-9a-f]{40}", sha) for sha in shas)


class FakeCuda:
    """Streams without a device. As torch's, a capture that fails leaves its stream current."""

    def __init__(self, fails: bool = False) -> None:
        self.current, self.fails, self.seen = "first", fails, []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph", "synchronize", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.seen.append("replay"))

    def Event(self, enable_timing: bool) -> Any:
        return SimpleNamespace(record=lambda: None, elapsed_time=lambda stop: 5.0)

    def synchronize(self) -> None:
        self.seen.append("synchronize")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any = None) -> Iterator[None]:
        before, self.current = self.current, stream
        self.seen.append("capture")
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current = before


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_is_captured_on_the_stream_of_what_it_needs(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(fails)
    cuda.install(monkeypatch)
    step: Any = SimpleNamespace(
        mode="bwd", context=contextlib.nullcontext, load=lambda values: None,
        prepare=lambda: cuda.seen.append(("prepare", cuda.current)), run=lambda: cuda.seen.append(("run", cuda.current)),
    )  # fmt: skip
    assert timing.graph_ms(step, None) == (None if fails else 5.0 / 100)  # type: ignore[arg-type]
    at = cuda.seen.index("capture")
    prepared, side = cuda.seen[at - 1]
    assert prepared == "prepare" and side != "first" and cuda.seen[at + 1] == ("run", side)
    assert cuda.current == "first", "also when the capture fails"

    from tests.gpu_tools import captured

    with contextlib.suppress(RuntimeError):
        captured(lambda: None)
    assert cuda.current == "first"


def test_graphs_come_last_and_only_to_the_first_that_fails(
    bench: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in a process after a failed capture may fail as well."""
    order: list[str] = []
    group, answers = worker._group, iter([0.25, None, 0.75])

    def on_a_gpu(job: Any, base: Row, *rest: Any) -> Iterator[Row]:
        for row in group(job, replace(base, device="cuda"), *rest):
            order.append(row.provider)
            yield row

    def graph_ms(step: Any, values: Any) -> float | None:
        order.append("graph")
        return next(answers)

    monkeypatch.setattr(worker, "_group", on_a_gpu)
    monkeypatch.setattr(timing, "graph_ms", graph_ms)
    monkeypatch.setattr(timing, "GRAPH_BELOW_MS", 1e9)
    monkeypatch.setattr(timing, "processes", lambda device: 1)
    rows = bench({name: module(name, eager) for name in ("a", "b")}, make_case(modes=("fwd",)))
    assert order == ["eager", "a", "b", "graph", "graph"]
    assert {row.key: row for row in rows}[rows[0].key].graph_ms == 0.25
    assert [row.graph_ms for row in rows[1:]] == [None, None]


COMPILED_BEFOREHAND = """
import os, sys
from pathlib import Path
import torch
from dlaccel.bench import host_time
from dlaccel.bench.case import families, implementation
from dlaccel.bench.compile import compile_launches, launches, operator_calls
from dlaccel.kernels import config

if __name__ == "__main__":
    cubins = lambda: len([*Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")])
    case = next(case for case in families()["linear_relu"].SAMPLES if case.name == "ragged blocks")
    found = launches("linear_relu", case, torch.float32, "sm_90", backward=False)
    assert [report.status for report in compile_launches([(one, "sm_90") for one in found], 1, keep=True)] == ["ok"]
    before = cubins()
    host_time.install()
    tensors = case.make(torch.Generator().manual_seed(0), torch.float32)
    with config.assume(config.TARGETS["sm_90"]), torch.inference_mode():
        for function, args in operator_calls(lambda: case.call(implementation("linear_relu"), *tensors)):
            function(*args)
    print(before, cubins())
"""


LAUNCHER_BEFOREHAND = """
import os, torch
from pathlib import Path
from dlaccel.bench.compile import compile_launches, launches

if __name__ == "__main__":
    found = launches("linear_relu", "ragged blocks", torch.float32, "sm_90", backward=False)
    assert [report.status for report in compile_launches([(one, "sm_90") for one in found], 1, keep=True)] == ["ok"]
    print(len([*Path(os.environ["TRITON_CACHE_DIR"]).glob("*/__triton_launcher*.so")]))
"""


def test_the_launchers_of_triton_3_6_are_built_beforehand(tmp_path: Path) -> None:
    """They link the driver; here one of empty functions."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6.") or not shutil.which("gcc"):
        pytest.skip("Triton 3.6 alone compiles a launcher for each kernel, with gcc")
    names = ("cuLaunchKernelEx", "cuGetErrorString", "cuPointerGetAttribute", "cuTensorMapEncodeTiled")
    (tmp_path / "cuda.c").write_text("".join(f"int {name}() {{ return 0; }}\n" for name in names))
    driver = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "cuda.c")]
    subprocess.run(driver, check=True)
    script = tmp_path / "script.py"
    script.write_text(LAUNCHER_BEFOREHAND)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join([str(gpu.ROOT), *sys.path])}
    env |= {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1"], done.stdout + done.stderr


def test_what_is_compiled_beforehand_is_what_a_launch_needs(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "script.py"
    script.write_text(COMPILED_BEFOREHAND)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "1"], done.stdout + done.stderr


# ---- command line ---------------------------------------------------------------------------------------------------


def test_options_take_several_names_by_comma_or_repeated() -> None:
    args = cli.parser().parse_args(["run", "--op", "a,b", "--op", "c", "--case", "8x8 K7, 9x9"])
    assert args.op == ["a", "b", "c"] and args.case == ["8x8 K7", "9x9"]
    assert cli.parser().parse_args(["run"]).op == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--op", "linear_rely"], "unknown op 'linear_rely' (did you mean 'linear_relu'?); known: "),
        (["run", "--op", "linear_relu", "--case", "9x9"], "unknown case '9x9'"),
        (["run", "--case", "9x9"], "more (`list cases`)"),
        (["run", "--provider", "{named eager}"], "NAME 'eager' is taken"),
        (["run", "--provider", "egaer"], "unknown provider 'egaer' (did you mean 'eager'?); known: dlaccel, eager"),
        (["run", "--mode", "sideways"], "unknown mode 'sideways'; known: fwd, bwd, train, dgrad, wgrad"),
        (["run", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["run", "--op", "linear_relu", "--mode", "dgrad"], "nothing to measure on cpu"),
        (["run", "--case", "8192x8192x8192", "--device", "cpu"], "nothing to measure on cpu"),
        (["run", "--provider", "{broken}"], "SyntaxError"),
        (["verify", "--provider", "{broken}"], "SyntaxError"),
        (["compare", "nowhere", "nowhere"], "nowhere: neither a file or folder of results nor a baseline"),
        (["report", "nowhere"], "nowhere: neither bench*.jsonl nor claims.jsonl here"),
        (["list", "everything"], "unknown list 'everything'"),
        (["verify", "--op", "linear_relu", "--row", "value"], "unknown row 'value' (did you mean 'values'?)"),
        (["verify", "--op", "linear_relu", "--sample", "huge"], "unknown sample 'huge'"),
    ],
)
def test_bad_arguments_list_what_is_valid(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "mine.py").write_text("NAME = 'eager'\nimplementation = available = None")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bench.jsonl").write_text("{}")
    files = {"{broken}": "broken.py", "{named eager}": "mine.py"}
    assert cli.main([files.get(word, word) for word in arguments]) == cli.USAGE
    assert message in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["bench.jsonl"], "the last run's rows stay where they are"


@pytest.mark.parametrize(
    "option",
    [
        ["--budget", "0"], ["--budget", "-5"], ["--threads", "0"], ["--budget", "soon"], ["--threads", "5000"], ["--case", ","],
        ["--seed", "99999999999999999999999"],
    ],
)  # fmt: skip
def test_options_that_make_no_sense(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", *option])
    assert stopped.value.code == cli.USAGE
    assert f"argument {option[0]}" in capsys.readouterr().err


def test_an_exact_name_of_a_case_wins_over_parts_of_names() -> None:
    def chosen(*names: str) -> list[str]:
        arguments = [
            "run",
            "--op",
            "depthwise_conv2d",
            "--device",
            "cpu",
            *(word for name in names for word in ("--case", name)),
        ]
        return list(cli.selection(cli.parser("run").parse_args(arguments))[0].cases)

    assert chosen("8x128x56 K3") == ["depthwise_conv2d/8x128x56 K3"]
    assert len(chosen("8x128x56")) > 2


def test_termination_ends_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what `run` has started ends with it."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "do_report", lambda args: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(10)))
    assert cli.main(["report"]) == cli.INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_unexpected_error_is_no_regression(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "do_report", lambda args: {}["missing"])
    assert cli.main(["report"]) == cli.UNEXPECTED not in (cli.OK, cli.REGRESSION)
    assert "KeyError: 'missing'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ImportError("no jinja2")])
@pytest.mark.parametrize("verb", [["report"], ["verify"], ["baseline", "show"]])
def test_no_verb_ends_in_a_traceback(
    verb: list[str], error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    for name in ("do_report", "do_verify", "do_baseline"):
        monkeypatch.setattr(cli, name, fails)
    code = cli.main(verb)
    assert code == (cli.INTERRUPTED if isinstance(error, KeyboardInterrupt) else cli.USAGE)
    assert ("interrupted" if isinstance(error, KeyboardInterrupt) else str(error)) in capsys.readouterr().err


def test_every_verb_without_triton_and_gpu(tmp_path: Path) -> None:
    """In a process where `triton` cannot be imported, nor in the workers it starts."""
    (tmp_path / "triton.py").write_text("raise ImportError('planted')")
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    out = tmp_path / "results"
    lines = f"""list
verify --op linear_relu --row values --sample bias --provider dlaccel --device cpu
run --op linear_relu --case 8x8x8 --dtype fp32 --mode fwd --preset quick --device cpu --out {out}
compare {out} {out}
baseline save --out {out}
report {out}"""
    code = "import sys; from dlaccel.bench.__main__ import main; sys.exit(any([main(l.split()) for l in sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *lines.splitlines()], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        "dlaccel/triton is not in the table: triton cannot be imported",
        "2 rows in",
        "1 SAME",
        "rows saved as",
        "report.html",
    ):
        assert part in done.stdout, done.stdout + done.stderr
