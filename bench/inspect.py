"""`python -m dlaccel.bench inspect`: how good the compiled kernels are, on any GPU and without one.

For each kernel that a case starts and each target: registers, spills, shared memory, occupancy, tensor-core and vector
instructions, from the machine code (bench/compile.py), and a warning for what is known to be slow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dlaccel.bench.case import Case, families
from dlaccel.bench.compile import NoKernel, Report, compile_launches, launches

if TYPE_CHECKING:
    from dlaccel.kernels.launch import Launch

ALL_TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]
TARGETS = ("sm_90", "gfx942")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"} | {d: d for d in ("float32", "float16", "bfloat16")}


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One launch of one case on one target."""

    op: str
    case: str
    dtype: str
    launch: Launch
    report: Report

    @property
    def config(self) -> str:
        return config_of(self.launch)

    def warnings(self) -> list[str]:
        return warnings(self)

    def row(self) -> dict[str, Any]:
        """For --json: the launch and its report."""
        return {
            "op": self.op,
            "case": self.case,
            "dtype": self.dtype,
            "config": self.config,
            "grid": list(self.launch.grid),
            **asdict(self.report),
            "warps_per_sm": self.report.warps_per_sm,
            "warnings": self.warnings(),
        }


def config_of(launch: Launch) -> str:
    """The launch's block sizes and flags in one line, num_warps and num_stages last."""
    last = ("num_warps", "num_stages")
    names = [n for n in launch.options if n not in last] + [n for n in last if n in launch.options]
    return " ".join(f"{name}={launch.options[name]}" for name in names)


def warnings(found: Inspected) -> list[str]:
    """What is known to make such a kernel slow or wrong."""
    from dlaccel.kernels.config import TARGETS as DEVICES

    report, notes = found.report, []
    if report.status != "ok":
        notes.append(f"{report.status}: {report.reason}")
    if report.status == "failed":
        return notes
    wide = report.vector_loads + report.vector_stores + report.tma_loads + report.tma_stores
    if not wide and report.scalar_accesses > 8:
        notes.append(f"no 16-byte access, {report.scalar_accesses} of at most 4 bytes")
    if report.dots and not report.tensor_core_ops and found.dtype != "float32":
        notes.append("tl.dot without tensor cores")
    if report.tf32_ops and found.launch.options.get("PRECISION") == "ieee":
        notes.append("TF32 where IEEE was asked for")
    if report.warps_per_sm < 8 and not report.dots:
        notes.append(f"{report.warps_per_sm} warps an SM hide little latency")
    programs, sms = _programs(found.launch), DEVICES[report.target].sms
    if programs < sms:
        notes.append(f"{programs} programs for {sms} multiprocessors")
    return notes


def _programs(launch: Launch) -> int:
    n = 1
    for size in launch.grid:
        n *= size
    return n


# --- what to inspect ---


def inspect(
    cases: Iterable[Case], dtypes: Sequence[str], targets: Sequence[str], *, kernel: str = "", processes: int | None = None
) -> list[Inspected]:
    """Compile what the cases start: every launch of every case, in each dtype that the case has, on each target."""
    found: list[tuple[Case, str, Launch, str]] = []
    for case in cases:
        for dtype in dtypes:
            for target in targets:
                try:
                    recorded = launches(case.op, case, getattr(torch, dtype), target)
                except NoKernel:
                    continue
                found += [(case, dtype, launch, target) for launch in recorded if kernel in launch.name]
    reports = compile_launches([(launch, target) for _, _, launch, target in found], processes)
    return [
        Inspected(op=case.op, case=case.name, dtype=dtype, launch=launch, report=report)
        for (case, dtype, launch, _), report in zip(found, reports, strict=True)
    ]


def distinct(found: Iterable[Inspected]) -> list[Inspected]:
    """The first of those that are the same code: kernel, dtype, configuration and report."""
    first: dict[Any, Inspected] = {}
    for one in found:
        first.setdefault((one.op, one.dtype, one.config, one.report), one)
    return list(first.values())


# --- the command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return [word for word in text.replace(",", " ").split() if word]

    parser.add_argument("--op", type=names, default=[], metavar="OP,...", help="default: all")
    parser.add_argument("--case", type=names, default=[], metavar="NAME,...", help="cases of bench/cases, samples included")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="kernels whose name contains this")
    parser.add_argument("--target", type=names, default=list(TARGETS), metavar="T,...", help=f"of {', '.join(ALL_TARGETS)}")
    parser.add_argument("--dtype", type=names, default=["bf16", "fp32"], metavar="D,...", help="of bf16, fp16, fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    parser.add_argument("--jobs", type=int, metavar="N", help="compile in N processes (default: one a core)")


def main(args: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # nothing runs here
    known = families()
    for what, asked, valid in (("op", args.op, known), ("dtype", args.dtype, DTYPES), ("target", args.target, ALL_TARGETS)):
        for name in asked:
            if name not in valid:
                print(f"unknown {what} {name!r}; known: {', '.join(valid)}", file=sys.stderr)
                return 2
    modules = [known[op] for op in args.op or known]
    cases = [case for module in modules for case in module.CASES if "cuda" in case.devices]
    if args.case:
        cases = [case for module in modules for case in (*module.CASES, *module.SAMPLES) if case.name in args.case]
    found = inspect(cases, [DTYPES[d] for d in args.dtype], args.target, kernel=args.kernel, processes=args.jobs)
    if args.json:
        args.json.write_text("".join(json.dumps(one.row()) + "\n" for one in found))
    print(table(distinct(found)))
    return 0 if all(one.report.status == "ok" for one in found) else 1


_COLUMNS = {
    "regs": "registers", "spills": "spills", "stack": "stack_bytes", "shared": "shared_bytes", "warps/SM": "warps_per_sm",
    "tensor": "tensor_core_ops", "ld16": "vector_loads", "st16": "vector_stores", "8 B": "half_vector_accesses",
    "<=4 B": "scalar_accesses", "instr": "instructions",
}  # fmt: skip


def table(found: Sequence[Inspected]) -> str:
    """A line for each kernel, and its configuration and warnings below it."""
    lines = [
        "  ".join(["kernel".ljust(28), "dtype".ljust(8), "target".ljust(7), *[name.rjust(8) for name in [*_COLUMNS, "TMA"]]])
    ]
    for one in found:
        report = one.report
        cells = [str(getattr(report, field)) for field in _COLUMNS.values()] + [f"{report.tma_loads}+{report.tma_stores}"]
        lines.append(
            "  ".join([report.kernel.ljust(28), one.dtype.ljust(8), report.target.ljust(7), *[c.rjust(8) for c in cells]])
        )
        lines.append(f"    {one.op}/{one.case}: {one.config}")
        lines += [f"    ! {note}" for note in one.warnings()]
    return "\n".join(lines)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m dlaccel.bench.inspect", description=__doc__)
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
