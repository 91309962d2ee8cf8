"""The command line: `python -m dlaccel.bench` or `dlaccel-bench`. Exit codes: see EXIT."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

from dlaccel.bench import compare, provider, report, results, run, summary, timing, verify, worker
from dlaccel.bench.case import families
from dlaccel.bench.gate import MODES
from dlaccel.bench.options import DTYPES, UsageError, add_lists, between, choose, named, positive

OK, REGRESSION, USAGE, INCORRECT, NOTHING, UNEXPECTED = range(6)
INTERRUPTED = 130
EXIT = (
    "exit codes: 0 ok, 1 a row is slower (compare), 2 usage, 3 dlaccel gave a wrong result, 4 nothing was measured, "
    "5 an error of the benchmark itself"
)

ELSEWHERE = {  # verbs whose module has add_arguments(parser) and main(args) -> exit code
    "inspect": ("dlaccel.bench.inspect", "compile the kernels for any GPU and read the machine code; needs no GPU"),
    "tune": ("dlaccel.bench.tune", "measure configurations on this GPU and keep the best"),
    "claims": ("dlaccel.bench.claims.cli", "the lecture's claims about throughput and depth, measured here"),
}
Item = TypeVar("Item")

EXAMPLES = """\
examples:
  python -m dlaccel.bench list
  python -m dlaccel.bench run --preset quick
  python -m dlaccel.bench run --op linear_relu --dtype bf16 --mode train --provider dlaccel,compile
  python -m dlaccel.bench run --op batch_norm --provider dlaccel,./mine.py     # a provider of your own
  python -m dlaccel.bench run --preset full --budget 540 --resume --out results/laptop
  python -m dlaccel.bench verify --op cross_entropy
  python -m dlaccel.bench compare results/previous.jsonl results
  python -m dlaccel.bench report results
