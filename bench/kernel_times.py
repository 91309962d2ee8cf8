"""What each kernel of dlaccel takes on this GPU, beside what the model predicted (bench/results/predicted).

    python -m dlaccel.bench.kernel_times --out bench/results/h100 [--op OP]

Runs a forward and backward pass of every case that has predictions for this GPU under torch's profiler, after a flush of the
L2 cache, and appends a row for each launch of a kernel to kernels.jsonl. The ops take turns, so that it may be ended at any
time. What this commit has measured is not measured again. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

from dlaccel.backend import use_backend
from dlaccel.bench import model, results
from dlaccel.bench.case import Case, families, implementation, normal
from dlaccel.bench.timing import gpu_is_lost, percentile
from dlaccel.bench.worker import set_precision

ROUNDS = 20
FILE = "kernels.jsonl"
Called = tuple[str, str, str]  # op, case, dtype
Launch = tuple[str, str, str, str, int]  # and kernel, which of its launches in a call


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One launch of one kernel in a forward and backward pass."""

    op: str
    case: str
    dtype: str
    kernel: str
    nth: int
    samples_ms: list[float]
    median_ms: float
    gpu: str
    provider: str = "dlaccel"  # as in Row: what was measured keeps its prediction (model.write_predictions)
    driver: str = ""
    torch: str = ""
    triton: str = ""
    git_sha: str = ""
    git_dirty: bool = False
    time_utc: str = ""

    @property
    def launch(self) -> Launch:
        return (self.op, self.case, self.dtype, self.kernel, self.nth)


@dataclass(frozen=True)
class Pair:
    """A kernel's predicted and measured time."""

    measured: KernelTime
    predicted_ms: float
    bound: str  # memory, math or issue, by the model

    @property
    def factor(self) -> float:
        return self.measured.median_ms / self.predicted_ms


def predictions(gpu: str, folder: Path = model.PREDICTED) -> dict[Launch, dict[str, Any]]:
    """The committed predictions for a GPU named as torch names it."""
    name = next((name for name in model.GPUS if name in gpu), None)
    path = folder / f"{name}.jsonl"
    found: dict[Launch, dict[str, Any]] = {}
    times: Counter[tuple[str, ...]] = Counter()
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        key = (row["op"], row["case"], row["dtype"], row["kernel"])
        found[*key, times[key]] = row
        times[key] += 1
    return found


def pairs(measured: Iterable[KernelTime], folder: Path = model.PREDICTED) -> list[Pair]:
    """The measured kernels that have a prediction, worst predicted first."""
    measured = list(measured)
    predicted = {gpu: predictions(gpu, folder) for gpu in {one.gpu for one in measured}}
    found = [
        Pair(one, row["predicted_us"] / 1e3, row["bound"])
        for one in measured
        if one.median_ms > 0 and (row := predicted[one.gpu].get(one.launch)) is not None
    ]
    return sorted(found, key=lambda pair: -abs(math.log(pair.factor)))


def means(found: Iterable[Pair]) -> list[tuple[str, str, float, int]]:
    """(GPU, op, geometric mean of measured over predicted, number of kernels)."""
    groups: dict[tuple[str, str], list[float]] = {}
    for pair in found:
        groups.setdefault((pair.measured.gpu, pair.measured.op), []).append(math.log(pair.factor))
    return [(*key, math.exp(statistics.fmean(logs)), len(logs)) for key, logs in sorted(groups.items())]


HEADERS = ("op/case", "dtype", "kernel", "predicted us", "measured us", "p20-p80", "measured/predicted", "bound by")


def cells(pair: Pair) -> tuple[str, ...]:
    one = pair.measured
    low, high = (1e3 * percentile(one.samples_ms, p) for p in (20, 80))
    kernel = one.kernel + (f", launch {one.nth + 1}" if one.nth else "")
    return (
        f"{one.op}/{one.case}", one.dtype, kernel,
        f"{1e3 * pair.predicted_ms:.4g}", f"{1e3 * one.median_ms:.4g}", f"{low:.4g}-{high:.4g}", f"{pair.factor:.2f}",
        pair.bound,
    )  # fmt: skip


