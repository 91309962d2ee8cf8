"""`python -m dlaccel.bench inspect`: how good the compiled kernels are, on any GPU and without one.

For each kernel that a case starts and each target: registers, spills, shared memory, occupancy, tensor-core and vector
instructions, from the machine code (bench/compile.py), the time a model predicts (bench/model.py), and a warning for what is
known to be slow. docs/kernels.md explains how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from inspect import Parameter
from inspect import signature as parameters_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dlaccel.bench import model
from dlaccel.bench.case import Case, families
from dlaccel.bench.compile import NoKernel, Report, compile_launches, identity, jit_function, launches, load_file
from dlaccel.bench.options import DTYPES, UsageError, add_lists, choose, named, words

if TYPE_CHECKING:
    from dlaccel.kernels.config import Choice, Config
    from dlaccel.kernels.launch import Launch

ALL_TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]
TARGETS = ["sm_90", "gfx942"]
PER_KERNEL = 2  # without --full: so many different codes of a kernel, dtype and target
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One launch of one case on one target."""

    op: str
    case: str
    dtype: str
    launch: Launch
    report: Report
    chosen: bool = True  # the configuration that config.py picks; else another candidate

    @property
    def config(self) -> str:
        return config_of(self.launch)

    def predictions(self) -> dict[str, model.Prediction]:
        """By GPU, for the GPUs of this target that the model knows."""
        if self.report.status == "failed" or not self.launch.grid:
            return {}
        fitting = [gpu for gpu in model.GPUS.values() if gpu.target == self.report.target]
        return {gpu.name: model.predict(self.launch, self.report, self.dtype, gpu) for gpu in fitting}

    def warnings(self) -> list[str]:
        """What is known to make such a kernel slow or wrong."""
        from dlaccel.kernels.config import TARGETS as DEVICES

        report, notes = self.report, []
        if report.status != "ok":
            notes.append(f"{report.status}: {report.reason}")
        if report.status == "failed":
            return notes
        wide = report.vector_loads + report.vector_stores + report.tma_loads + report.tma_stores
        if not wide and report.scalar_accesses > 8:
            notes.append(f"no 16-byte access, {report.scalar_accesses} of at most 4 bytes")
        if report.dots and not report.tensor_core_ops and self.dtype != "float32":
            notes.append("tl.dot without tensor cores")
        if report.tf32_ops and self.launch.options.get("PRECISION") == "ieee":
            notes.append("TF32 where IEEE was asked for")
        if report.atomics:
            notes.append(f"{report.atomics} atomics")
        if report.warps_per_sm < 8 and not report.dots:
            notes.append(f"{report.warps_per_sm} warps an SM hide little latency")
        programs, sms = math.prod(self.launch.grid), DEVICES[report.target].sms
        if self.launch.grid and programs < sms:
            notes.append(f"{programs} programs for {sms} multiprocessors")
        for gpu, p in self.predictions().items():
            if p.bound == "issue" and (p.issue_us or 0) > max(1.2 * p.memory_us, model.START_US):
                notes.append(f"bound by instructions on an {gpu}: {p.issue_us:.1f} us, memory {p.memory_us:.1f} us")
        return notes

    def row(self) -> dict[str, Any]:
        """For --json: the launch and its report."""
        predictions = self.predictions()
        return {
            "op": self.op, "case": self.case, "dtype": self.dtype, "config": self.config, "chosen": self.chosen,
            "grid": list(self.launch.grid), **asdict(self.report), "warps_per_sm": self.report.warps_per_sm,
            "predicted_us": next((round(p.us, 2) for p in predictions.values()), None),
            "predicted": {gpu: asdict(p) for gpu, p in predictions.items()},
            "warnings": self.warnings(),
        }  # fmt: skip


def config_of(launch: Launch) -> str:
    """The launch's block sizes and flags in one line, num_warps and num_stages last."""
    last = ("num_warps", "num_stages")
    names = [n for n in launch.options if n not in last] + [n for n in last if n in launch.options]
    return " ".join(f"{name}={launch.options[name]}" for name in names if not isinstance(launch.options[name], torch.Tensor))


# --- what to inspect ---


