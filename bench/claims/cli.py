"""`python -m dlaccel.bench claims`: one experiment for each claim of the lecture."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from dlaccel.bench import summary
from dlaccel.bench.claims import lab, report
from dlaccel.bench.claims.row import Row, dump, read, recorded
from dlaccel.bench.options import positive
from dlaccel.bench.results import write_whole

OK, USAGE, NOTHING, INTERRUPTED = 0, 2, 4, 130
EXAMPLES = """\
examples:
  python -m dlaccel.bench claims --preset quick --report
  python -m dlaccel.bench claims --claim 6 --preset full
  python -m dlaccel.bench claims --resume --budget 540 --out results/h100     # in steps; each continues the last
  python -m dlaccel.bench claims --resume --report                            # the page again, from what is there

Rows go to DIR/claims.jsonl, figures and claims.html beside it. A claim that is run again replaces its rows, no others.
exit codes: 0 ok, 2 usage, 4 nothing was measured"""
FINISHED = "duration of the experiment"  # the last row of a claim, and so the mark that it is complete


def do_list() -> None:
    """The claims, for `python -m dlaccel.bench list`."""
    lines = [(str(number), module.TITLE, module.__name__) for number, module in report.modules().items()]
    print(summary.table(("claim", "title", "module"), lines))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    numbers = sorted(report.modules())
    parser.add_argument("--claim", type=int, action="append", choices=numbers, metavar="N", help="1 to 8, repeatable")
    parser.add_argument(
        "--preset", choices=lab.PRESETS, default="default", help="quick: 2 minutes, default: 5 (of a free core)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--report", action="store_true", help="also write DIR/claims.html")
    parser.add_argument("--resume", action="store_true", help="run the claims that are not complete in DIR")
    parser.add_argument("--budget", type=positive, metavar="SECONDS", help="begin no claim after this")


def main(args: argparse.Namespace) -> int:
    path = args.out / "claims.jsonl"
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"error: --device cuda: {lab.NO_GPU}", file=sys.stderr)
        return USAGE
    try:
        interrupted = _run(args, path, _kept(path))
        rows, _ = read(path)
        others = list(recorded(report.RESULTS))
        figures = report.draw([*rows, *others], args.out)
        page = args.out / "claims.html"
        if args.report or page.exists():  # one that is there would show other rows
            write_whole(page, report.page(report.render(rows, figures, others)))
            print(f"Report: {page}")
    except (OSError, ValueError) as error:
        print(f"error: {error}; what was written before is kept", file=sys.stderr)
        return USAGE
    print(f"{len(rows)} rows in {path}")
    if interrupted:
        print("interrupted; --resume continues with the claim that was not complete", file=sys.stderr)
        return INTERRUPTED
    return OK if any(row.status == "measured" for row in rows) else NOTHING


def _kept(path: Path) -> list[Row]:
    """The rows that are there; lines that cannot be read leave the file."""
    rows: list[Row] = []
    if path.exists():
        rows, problems = read(path)
        for problem in problems:
            print(f"{problem}: left out", file=sys.stderr)
    write_whole(path, "".join(dump(row) + "\n" for row in rows))
    return rows


def _without(rows: Sequence[Row], number: int, args: argparse.Namespace) -> list[Row]:
    """Without the rows that a run of the claim replaces: those of its preset, and of its device if they were measured."""
    device = args.device
    return [r for r in rows if (r.claim, r.preset) != (number, args.preset) or r.environment.get("device", device) != device]


def _run(args: argparse.Namespace, path: Path, kept: Sequence[Row]) -> bool:
    """Runs the claims, writing each row as it is made. True if it was interrupted."""
    known = report.modules()
    complete = {
        row.claim
        for row in kept
        if args.resume
        and row.quantity == FINISHED
        and row.preset == args.preset
        and row.environment.get("device") == args.device
    }
    plan = [number for number in dict.fromkeys(args.claim or known) if number not in complete]
    begin = time.perf_counter()
    with _bar(len(plan)) as bar:
        for before, number in enumerate(plan):
            module = known[number]
            if args.budget is not None and time.perf_counter() - begin > args.budget:
                print(f"budget used up; claims {', '.join(map(str, plan[before:]))} are left for --resume", file=sys.stderr)
                break
            rows: list[Row] = []
            write_whole(path, "".join(dump(row) + "\n" for row in _without(read(path)[0], number, args)))
            start, cpu = time.perf_counter(), _cpu_seconds()

            def progress(note: str, done: float, number: int = number, before: int = before) -> None:
                bar(f"claim {number}: {note}", before + done)

            with path.open("a") as file:

                def write(row: Row, file: TextIO = file) -> None:
                    file.write(dump(row) + "\n")
                    file.flush()
                    os.fsync(file.fileno())

                try:
                    for row in module.run(args.preset, args.device, progress):
                        write(row)
                        rows.append(row)
                    book, note = lab.Notebook(number, args.preset), f"{_cpu_seconds() - cpu:.1f} s of CPU time"
                    seconds = time.perf_counter() - start
                    rows.append(book.measured(rows[0].id, FINISHED, seconds, "s", lab.machine(args.device), note=note))
                    write(rows[-1])
                except KeyboardInterrupt:
                    return True
            _print(report.text(module, rows))
    return False


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _print(text: str) -> None:
    """Above the progress bar, if there is one."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, end="\n\n")
    else:
        tqdm.write(text + "\n")


@contextlib.contextmanager
def _bar(claims: int) -> Iterator[lab.Progress]:
    """A progress bar over the claims, or a line for each step where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:

        def show(note: str, done: float) -> None:
            print(f"[{done:.1f}/{claims}] {note}", file=sys.stderr)

        yield show
        return
    bar = tqdm(total=claims, disable=None, bar_format="{l_bar}{bar}| {n:.1f}/{total} claims [{elapsed}] {postfix}")

    def advance(note: str, done: float) -> None:
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    with bar:
        yield advance