def read(path: Path) -> tuple[list[KernelTime], list[str]]:
    """The rows of a file, the newest of each launch and GPU, and one sentence for each line that could not be read."""
    rows: dict[Any, KernelTime] = {}
    problems = []
    known = {field.name for field in fields(KernelTime)}
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else (), start=1):
        try:
            row = KernelTime(**{name: value for name, value in json.loads(line).items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{path}:{number}: not a kernel's time ({error})")
        else:
            rows[row.gpu, row.launch] = row
    return list(rows.values()), problems


# ---- measuring ------------------------------------------------------------------------------------------------------


def by_launch(events: Iterable[tuple[str, float, float]], kernels: set[str], calls: int) -> dict[tuple[str, int], list[float]]:
    """Durations by (kernel, which of its launches in a call), of events (name, start, duration) of that many equal calls."""
    durations: dict[str, list[float]] = {}
    for name, _, duration in sorted(events, key=lambda event: event[1]):
        if name in kernels:
            durations.setdefault(name, []).append(duration)
    found: dict[tuple[str, int], list[float]] = {}
    for name, of_kernel in durations.items():
        launches, rest = divmod(len(of_kernel), calls)
        if rest:
            raise RuntimeError(f"{name}: {len(of_kernel)} launches in {calls} calls")
        found |= {(name, nth): of_kernel[nth::launches] for nth in range(launches)}
    return found


def profiled(call: Callable[[], object], rounds: int) -> list[tuple[str, float, float]]:
    """What the GPU did in that many calls, each with a cold L2 cache: (name, start, duration), in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    flush = torch.empty(max(1 << 26, 2 * torch.cuda.get_device_properties().L2_cache_size), dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(rounds):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    events: Any = recorded.events()
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    return [(event.name, event.time_range.start, event.time_range.elapsed_us()) for event in on_gpu]


def training_step(case: Case, dtype: torch.dtype) -> Callable[[], object]:
    """A forward pass and all gradients, on Triton kernels."""
    tensors = case.inputs(dtype, "cuda")
    wanted = [t for t in tensors if t.requires_grad]
    function = implementation(case.op)

    def call() -> object:
        with use_backend("triton"):
            y = case.call(function, *tensors)
            return torch.autograd.grad(y, wanted, dy, allow_unused=True)

    with torch.no_grad(), use_backend("triton"):
        y = case.call(function, *tensors)
    dy = normal(tuple(y.shape), torch.Generator("cuda").manual_seed(1), y.dtype)
    dy = torch.empty_like(y).copy_(dy)  # in the layout of y
    return call


def in_turns(todo: Iterable[Called]) -> list[Called]:
    """Each op's first case in every dtype, then each op's second, ..."""
    place: dict[tuple[str, str], int] = {}
    count: Counter[str] = Counter()
    for op, case, _ in todo:
        if (op, case) not in place:
            place[op, case] = count[op]
            count[op] += 1
    return sorted(todo, key=lambda called: place[called[:2]])


def measure(
    predicted: dict[Launch, dict[str, Any]],
    path: Path,
    ops: Sequence[str],
    environment: dict[str, Any],
    skip: Iterable[str] = (),
) -> tuple[int, list[str], str | None]:
    """Appends what is missing to `path`, but the cases in `skip`. A case that fails leaves the others.

    (Number of new rows, what went wrong, the case after which this process cannot use the GPU any more.)
    """
    have = {one.launch[:3] for one in read(path)[0] if (one.git_sha, one.gpu) == (environment["git_sha"], environment["gpu"])}
    todo: dict[Called, set[str]] = {}
    for op, case, dtype, kernel, _ in predicted:
        if op in ops and (op, case, dtype) not in have:
            todo.setdefault((op, case, dtype), set()).add(kernel)
    count, problems = 0, []
    given = {field.name: environment[field.name] for field in fields(KernelTime) if field.name in environment}
    with results.Writer(path) as file:
        for number, (op, name, dtype) in enumerate(in_turns(todo), start=1):
            if (called := f"{op}/{name} {dtype}") in skip:
                continue
            print(f"[{number}/{len(todo)}] {called}", file=sys.stderr)
            try:
                case = next(case for case in families()[op].CASES if case.name == name)
                times = by_launch(profiled(training_step(case, getattr(torch, dtype)), ROUNDS), todo[op, name, dtype], ROUNDS)
            except Exception as error:
                problems.append(" ".join(f"{called}: {type(error).__name__}: {error}".split())[:300])
                if gpu_is_lost():
                    return count, problems, called
                continue
            for (kernel, nth), us in times.items():
                ms = [round(t / 1e3, 6) for t in us]
                row = KernelTime(op=op, case=name, dtype=dtype, kernel=kernel, nth=nth, samples_ms=ms,
                                 median_ms=statistics.median(ms), time_utc=results.now(), **given)  # fmt: skip
                file.write(asdict(row))
                count += 1
    return count, problems, None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dlaccel.bench.kernel_times", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--op", action="append", choices=list(families()), help="default: all; repeatable")
    parser.add_argument("--skip", action="append", default=[], metavar="'OP/CASE DTYPE'", help="leave this one out; repeatable")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; kernels are timed on a GPU only", file=sys.stderr)
        return 2
    set_precision("ieee")
    environment = results.provenance("cuda", threads=0, clock="", precision="ieee", seed=0)
    path = args.out / FILE
    if not (predicted := predictions(environment["gpu"])):
        known = ", ".join(model.GPUS)
        print(f"bench/results/predicted has nothing for {environment['gpu']}, only for {known}", file=sys.stderr)
        return 2
    count, problems, broke = measure(predicted, path, args.op or list(families()), environment, args.skip)
    for line in problems:
        print(line, file=sys.stderr)
    if broke is not None:
        words = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, "-m", "dlaccel.bench.kernel_times", *words, "--skip", broke])
    for gpu, op, mean, n in means(pairs(read(path)[0])):
        print(f"{gpu}, {op}: measured {mean:.2f} x predicted, geometric mean over {n} kernels")
    print(f"{count} rows new in {path}")
    return 1 if problems or args.skip else 0


if __name__ == "__main__":
    sys.exit(main())
