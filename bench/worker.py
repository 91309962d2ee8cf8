"""Measures one case: gate, timing, rows. `python -m dlaccel.bench.worker` does it in a process of its own.

The process reads a job as JSON from standard input and writes its answers to standard output, one JSON object a line: a row, or
for a job of ceilings the ceilings. A fresh process for each case and allocator, because malloc's settings are read at start,
and because one case that crashes, runs out of memory or breaks the GPU must not take the others with it. `merge` makes one row
of what several processes measured, `judge` sets it against the machine's ceilings.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dlaccel.bench import ceilings, gate, timing
from dlaccel.bench.case import Case, families
from dlaccel.bench.ceilings import Ceilings
from dlaccel.bench.provider import NOT_HERE, Provider, Unavailable, load
from dlaccel.bench.results import Row, now

CONTROL = "control"  # eager's second place in each round


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is asked for."""

    op: str = ""  # empty: measure the ceilings
    case: str = ""
    wanted: list[tuple[str, str, str]] = field(default_factory=list)  # (dtype, mode, provider)
    environment: dict[str, Any] = field(default_factory=dict)  # results.provenance
    allocator: str = "default"
    seconds: float = 0.1
    rounds: int = 5
    deadline: float | None = None  # time.time() after which nothing new is begun
    checked: bool = False  # another process has checked all that is wanted on the same inputs: time it only

    @staticmethod
    def from_json(text: str) -> Job:
        values = json.loads(text)
        return Job(**{**values, "wanted": [tuple(w) for w in values.get("wanted", ())]})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def find_case(op: str, name: str) -> Case:
    cases: list[Case] = families()[op].CASES
    return next(case for case in cases if case.name == name)


def rows(job: Job, case: Case, eager: Any, reference: Any, providers: Mapping[str, Provider]) -> Iterator[Row]:
    """Every row the job asks for, in groups of one dtype and mode."""
    watch = timing.stopwatch(job.environment["clock"])
    groups: dict[tuple[str, str], list[Provider]] = {}
    for dtype, mode, provider in job.wanted:
        groups.setdefault((dtype, mode), []).append(providers[provider])
    values: dict[str, list[gate.Values]] = {}
    short: list[tuple[Row, gate.Step, gate.Values]] = []
    for (dtype, mode), chosen in groups.items():
        if job.deadline is not None and time.time() > job.deadline:
            return
        base = _row(job, case, dtype, mode)
        if dtype not in values:
            values.clear()  # one dtype's at a time: these are large
            seeds = (job.environment["seed"], job.environment["seed"] + 1)
            try:
                values[dtype] = [_values(job, case, dtype, seed, eager, reference) for seed in seeds]
            except Exception as error:  # no provider's fault
                reason = f"eager or reference: {_failure(error)[1]}"
                yield from (replace(base, provider=p.name, status="refused", reason=reason) for p in chosen)
                continue
        try:
            yield from _group(job, base, case, mode, eager, chosen, values[dtype], watch, short)
        except Exception as error:
            status, reason = _failure(error)
            yield from (replace(base, provider=p.name, status=status, reason=f"in the timed loop, {reason}") for p in chosen)
    for row, step, inputs in short:  # last, and only to the first capture that fails: what runs after one may fail as well
        ms = timing.graph_ms(step, inputs)
        if ms is None:
            return
        yield replace(row, graph_ms=ms)


def _values(job: Job, case: Case, dtype: str, seed: int, eager: Any, reference: Any) -> gate.Values:
    kind, device = getattr(torch, dtype), job.environment["device"]
    if job.checked:
        return gate.Values(*gate.drawn(case, kind, device, seed, eager), eager={}, exact={})
    return gate.values_of(case, kind, device, seed, eager=eager, reference=reference)


def _row(job: Job, case: Case, dtype: str, mode: str) -> Row:
    itemsize = getattr(torch, dtype).itemsize
    return Row(
        op=case.op, case=case.name, mode=mode, dtype=dtype, provider="", status="unavailable", layout=case.layout,
        shape=dict(case.shape), tags=sorted(case.tags), eager_form=case.eager_form, allocator=job.allocator,
        bytes=case.bytes(mode, itemsize) if case.bytes else None, flops=case.flops(mode, itemsize) if case.flops else None,
        load=round(os.getloadavg()[0], 2), time_utc=now(), **job.environment,
    )  # fmt: skip


