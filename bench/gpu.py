"""What a GPU machine should run: `python -m dlaccel.bench.gpu STEP`, or `make gpu-STEP`. Not yet run on a GPU.

Each step takes at most `--budget` seconds (default 540), does the units that matter most first, and continues where the last
call stopped: a unit that succeeded on this commit is not run again, and `bench run` resumes row by row. Results lie in
bench/results/<device>/, to be committed: bench.jsonl, kernels.jsonl, claims.jsonl, verify.json, and steps.jsonl, which says how
each unit ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import torch

from dlaccel.bench import results
from dlaccel.bench.case import families

ROOT = Path(__file__).resolve().parents[1]
BUDGET = "{budget}"  # in a command: the seconds that are left
LEAST = 20.0  # with fewer seconds left nothing is begun; what resumes by itself stops so many before the end


@dataclass(frozen=True)
class Unit:
    """One command.

    resumes: it keeps its own state, so it runs again until it has nothing left to do.
    keep: what it prints is its result, and is kept as <unit>.txt.
    least: with fewer seconds left it is not begun.
    most: after so many seconds it is ended, and that is well: what it has done by then helps.
    """

    name: str
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    resumes: bool = False
    keep: bool = False
    least: float = LEAST
    most: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """One line of steps.jsonl."""

    step: str
    unit: str
    code: int | None  # None: it did not end in time
    seconds: float
    git_sha: str
    time_utc: str


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _bench(*arguments: str) -> list[str]:
    return _python("-m", "dlaccel.bench", *arguments)


def device_name() -> str:
    """ "h100", "h200", "a100", ...; for others the whole name in small letters."""
    name = torch.cuda.get_device_name().lower()
    short = re.search(r"\b([a-z]{1,3}\d{1,4})\b", name)
    return short[1] if short else re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _sanitizer(tool: str, selection: str) -> Unit:
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    tests = _python("-m", "pytest", "tests/test_gpu.py", "-q", "-x", "-k", selection)
    # Without torch's cache every tensor is an allocation of its own, so that an access past its end is seen.
    return Unit(f"{tool} {selection}", [program, *options, *tests], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _compile(target: str, *selection: str) -> Unit:
    """All cores compile beforehand what the step will run: Triton itself compiles in one process, at the first call."""
    return Unit(" ".join(("compile", *selection)), _bench("inspect", "--target", target, "--keep", *selection), most=150)


def _tests(path: Path, passed: Path) -> Unit:
    options = ["-q", "-p", "tests.passed", "--passed", str(passed)]
    return Unit(path.stem, _python("-m", "pytest", str(path.relative_to(ROOT)), *options), least=60)


def units(step: str, out: Path, git_sha: str = "") -> list[Unit]:
    """The commands of a step, most valuable first. Raises KeyError for an unknown step."""
    ops = list(families())
    target = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"
    direct = _python("-m", "pytest", "tests/test_gpu.py", "-q", "-k", "direct")

    def order(path: Path) -> tuple[bool, bool, bool, str]:
        name = path.stem.removeprefix("test_")
        return name != "gpu", name != "contract", not any(op.startswith(name) for op in ops), name

    files = sorted((ROOT / "tests").glob("test_*.py"), key=order)
    passed = ROOT / "build" / "gpu" / f"passed-{git_sha[:12]}.txt"
    both = ("--dtype", "bf16,fp32")
    run = ["run", "--device", "cuda", "--resume", "--budget", BUDGET, "--out", str(out)]
    in_torch = "dlaccel,eager,native,cudnn,addmm_activation"  # nothing of these has to be compiled
    measured: dict[str, Callable[[], list[Unit]]] = {
        "test": lambda: [
            _compile(target, *both, "--samples"),
            Unit("direct", direct),
            *(_tests(path, passed) for path in files),
            _sanitizer("memcheck", f"direct and {ops[0]}"),
        ],
        "tune": lambda: [
            unit
            for op in ops
            for unit in (
                _compile(target, "--op", op, *both, "--full"),
                Unit(f"tune {op}", _bench("tune", "--op", op, "--shipped", "--resume"), least=60),
            )
        ],
        "bench": lambda: [
            _compile(target, *both, "--per-kernel", "6"),  # the first cases': of a GPU's size; all together are 1100 codes
            Unit("goal rows", _bench(*run, "--preset", "default", "--provider", in_torch), resumes=True),
            Unit("kernels", _python("-m", "dlaccel.bench.kernel_times", "--budget", BUDGET, "--out", str(out)), resumes=True),
            Unit("other libraries", _bench(*run, "--preset", "default", "--provider", PEERS), resumes=True),
            Unit("verify", _bench("verify", "--device", "cuda", "--out", str(out)), least=120),
            Unit("everything", _bench(*run, "--preset", "full"), resumes=True),
        ],
        "models": lambda: [
            Unit(name, _python(f"examples/{name}.py", "--device", "cuda"), keep=True, least=60)
            for name in ("resnet_block", "mobilenet", "digits")
        ],
        "claims": lambda: [
            Unit(f"claim {n}", _bench("claims", "--claim", str(n), "--preset", "full", "--resume", "--out", str(out)), least=60)
            for n in CLAIMS
        ],
        "sanitize": lambda: [
            _sanitizer(tool, f"direct and {op}") for tool in ("memcheck", "racecheck", "initcheck") for op in ops
        ],
    }
    return measured[step]()


PEERS = "compile,liger,quack,flag_gems,attorch,cce"
CLAIMS = (2, 3, 1, 4, 8, 6, 7, 5)  # what only a GPU can measure first
STEPS = ("test", "tune", "bench", "models", "claims", "sanitize")


def done(log: Path, step: str, git_sha: str) -> set[str]:
    """The units of a step that succeeded on this commit."""
    found = set()
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue  # half a line, of a call that was killed
        if outcome.step == step and outcome.git_sha == git_sha and outcome.code == 0:
            found.add(outcome.unit)
    return found


def _within(seconds: float, command: Sequence[str], env: dict[str, str], output: IO[str] | None) -> int | None:
    """The exit code, or None if it took too long. Ends what the command started as well: workers would hold the GPU."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_step(
    step: str, todo: Sequence[Unit], log: Path, budget: float, git_sha: str, say: Callable[[str], None] = print
) -> int:
    """Runs what is left of a step within the budget. 0 if everything that ran succeeded."""
    begin = time.monotonic()
    finished = done(log, step, git_sha)
    worst = 0
    with results.Writer(log) as file:
        for number, unit in enumerate(todo, start=1):
            if unit.name in finished and not unit.resumes:
                say(f"[{number}/{len(todo)}] {unit.name}: done before")
                continue
            left = budget - (time.monotonic() - begin)
            if left < unit.least:
                say(f"[{number}/{len(todo)}] {unit.name}: {left:.0f} s of the budget are left; the next call continues here")
                break
            command = [word.replace(BUDGET, f"{max(1.0, left - LEAST):.0f}") for word in unit.command]
            say(f"[{number}/{len(todo)}] {unit.name}: {shlex.join(command)}")
            started = time.monotonic()
            kept = log.parent / f"{unit.name}.txt"
            try:
                with kept.open("w") if unit.keep else nullcontext() as output:
                    code = _within(min(left, unit.most), command, os.environ | unit.env, output)
                if code is None and unit.most < left:
                    code = 0
            except OSError as error:
                say(f"{unit.name}: {error}")
                code = 127
            if unit.keep:
                say(kept.read_text())
            seconds = round(time.monotonic() - started, 1)
            file.write(asdict(Outcome(step, unit.name, code, seconds, git_sha, results.now())))
            worst = worst or code or 0
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dlaccel.bench.gpu", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="default: 540")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; these steps are for a machine that has one", file=sys.stderr)
        return 2
    out = ROOT / "bench" / "results" / device_name()
    sha = results.provenance("cuda", threads=0, clock="", precision="", seed=0)["git_sha"]
    return run_step(args.step, units(args.step, out, sha), out / "steps.jsonl", args.budget, sha)


if __name__ == "__main__":
    sys.exit(main())
