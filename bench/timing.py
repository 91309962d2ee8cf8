"""How long a call takes, against eager in the same rounds.

In each round every implementation runs once on the same freshly written inputs, in random order, and eager a second time as
the control. So sample i of an implementation has a sample of eager taken next to it, under the same load, and their ratio means
something even where neither time does. The ratio of a repeat is the median of its paired ratios; a row has three repeats, each
in a process of its own, because what a process happens to get (addresses, pages, cores) is the same for all its pairs. The
median of the three counts. On a GPU one process makes them all.

On the CPU a quiet machine is timed with all its cores by the wall clock, a busy one with one thread by its CPU time. That is
read from the clock of the whole process: work that an implementation hands to another thread counts.
On a GPU, CUDA events around each call, after a flush of the L2 cache that also gives the device work while the host enqueues
the call. (The GPU path has not yet been run on a GPU.)
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dlaccel.bench.gate import Outputs, Step, Values

REPEATS = 3  # processes of a row
QUIET_LOAD = 0.7
MAX_ROUNDS = 200
GRAPH_BELOW_MS = 0.05

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"thread": time.process_time, "wall": time.perf_counter}


def clock_and_threads(device: str) -> tuple[str, int]:
    """How this machine is to be timed now."""
    if device == "cuda":
        return "cuda", torch.get_num_threads()
    return ("wall", torch.get_num_threads()) if os.getloadavg()[0] < QUIET_LOAD else ("thread", 1)


def processes(device: str) -> int:
    """In which a row is measured. One on a GPU, where starting another takes seconds of an expensive machine."""
    return 1 if device == "cuda" else REPEATS


@dataclass(frozen=True)
class Effort:
    """How long to measure: each of the three repeats takes at least `seconds` and `rounds`."""

    seconds: float
    rounds: int


@dataclass
class Sample:
    """What the timed loop found for one implementation, in seconds."""

    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    kept: list[tuple[int, Outputs]] = field(default_factory=list)  # (index of the inputs, outputs) of the last rounds


class Stopwatch:
    """Times one call by a clock of the host, less what timing a call that does nothing takes."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.overhead = 0.0
        self.overhead = statistics.median(self.time(_nothing) for _ in range(201))

    def time(self, call: Callable[[], None]) -> float:
        start = self.clock()
        call()
        return max(0.0, self.clock() - start - self.overhead)

    def host_time(self) -> float:
        """Host time of the last call, where it differs from the call's time."""
        return 0.0


class CudaStopwatch(Stopwatch):
    """Times one call by CUDA events, with a cold L2 cache. Not yet run on a GPU."""

    def __init__(self) -> None:
        # Twice the cache, so that nothing of the inputs survives.
        size = 2 * torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(max(size, 1 << 26), dtype=torch.uint8, device="cuda")
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._host = 0.0
        super().__init__(time.perf_counter)

    def time(self, call: Callable[[], None]) -> float:
        # While the device flushes, the host enqueues the call: repeat the flush until it lasts longer than the last call's
        # host time (64 MiB take at least 15 us), or the gap between launches would be timed as well.
        torch.cuda.synchronize()
        for _ in range(1 + min(64, int(self._host / 15e-6))):
            self._flush.zero_()
        self._start.record()
        begin = self.clock()
        call()
        self._host = self.clock() - begin
        self._stop.record()
        torch.cuda.synchronize()  # the whole device: a provider may have used a stream of its own
        return max(0.0, float(self._start.elapsed_time(self._stop)) / 1e3 - self.overhead)

    def host_time(self) -> float:
        return self._host


def _nothing() -> None:
    pass


def stopwatch(clock: str) -> Stopwatch:
    return CudaStopwatch() if clock == "cuda" else Stopwatch(CLOCKS[clock])


def interleave(steps: Mapping[str, Step], values: Sequence[Values], watch: Stopwatch, effort: Effort) -> dict[str, Sample]:
    """Times all of `steps` in common rounds: one repeat."""
    samples = {name: Sample() for name in steps}
    names = list(steps)
    grad = steps[names[0]].mode != "fwd"
    order = random.Random(0)  # so that none always finds the caches as the same other has left them

    def one_round(index: int, keep: bool) -> None:
        which = index % len(values)
        for name in order.sample(names, len(names)):
            step, sample = steps[name], samples[name]
            step.load(values[which])
            with step.context():
                step.prepare()
                sample.times.append(watch.time(step.run))
            sample.host.append(watch.host_time())
            if keep:
                sample.kept.append((which, {key: t.clone() for key, t in step.outputs().items()}))
            step.release()  # so that the next one writes to the same memory: pages differ by some percent

    with torch.set_grad_enabled(grad), _no_garbage_collection():
        for index in range(2):  # warm up
            begin = time.perf_counter()
            one_round(index, keep=False)
            seconds = time.perf_counter() - begin
        samples |= {name: Sample() for name in names}
        rounds = min(MAX_ROUNDS, max(effort.rounds, int(effort.seconds / max(seconds, 1e-6))))
        for index in range(rounds):
            one_round(index, keep=index >= rounds - len(values))
    return samples


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def ratios(eager_ms: Sequence[float], other_ms: Sequence[float]) -> list[float]:
    """How many times as fast as eager, by pairs: above 1 is faster."""
    return [max(e, 1e-6) / max(o, 1e-6) for e, o in zip(eager_ms, other_ms, strict=True)]


def percentile(samples: Sequence[float], percent: float) -> float:
    """With linear interpolation between samples."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def gpu_is_lost() -> bool:
    """After an illegal access every CUDA call of a process fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def peak_memory(step: Step, values: Values) -> int | None:
    """The most memory that the timed part of one call holds at a time beyond what was there before it, in bytes."""
    step.load(values)
    with torch.set_grad_enabled(step.mode != "fwd"), step.context():
        step.prepare()
        if step.tensors[0].is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step.run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step.run()
    results = recorded.profiler and recorded.profiler.kineto_results
    if results is None:
        return None
    live = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def graph_ms(step: Step, values: Values, replays: int = 100) -> float | None:
    """Milliseconds of one replay from a CUDA graph, warm cache, or None if the call cannot be captured.

    After a capture that failed the allocator and the generator of the process may be of no use. Not yet run on a GPU.
    """
    step.load(values)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    grad = torch.set_grad_enabled(step.mode != "fwd")
    try:
        # One stream for all: autograd runs a node on the stream of its forward. torch.cuda.graph leaves it current when a
        # capture fails; the outer context does not. A kernel finalised inside a capture breaks it.
        with grad, step.context(), _no_garbage_collection(), torch.cuda.stream(stream):
            for _ in range(3):
                step.prepare()
                step.run()
            step.prepare()
            with torch.cuda.graph(graph, stream=stream):
                step.run()
    except RuntimeError:
        return None
    torch.cuda.current_stream().wait_stream(stream)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / replays