@dataclass(frozen=True)
class Selection:
    """What to compile: every launch of these cases in these dtypes on these targets."""

    cases: Sequence[Case]
    dtypes: Sequence[str] = ("bfloat16", "float32")
    targets: Sequence[str] = tuple(TARGETS)
    kernels: Sequence[str] = ()  # kernels whose name contains one of these; none: all
    per_kernel: int | None = None  # at most so many different codes of a kernel, dtype and target: those of the first cases
    candidates: bool = False  # also the other configurations worth measuring
    override: Config | None = None  # instead of the chosen blocks of these names

    def launches(self) -> Iterator[tuple[Case, str, Launch, str, bool]]:
        """(case, dtype, launch, target, whether the configuration is the chosen one)."""
        seen: dict[tuple[str, str, str], set[str]] = {}
        for dtype in self.dtypes:
            for target in self.targets:
                for case in self.cases:
                    for launch, chosen in self._of(case, dtype, target):
                        codes = seen.setdefault((launch.name, dtype, target), set())
                        code = identity(launch, target)
                        if chosen and self.per_kernel is not None and len(codes) >= self.per_kernel and code not in codes:
                            continue
                        codes.add(code)
                        yield case, dtype, launch, target, chosen

    def _of(self, case: Case, dtype: str, target: str) -> Iterator[tuple[Launch, bool]]:
        from dlaccel.kernels import config

        def record() -> list[Launch]:
            recorded = launches(case.op, case, getattr(torch, dtype), target)
            return [x for x in recorded if not self.kernels or any(part in x.name for part in self.kernels)]

        try:
            with config.consulting() as consulted:
                chosen = record()
        except NoKernel:
            return
        asked = {(choice.name, of, sizes): (choice, where, of, sizes) for choice, where, of, sizes in consulted}
        if self.override is not None:
            with contextlib.ExitStack() as stack:
                for choice, where, of, sizes in asked.values():
                    stack.enter_context(_overridden(choice, choice.static(where, of, *sizes), self.override))
                chosen = record()
        yield from ((launch, True) for launch in chosen)
        if self.candidates:
            known = {(launch.name, config_of(launch)) for launch in chosen}
            for choice, where, of, sizes in asked.values():
                for candidate in choice.alternatives(where, of, *sizes)[1:]:
                    with choice.using(candidate):
                        others = [x for x in record() if (x.name, config_of(x)) not in known]
                    known |= {(launch.name, config_of(launch)) for launch in others}
                    yield from ((launch, False) for launch in others)


def _overridden(choice: Choice, config: Config, override: Config) -> contextlib.AbstractContextManager[None]:
    changes = {name: value for name, value in override.items() if name in config or name in ("num_warps", "num_stages")}
    return choice.using(config | changes) if changes.keys() & config.keys() else contextlib.nullcontext()


def inspect(selection: Selection, processes: int | None = None, *, keep: bool = False) -> list[Inspected]:
    """Compile what is selected and read it. keep: leave it in Triton's own cache."""
    found = list(selection.launches())
    reports = compile_launches([(launch, target) for _, _, launch, target, _ in found], processes, keep=keep)
    return [
        Inspected(op=case.op, case=case.name, dtype=dtype, launch=launch, report=report, chosen=chosen)
        for (case, dtype, launch, _, chosen), report in zip(found, reports, strict=True)
    ]


def distinct(found: Iterable[Inspected]) -> list[Inspected]:
    """The first of those that are the same code: kernel, dtype, configuration and report."""
    first: dict[Any, Inspected] = {}
    for one in found:
        first.setdefault((one.op, one.dtype, one.config, one.report), one)
    return list(first.values())


def gpu_cases(op: str) -> list[Case]:
    """The cases timed on GPUs: those only they are timed on first, then goals."""
    cases = [case for case in families()[op].CASES if "cuda" in case.devices and "overhead" not in case.tags]
    return sorted(cases, key=lambda case: ("cpu" in case.devices, "goal" not in case.tags))


# --- a kernel of the user's own ---