def _group(
    job: Job,
    base: Row,
    case: Case,
    mode: str,
    eager: Any,
    providers: Sequence[Provider],
    values: list[gate.Values],
    watch: timing.Stopwatch,
    short: list[tuple[Row, gate.Step, gate.Values]],
) -> Iterator[Row]:
    """The rows of one dtype and mode: all providers are timed in the same rounds. Adds to `short` what a graph is to replay."""
    tensors = tuple(gate.copy(t) for t in values[0].tensors)
    dy = gate.copy(values[0].dy)
    steps = {name: gate.Step(case, eager, mode, tensors, dy) for name in ("eager", CONTROL)}
    first_call: dict[str, float] = {}
    for p in providers:
        row = replace(base, provider=p.name, provider_version=p.version)
        if reason := p.available():
            yield replace(row, reason=NOT_HERE + reason)
            continue
        if reason := p.unsupported(mode, base.dtype, base.device):
            yield replace(row, reason=reason)
            continue
        try:
            step = gate.Step(case, p.implementation(case), mode, tensors, dy, p.context)
            begin = time.perf_counter()
            wrong = None if job.checked else gate.check(step, values[0], may_overwrite=p.may_overwrite(case.op))
            first_call[p.name] = time.perf_counter() - begin
            wrong = wrong or (None if job.checked else gate.check(step, values[1], may_overwrite=p.may_overwrite(case.op)))
        except Unavailable as reason:
            yield replace(row, reason=str(reason))
        except Exception as error:
            status, text = _failure(error)
            yield replace(row, status=status, reason=text)
        else:
            if wrong:
                yield replace(row, status="failed", reason=wrong)
            elif p.name != "eager":
                steps[p.name] = step
    timed = [p for p in providers if p.name in steps and p.name in first_call]
    if not timed:
        return

    samples = timing.interleave(steps, values, watch, timing.Effort(job.seconds, job.rounds))
    times = {name: [round(1e3 * t, 6) for t in sample.times] for name, sample in samples.items()}
    control = timing.ratios(times["eager"], times[CONTROL])
    eager_error = max(gate.errors(v.eager, v) for v in values)
    eager_memory = None if job.checked else timing.peak_memory(steps["eager"], values[0])
    for p in timed:
        # Eager's own row shows its control against it.
        name, step = CONTROL if p.name == "eager" else p.name, steps[p.name]
        sample, ms = samples[name], times[name]
        row = replace(base, provider=p.name, provider_version=p.version, backend=p.backend(case, tensors))
        kept = [] if job.checked else sample.kept
        if wrong := next((w for i, out in kept if (w := gate.compare(out, values[i]))), None):
            yield replace(row, status="failed", reason=f"in the timed loop, {wrong}")
            continue
        median = statistics.median(ms)
        whole = merge([
            replace(
                row, status="passed", reason="overwrites its input, as documented" if p.may_overwrite(case.op) else "",
                samples_ms=ms, eager_samples_ms=times["eager"], median_ms=median,
                ratio=1.0, repeat_ratios=[statistics.median(timing.ratios(times["eager"], ms))],
                control_p20=timing.percentile(control, 20), control_p80=timing.percentile(control, 80),
                first_call_s=round(first_call[p.name], 3),
                host_us=1e6 * statistics.median(sample.host) if base.device == "cuda" else None,
                peak_memory_bytes=None if job.checked else timing.peak_memory(step, values[0]),
                eager_peak_memory_bytes=eager_memory,
                error_vs_fp64=max((gate.errors(out, values[i]) for i, out in kept), default=None),
                eager_error_vs_fp64=eager_error,
                working_set=sum(t.numel() * t.element_size() for t in (*tensors, dy)),
            )
        ])  # fmt: skip
        if base.device == "cuda" and median < timing.GRAPH_BELOW_MS:
            short.append((whole, step, values[0]))
        yield whole


def merge(parts: Sequence[Row]) -> Row:
    """One row of what several processes measured of the same thing, the first of which checked it; if one failed, that."""
    if bad := [part for part in parts if not part.timed]:
        return bad[0]
    samples, eager_samples = ([t for part in parts for t in getattr(part, f)] for f in ("samples_ms", "eager_samples_ms"))
    paired, repeats = timing.ratios(eager_samples, samples), [r for part in parts for r in part.repeat_ratios]

    def middle(name: str) -> float | None:
        known = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        return statistics.median(known) if known else None

    return replace(
        parts[0], processes=len(parts), samples_ms=samples, eager_samples_ms=eager_samples,
        median_ms=statistics.median(samples), p20_ms=timing.percentile(samples, 20), p80_ms=timing.percentile(samples, 80),
        ratio=statistics.median(repeats), repeat_ratios=repeats,
        ratio_p20=timing.percentile(paired, 20), ratio_p80=timing.percentile(paired, 80),
        control_p20=middle("control_p20"), control_p80=middle("control_p80"),
        host_us=middle("host_us"), graph_ms=middle("graph_ms"),
    )  # fmt: skip


def judge(row: Row, roof: Ceilings) -> Row:
    """Fills in rates, and marks or refuses what is faster than the machine."""
    assert row.median_ms is not None and row.working_set is not None
    ms = max(row.median_ms, 1e-6)
    floor = roof.floor_ms(row.dtype, row.bytes, row.flops, row.working_set)
    row = replace(
        row,
        gbps=row.bytes / ms / 1e6 if row.bytes else None,
        tflops=row.flops / ms / 1e9 if row.flops else None,
        ceiling_gbps=roof.bandwidth(row.working_set),
        ceiling_tflops=roof.gflops[row.dtype] / 1e3 if row.dtype in roof.gflops else None,
        pct_of_floor=100 * floor / ms if floor else None,
    )
    if floor is None or floor <= ceilings.SUSPECT * ms:
        return row
    reason = f"{floor / ms:.2f} x the measured ceiling of this machine"
    if floor <= ceilings.REFUSED * ms:
        return replace(row, status="suspect", reason=reason)
    return row.untimed("refused", reason)


def _failure(error: Exception) -> tuple[str, str]:
    """(status, reason) of an exception."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    return ("refused", f"out of memory ({text})") if memory else ("failed", text)


def set_precision(precision: str) -> None:
    """Float32 products of every library: "ieee", or "tf32"."""
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = precision
    backends.cudnn.conv.fp32_precision = precision


def main() -> None:
    # Whatever a library prints goes to standard error: the answers have standard output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.read())
    torch.set_num_threads(job.environment["threads"])
    set_precision(job.environment["precision"])
    if not job.op:
        watch = timing.stopwatch(job.environment["clock"])
        print(json.dumps(ceilings.measure(job.environment["device"], watch).to_json()), file=answers)
        return
    family = families()[job.op]
    providers = {name: load(name) for name in {w[2] for w in job.wanted}}
    for row in rows(job, find_case(job.op, job.case), family.eager, family.reference, providers):
        print(json.dumps(asdict(row)), file=answers, flush=True)


if __name__ == "__main__":
    main()