"""


def check_providers(names: Iterable[str]) -> None:
    for name in names:
        own = name.endswith(".py") and Path(name).is_file()
        if not own:
            choose("provider", [name], provider.names())
        try:
            called = provider.load(name).name
        except Exception as error:  # the file of a user
            raise UsageError(f"provider {name}: {type(error).__name__}: {error}") from None
        if own and called in (*provider.names(), worker.CONTROL):
            raise UsageError(f"provider {name}: NAME {called!r} is taken")


def check_device(name: str) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device")


def selection(args: argparse.Namespace) -> tuple[run.Selection, dict[str, ModuleType]]:
    """What the options select. Raises UsageError naming what is valid."""
    known = families()
    ops = choose("op", args.op, known)
    cases = [case for op in ops or known for case in known[op].CASES]
    check_providers(args.provider)
    check_device(args.device)
    return run.Selection(
        preset=args.preset,
        ops=ops,
        cases=[str(case) for case in named(args.case, cases)],
        providers=args.provider,
        device=args.device,
        dtypes=[DTYPES[name] for name in choose("dtype", args.dtype, DTYPES)],
        layouts=choose("layout", args.layout, sorted({case.layout for case in cases})),
        modes=choose("mode", args.mode, MODES),
        allocators=choose("allocator", args.allocator, ("tuned", "default")),
    ), known


def bar(items: Iterable[Item], describe: Callable[[Item], str] = str, total: int | None = None) -> Iterator[Item]:
    """A progress bar on standard error, where tqdm is installed."""
    if total is None:
        items = list(items)
        total = len(items)
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, start=1):
            print(f"[{i}/{total}] {describe(item)}", file=sys.stderr)
            yield item
        return
    with tqdm(total=total, disable=None, dynamic_ncols=True) as shown:
        for item in items:
            shown.set_postfix_str(describe(item))
            yield item
            shown.update()


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def preset_lines(known: dict[str, ModuleType]) -> Iterator[tuple[str, ...]]:
    """For `list`: what each preset measures, and about how long it takes on a CPU."""
    for name in run.PRESETS:
        for device in ("cpu", "cuda"):
            chosen = run.Selection(preset=name, device=device)
            by_op = chosen.seconds(known)
            rows, cases = chosen.rows(known), sum(map(len, chosen.chosen(known).values()))
            time = "; ".join(f"{op} {duration(seconds)}" for op, seconds in by_op.items())
            estimate = (duration(sum(by_op.values())), time) if device == "cpu" else ("", "not yet run on a GPU")
            yield (name, device, str(cases), str(rows), *estimate)


def do_list(args: argparse.Namespace) -> int:
    kinds = ("ops", "presets", "cases", "providers", "claims")
    what = choose("list", args.what, kinds) or [kind for kind in kinds if kind != "cases"]
    known = families()
    if "ops" in what:
        print(summary.table(("op", "cases", "goal rows", "samples"), [
            (op, str(len(f.CASES)), str(sum("goal" in c.tags for c in f.CASES)), str(len(f.SAMPLES))) for op, f in known.items()
        ]), end="\n\n")  # fmt: skip
    if "presets" in what:
        print(summary.table(("preset", "device", "cases", "rows", "about", "on two free cores"), [*preset_lines(known)]))
        print("rows of providers that are not installed take no time; torch.compile adds seconds to a minute a row\n")
    if "cases" in what:
        print(summary.table(("case", "layout", "modes", "dtypes", "devices", "tags"), [
            (str(c), c.layout, " ".join(c.modes), " ".join(c.dtypes), " ".join(c.devices), " ".join(sorted(c.tags)))
            for f in known.values() for c in f.CASES
        ]), end="\n\n")  # fmt: skip
    if "providers" in what:
        found = [provider.load(name) for name in provider.names()]
        lines = [(p.name, p.version, p.available() or "yes") for p in found]
        print(summary.table(("provider", "version", "available"), lines), end="\n\n")
    if "claims" in what:
        try:
            importlib.import_module("dlaccel.bench.claims.cli").do_list()
        except ImportError as error:
            print(f"claims: not available ({error})")
    return OK


def do_run(args: argparse.Namespace) -> int:
    chosen, known = selection(args)
    path = args.out / "bench.jsonl"
    try:
        rows = run.run(
            chosen, known, args.out, resume=args.resume, budget=args.budget, threads=args.threads, clock=args.clock,
            precision="tf32" if args.tf32 else "ieee", seed=args.seed,
            progress=lambda items, total: bar(items, lambda item: f"{item[0]} {item[1]}", total),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {path}, and --resume continues", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"cannot write {path}: {error.strerror or error}; what was written before is kept", file=sys.stderr)
        return USAGE
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(summary.text(rows), end="\n\n")
    print(f"{len(rows)} rows in {path}")
    return exit_code(rows)


def do_verify(args: argparse.Namespace) -> int:
    known = families()
    ops = choose("op", args.op, known) or list(known)
    rows = choose("row", args.row, verify.ROWS) or list(verify.ROWS)
    if args.sample is not None:
        choose("sample", [args.sample], dict.fromkeys(s.name for op in ops for s in known[op].SAMPLES))
    check_providers(args.provider)
    check_device(args.device)
    names = args.provider or [name for name in provider.names() if not name.startswith("compile")]  # minutes of compiling
    backends = [args.backend] if args.backend else ["torch", "triton"]
    pairs = [(name, backend) for name in names for backend in (backends if name == "dlaccel" else [""])]

    def keep(found: list[verify.Finding], absent: dict[str, str]) -> None:
        if args.out is not None:
            verify.save(args.out / "verify.json", found, absent, args.device)

    found, absent = verify.verify(pairs, ops, rows, args.device, args.sample, progress=bar, keep=keep)
    print(verify.text(found, absent, summary.table, args.device))
    if any(f.outcome == verify.WRONG and f.provider.startswith("dlaccel") for f in found):
        return INCORRECT
    return OK if found else NOTHING


def load(paths: Iterable[Path]) -> list[results.Row]:
    """Rows of result files; lines that cannot be read are named on standard error."""
    rows, problems = results.read_all(paths)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return rows


def do_compare(args: argparse.Namespace) -> int:
    before, after = (load(compare.find(what, args.out)) for what in (args.before, args.after))
    if unlike := compare.differences(before, after):
        print("error: these runs cannot be compared:\n  " + "\n  ".join(unlike), file=sys.stderr)
        if any(line.startswith(("threads", "clock")) for line in unlike):
            print("a run takes --threads and --clock, whatever the load", file=sys.stderr)
        return USAGE
    changes = compare.compare(before, after)
    print(summary.table(compare.HEADERS, [compare.cells(change) for change in changes]), end="\n\n")
    counts = Counter(change.verdict for change in changes)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts)))
    if counts[compare.MISSING] == len(changes):
        print("no row was timed in the first run and tried in the second")
        return NOTHING
    return REGRESSION if counts[compare.SLOWER] or counts[compare.LOST] else OK


def do_baseline(args: argparse.Namespace) -> int:
    if args.action == "save":
        rows = load(results.files(args.results or args.out))
        try:
            path = compare.save(rows, args.out, args.name or "default")
        except ValueError as error:
            raise UsageError(str(error)) from None
        print(f"{len(rows)} rows saved as {path}")
        return OK
    names = compare.baselines(args.out)
    if args.name is None:
        print("\n".join(names) or "no baselines saved")
        return OK
    choose("baseline", [args.name], names)
    print(summary.text(load([compare.baseline_path(args.out, args.name)])))
    return OK


def do_report(args: argparse.Namespace) -> int:
    has_rows = list(args.dir.glob("bench*.jsonl"))
    if not has_rows and not (args.dir / "claims.jsonl").exists():
        raise FileNotFoundError(f"{args.dir}: neither bench*.jsonl nor claims.jsonl here")
    rows, problems = results.read_all(sorted(has_rows))
    if rows:
        print(summary.text(rows), end="\n\n")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    path = report.write(args.dir, rows, problems)
    for line in report.kernel_lines(args.dir):
        print(line)
    print(f"{path} and {len(list((args.dir / 'figures').glob('*.png')))} figures in {args.dir / 'figures'}")
    return OK if rows or not has_rows else NOTHING


def exit_code(rows: Sequence[results.Row]) -> int:
    if any(row.provider == "dlaccel" and row.status == "failed" for row in rows):
        return INCORRECT
    return OK if any(row.timed for row in rows) else NOTHING


def parser(asked: str = "") -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(
        prog="python -m dlaccel.bench", description="Checks against float64, then times against torch and other libraries.",
        epilog=f"{EXAMPLES}\n{EXIT}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = new.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help: str, do: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, epilog=EXIT)
        sub.set_defaults(do=do)
        return sub

    sub = verb("list", "ops, cases, providers and claims; for what is not available, why", do_list)
    sub.add_argument("what", nargs="*", help="ops, presets, cases, providers, claims (default: all but cases)")

    sub = verb("run", "check, then time", do_run)
    add_lists(sub, op=None, case=None, provider=None, dtype=None, layout=None, mode=None, allocator=None)
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    sub.add_argument(
        "--preset", choices=tuple(run.PRESETS), default="default", help="how much to measure (default: default); `list presets`"
    )
    sub.add_argument(
        "--budget",
        type=positive,
        metavar="SECONDS",
        help="begin nothing new after this; shared by all ops, the most valuable rows first",
    )
    sub.add_argument("--resume", action="store_true", help="keep the rows in DIR and measure what is missing")
    sub.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    sub.add_argument("--tf32", action="store_true", help="allow TF32 for float32 products, for every provider")
    sub.add_argument(
        "--threads", type=between(1, results.cpus()), help="default: as in DIR, else all cores on a quiet machine, else 1"
    )
    sub.add_argument(
        "--clock",
        choices=tuple(timing.CLOCKS),
        help="default: as in DIR, else wall on a quiet machine, else thread: CPU time, with one thread (CPU only)",
    )
    sub.add_argument("--seed", type=between(0, 2**62), default=0)

    sub = verb("verify", "check only: a table of what is right where", do_verify)
    add_lists(sub, op=None, provider=None)
    sub.add_argument("--row", action="append", default=[], help=f"one of: {', '.join(verify.ROWS)}")
    sub.add_argument("--sample", help="one sample by name")
    sub.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/verify.json, which report shows")
    sub.add_argument("--backend", choices=("torch", "triton"), help="of dlaccel; default: both")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")

    sub = verb(
        "compare",
        "two runs: SAME, FASTER, SLOWER, AMBIGUOUS, LOST or MISSING per row; exit code 1 on SLOWER or LOST",
        do_compare,
    )
    sub.add_argument("before", help="a result file, a folder of them, or a baseline's name")
    sub.add_argument("after")
    sub.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="where baselines are; default: results")

    sub = verb("report", "an HTML page and figures from the results in a folder, claims and verify included", do_report)
    sub.add_argument("dir", type=Path, nargs="?", default=Path("results"), metavar="DIR", help="default: results")

    sub = verb("baseline", "keep a run under a name, for compare", do_baseline)
    sub.add_argument("action", choices=("save", "show"))
    sub.add_argument("name", nargs="?", help="save: default 'default'; show: default a list of the names")
    sub.add_argument("--results", type=Path, metavar="PATH", help="what to save; default: DIR")
    sub.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")

    for name, (module, help) in ELSEWHERE.items():
        if name == asked:  # the others are not imported
            found = importlib.import_module(module)
            found.add_arguments(verb(name, help, found.main))
        else:
            verb(name, help, lambda args: USAGE)
    return new


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser(argv[0] if argv else "").parse_args(argv)
    except ImportError as error:
        print(f"error: {argv[0]} is not available here: {error}", file=sys.stderr)
        return USAGE
    do: Callable[[argparse.Namespace], int] = args.do
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: no worker is left behind
    try:
        return do(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:  # no such file, full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except ImportError as error:
        print(f"error: {args.verb} needs a package that is not here ({error}): pip install 'dlaccel[bench]'", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # Python's own exit code for it is 1, which is REGRESSION
        traceback.print_exc()
        return UNEXPECTED
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