def own_kernel(
    where: str, signature: str, options: Config, targets: Sequence[str], processes: int | None = None
) -> list[Inspected]:
    """Inspect a @triton.jit function of any file; of an autotuned one, each configuration.

    where: path/to/file.py:function. signature: its arguments in order, as for triton's own tools/compile.py: a type such as
    *bf16, i32 or fp32, with :16 where a pointer is aligned or an integer divisible; or a value. options: the arguments that
    the signature leaves out by name, num_warps, num_stages. Raises UsageError.
    """
    from dlaccel.kernels.launch import Launch

    path, _, name = where.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"{path or where}: no such file (expected path/to/file.py:function)")
    try:
        file = load_file(path)
    except Exception as error:
        raise UsageError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    kernels = [n for n, value in vars(file).items() if hasattr(value, "arg_names")]
    choose(f"@triton.jit function of {path}", [name], kernels)
    found = getattr(file, name)
    kernel, configs = jit_function(found), [c.all_kwargs() for c in getattr(found, "configs", [])] or [{}]
    parameters, types = list(parameters_of(kernel.fn).parameters.values()), words(signature)
    if len(types) > len(parameters):
        raise UsageError(f"--signature: {name} takes {len(parameters)} arguments ({', '.join(kernel.arg_names)}), got more")
    values = {p.name: _argument(p, word) for p, word in zip(parameters, types, strict=False)} | options
    absent = [p.name for p in parameters if p.default is p.empty and p.name not in values | configs[0]]
    if absent:
        raise UsageError(f"--signature says nothing of {', '.join(absent)}: add a type or value, or --config {absent[0]}=VALUE")
    first = next((value.dtype for value in values.values() if isinstance(value, torch.Tensor)), torch.float32)
    jobs = [(Launch(kernel, (), (), config | values), target) for target in targets for config in configs]
    return [
        Inspected(op=path, case=signature, dtype=str(first).removeprefix("torch."), launch=launch, report=report)
        for (launch, _), report in zip(jobs, compile_launches(jobs, processes), strict=True)
    ]


_TORCH = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
    "i1": torch.bool, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
}  # fmt: skip


def _argument(parameter: Parameter, word: str) -> Any:
    """A value that Triton specialises to this type, or the constant."""
    found = re.fullmatch(rf"(\*?)({'|'.join(_TORCH)})(:1|:16)?", word)
    if "constexpr" in str(parameter.annotation):
        if found:
            raise UsageError(f"--signature: {parameter.name} is a tl.constexpr and takes a value, got {word!r}")
        return _constant(word)
    if found is None:
        value = _constant(word)
        if isinstance(value, str):
            raise UsageError(
                f"--signature: {parameter.name} takes a type ({', '.join(_TORCH)}; * in front: a pointer; "
                f":16 behind: aligned or divisible) or a number, got {word!r}"
            )
        return value
    pointer, of, hint = found.groups()
    if pointer:
        return torch.empty(1024, dtype=_TORCH[of], device="meta")[0 if hint == ":16" else 1 :]
    if of.startswith(("fp", "bf")):
        return 0.5
    if of == "i1":
        return True
    return 1 if hint == ":1" else {"i64": 2**32, "u64": 2**63}.get(of, 0) + (32 if hint == ":16" else 33)


def _constant(word: str) -> Any:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return {"True": True, "False": False, "None": None}.get(word, word)


# --- comparing ---

COMPARED = (
    "config", "status", "registers", "spills", "stack_bytes", "shared_bytes", "blocks_per_sm", "tensor_core_ops", "tma_loads",
    "tma_stores", "vector_loads", "vector_stores", "scalar_accesses", "instructions",
)  # fmt: skip


