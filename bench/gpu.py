"""What a GPU machine should run: `python -m dlaccel.bench.gpu STEP`, or `make gpu-STEP`. Not yet run on a GPU.

Each step takes at most `--budget` seconds (default 540), does the units that matter most first, and continues where the last
call stopped: a unit that succeeded on this commit is not run again, and `bench run` resumes row by row. Results lie in
bench/results/<device>/, to be committed: bench.jsonl, kernels.jsonl, claims.jsonl, verify.json, and steps.jsonl, which says how
each unit ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dlaccel.bench import results
from dlaccel.bench.case import families

ROOT = Path(__file__).resolve().parents[1]
BUDGET = "{budget}"  # in a command: the seconds that are left
LEAST = 20.0  # with fewer seconds left nothing is begun


@dataclass(frozen=True)
class Unit:
    """One command.

    resumes: it keeps its own state, so it runs again until it has nothing left to do.
    keep: what it prints is its result, and is kept as <unit>.txt.
    """

    name: str
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    resumes: bool = False
    keep: bool = False


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


def units(step: str, out: Path) -> list[Unit]:
    """The commands of a step, most valuable first. Raises KeyError for an unknown step."""
    ops = list(families())
    target = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"
    direct = _python("-m", "pytest", "tests/test_gpu.py", "-q", "-k", "direct")

    def tests(path: Path) -> Unit:
        return Unit(path.stem, _python("-m", "pytest", str(path.relative_to(ROOT)), "-q"))

    files = sorted((ROOT / "tests").glob("test_*.py"))
    first = {"test_gpu", "test_contract", *(f"test_{op}" for op in ops)}
    files = [f for f in files if f.stem in first] + [f for f in files if f.stem not in first]
    compiled = Unit("compile", _bench("inspect", "--target", target, "--dtype", "bf16,fp16,fp32"))
    run = ["run", "--device", "cuda", "--resume", "--budget", BUDGET, "--out", str(out)]
    verify = Unit("verify", _bench("verify", "--device", "cuda", "--out", str(out)))
    everything: dict[str, Callable[[], list[Unit]]] = {
        "test": lambda: [Unit("direct", direct), *map(tests, files), _sanitizer("memcheck", f"direct and {ops[0]}")],
        "tune": lambda: [Unit(f"tune {op}", _bench("tune", "--op", op)) for op in ops],
        "bench": lambda: [
            compiled,
            Unit("goal rows", _bench(*run, "--preset", "default"), resumes=True),
            Unit("kernels", _python("-m", "dlaccel.bench.kernel_times", "--budget", BUDGET, "--out", str(out)), resumes=True),
            verify,
            Unit("everything", _bench(*run, "--preset", "full"), resumes=True),
        ],
        "models": lambda: [
            Unit(name, _python(f"examples/{name}.py", "--device", "cuda"), keep=True)
            for name in ("resnet_block", "mobilenet", "digits")
        ],
        "claims": lambda: [Unit("claims", _bench("claims", "--preset", "full", "--out", str(out)))],
        "sanitize": lambda: [
            _sanitizer(tool, f"direct and {op}") for tool in ("memcheck", "racecheck", "initcheck") for op in ops
        ],
    }
    return everything[step]()


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
            if left < LEAST:
                say(f"[{number}/{len(todo)}] {unit.name}: the budget of {budget:.0f} s is used; the next call continues here")
                break
            command = [word.replace(BUDGET, f"{max(1.0, left - LEAST):.0f}") for word in unit.command]
            say(f"[{number}/{len(todo)}] {unit.name}: {shlex.join(command)}")
            started = time.monotonic()
            kept = log.parent / f"{unit.name}.txt"
            try:
                with kept.open("w") if unit.keep else nullcontext() as output:
                    environment = os.environ | unit.env
                    code = subprocess.run(
                        command, env=environment, cwd=ROOT, timeout=left, stdout=output, check=False
                    ).returncode
            except subprocess.TimeoutExpired:
                code = None
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
    return run_step(args.step, units(args.step, out), out / "steps.jsonl", args.budget, sha)


if __name__ == "__main__":
    sys.exit(main())