def difference(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that say what changed between the rows of two inspections."""

    def by_key(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        times: Counter[tuple[Any, ...]] = Counter()
        for row in rows:
            key = (row["op"], row["case"], row["dtype"], row["target"], row["kernel"], "" if row["chosen"] else row["config"])
            found[*key, times[key]] = row  # the n-th launch of the kernel in a call
            times[key] += 1
        return found

    old, new = by_key(before), by_key(after)
    lines = []
    for key in sorted({*old, *new}):
        name = f"{key[0]}/{key[1]} {key[2]} {key[3]} {key[4]}"
        if key not in new or key not in old:
            lines.append(f"{name}: {'gone' if key in old else 'new'}")
            continue
        changes = [
            f"{field} {old[key][field]} -> {new[key][field]}" for field in COMPARED if old[key][field] != new[key][field]
        ]
        if changes:
            lines.append(f"{name}: {', '.join(changes)}")
    return lines


def base_rows(base: str, command: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a saved --json file, or of a git revision inspected now with the same arguments."""
    if Path(base).is_file():
        return [json.loads(line) for line in Path(base).read_text().splitlines()]
    with tempfile.TemporaryDirectory(prefix="dlaccel-base-") as folder:
        archive = subprocess.run(["git", "-C", ROOT, "archive", base], capture_output=True)
        if archive.returncode:
            raise UsageError(f"--diff: {base!r} is neither a file nor a git revision of {ROOT}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        out = Path(folder) / "base.jsonl"
        line = [sys.executable, "-m", "dlaccel.bench", "inspect", *command, "--json", str(out)]
        run = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        if not out.exists():
            raise UsageError(f"--diff: inspecting {base} failed: {run.stderr.strip()[-500:]}")
        return [json.loads(line) for line in out.read_text().splitlines()]


# --- the command ---


def _config(text: str) -> Config:
    pairs = [word.partition("=") for word in words(text)]
    if not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return {name: _constant(value) for name, _, value in pairs}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE.py:KERNEL", help="a @triton.jit kernel of your own; needs --signature")
    parser.add_argument("--signature", metavar="S", help='its arguments in order: types or constants, "*bf16:16, i32:16, 1024"')
    add_lists(
        parser,
        op="default: all",
        kernel="kernels whose name contains this",
        target=f"of {', '.join(ALL_TARGETS)} (default: {', '.join(TARGETS)})",
        dtype="of bf16, fp16, fp32 (default: bf16, fp32)",
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="cases and samples by name or part of it, repeatable"
    )
    parser.add_argument("--config", type=_config, metavar="NAME=VALUE,...", help="these blocks instead of the chosen ones")
    parser.add_argument("--full", action="store_true", help="all targets, dtypes, cases and candidate configurations")
    parser.add_argument(
        "--per-kernel", type=int, metavar="N",
        help=f"at most N different codes of a kernel, dtype and target, no candidates (default: {PER_KERNEL}, with --full all)",
    )  # fmt: skip
    parser.add_argument("--diff", metavar="BASE", help="print what changed since a git revision or a saved --json file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    parser.add_argument("--update-expected", action="store_true", help="rewrite tests/expected from what is compiled now")
    parser.add_argument(
        "--predict", action="store_true", help="write bench/results/predicted; GPUs that have measured an op keep its rows"
    )
    parser.add_argument("--samples", action="store_true", help="the small cases of the tests, and no others")
    parser.add_argument("--keep", action="store_true", help="leave the code in Triton's own cache, for runs on such a GPU")
    parser.add_argument("--jobs", type=int, metavar="N", help="compile in N processes (default: one a core)")


def main(args: argparse.Namespace) -> int:
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # nothing runs here
    try:
        return _main(args)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _main(args: argparse.Namespace) -> int:
    known = families()
    ops = choose("op", args.op, known) or list(known)
    targets = choose("target", args.target, ALL_TARGETS) or (ALL_TARGETS if args.full else TARGETS)
    dtypes = choose("dtype", args.dtype, DTYPES) or (["bf16", "fp16", "fp32"] if args.full else ["bf16", "fp32"])
    if args.update_expected:
        from dlaccel.bench import expected

        print(expected.update(ops, args.target or expected.TARGETS, args.jobs))
        return 0
    if args.predict:
        return _predict(ops, args.jobs)
    found = _own(args, targets) if args.file else inspect(_selection(args, ops, targets, dtypes), args.jobs, keep=args.keep)
    rows = [one.row() for one in found]
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.diff:
        print("\n".join(difference(base_rows(args.diff, _command(args)), rows)) or "no difference")
    else:
        print(table(distinct(found)))
    print(f"\n{len(found)} launches, {len(distinct(found))} different codes, {sum(o.report.status == 'ok' for o in found)} ok")
    return 0 if args.keep or all(one.report.status == "ok" for one in found if one.chosen) else 1


def _own(args: argparse.Namespace, targets: Sequence[str]) -> list[Inspected]:
    ignored = [f"--{name}" for name in ("op", "case", "kernel", "dtype", "per_kernel", "diff") if getattr(args, name)]
    if ignored:
        raise UsageError(f"{', '.join(ignored).replace('_', '-')}: not for a kernel of your own")
    if not args.signature:
        raise UsageError('a kernel of your own needs --signature, its arguments in order, for example "*bf16:16, i32:16, 1024"')
    return own_kernel(args.file, args.signature, args.config or {}, targets, args.jobs)


def _selection(args: argparse.Namespace, ops: Sequence[str], targets: Sequence[str], dtypes: Sequence[str]) -> Selection:
    known = families()
    cases = [case for op in ops for case in gpu_cases(op)]
    if args.full:
        cases += [case for op in ops for case in known[op].SAMPLES]
    if args.samples:
        cases = [case for op in ops for case in known[op].SAMPLES]
    if args.case:
        cases = named(args.case, [case for op in ops for case in (*known[op].CASES, *known[op].SAMPLES)])
    return Selection(
        cases, [DTYPES[d] for d in dtypes], targets, args.kernel,
        per_kernel=args.per_kernel or (None if args.full or args.case or args.samples else PER_KERNEL),
        candidates=args.full and not args.per_kernel, override=args.config,
    )  # fmt: skip


def _command(args: argparse.Namespace) -> list[str]:
    """The arguments that select, for inspecting another revision."""
    lists = {"--op": args.op, "--kernel": args.kernel, "--target": args.target, "--dtype": args.dtype}
    command = [word for option, values in lists.items() if values for word in (option, ",".join(values))]
    command += [word for name in args.case for word in ("--case", name)]
    command += ["--samples"] if args.samples else []
    command += ["--config", ",".join(f"{k}={v}" for k, v in args.config.items())] if args.config else []
    command += [
        word for o in ("jobs", "per_kernel") if getattr(args, o) for word in (f"--{o}".replace("_", "-"), str(getattr(args, o)))
    ]
    return command + (["--full"] if args.full else [])


def _predict(ops: Sequence[str], processes: int | None) -> int:
    cases: list[Case] = []
    for op in ops:  # the shapes of GPUs, where an op has its own
        known = gpu_cases(op)
        cases += [case for case in known if "cpu" not in case.devices] or known
    for gpu in model.GPUS.values():
        found = inspect(Selection(cases, targets=[gpu.target]), processes)
        rows = [
            model.row(one.op, one.case, one.dtype, one.launch, one.report, one.config, gpu)
            for one in found
            if one.report.status != "failed"
        ]
        print(f"{gpu.name}: {model.write_predictions(gpu, rows)} of {len(rows)} rows new or changed")
    return 0


_COLUMNS = {
    "regs": "registers", "spills": "spills", "stack": "stack_bytes", "shared": "shared_bytes", "blk/SM": "blocks_per_sm",
    "wrp/SM": "warps_per_sm", "tensor": "tensor_core_ops", "ld16": "vector_loads", "st16": "vector_stores",
    "8 B": "half_vector_accesses", "<=4 B": "scalar_accesses", "instr": "instructions",
}  # fmt: skip


def table(found: Sequence[Inspected]) -> str:
    """A line for each kernel; below it its configuration, the model's prediction and warnings."""
    names = [*_COLUMNS, "TMA"]
    lines = [f"{'kernel':32}{'dtype':10}{'target':8}" + "".join(name.rjust(8) for name in names)]
    for one in found:
        report = one.report
        cells = [str(getattr(report, field)) for field in _COLUMNS.values()] + [f"{report.tma_loads}+{report.tma_stores}"]
        lines.append(f"{report.kernel:32}{one.dtype:10}{report.target:8}" + "".join(cell.rjust(8) for cell in cells))
        lines.append(f"    {one.op}/{one.case}  {one.config}{'' if one.chosen else '  (candidate)'}")
        lines += [
            f"    {gpu}: {p.us:.1f} us by the model, {p.bound}-bound, {p.of_roofline:.0%} of the roofline "
            f"({p.bytes / 1e6:.1f} MB, {p.flops / 1e9:.2f} GFLOP)"
            for gpu, p in one.predictions().items()
        ]
        lines += [f"    ! {note}" for note in one.warnings()]
    return "\n".join(lines)
