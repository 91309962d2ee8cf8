"""What a GPU machine should run: `python -m dlaccel.bench.gpu`, or `make gpu`. Not yet run on a GPU.

One list of units, what is worth most first: every kernel's values, kernels' times, rows against torch, the tests, tuning, the
rest. Each unit has a share of seconds, keeps its own state, and is ended when its share is used; one that fails or is ended
leaves the others. Next is always the unit that has had the fewest shares on this commit, so a second call goes on where the
first stopped. It needs the packages of its Python and no installation.

Results lie in bench/results/<device>/, to be committed: bench.jsonl, kernels.jsonl, claims.jsonl, verify.json, and steps.jsonl,
which says how each unit ended. Tuned configurations go to kernels/tuned/; what the units print, and which tests passed and
failed, to build/gpu/.

For a machine that keeps nothing: where OUT names a folder, results.tar.gz in it holds all of that, as of the last half minute,
and triton.tar.gz Triton's cache, as of the last unit. `--given FILE` unpacks such an archive before the first unit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from dlaccel.bench import provider, results
from dlaccel.bench.case import families

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build" / "gpu"
LEAST = 15.0  # with fewer seconds left no unit is begun: Python and torch take as long to start
REFRESH = 30.0  # seconds between two archives
LARGEST = 16 << 20  # bytes of an archive that is worth sending
SHOWN = 25  # last lines of what a unit printed
PEERS = ("compile", "liger", "quack", "flag_gems", "attorch", "cce")
CLAIMS = (2, 3, 1, 4, 8, 6, 7, 5)  # what only a GPU can measure first


@dataclass(frozen=True)
class Unit:
    """One command; after `share` seconds it is ended, and continues when its turn comes again."""

    name: str
    command: Sequence[str]
    share: float
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One line of steps.jsonl."""

    unit: str
    code: int | None  # None: it was ended
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


def _sanitizer(tool: str, op: str) -> Unit:
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    tests = _python("-m", "pytest", "tests/test_gpu.py", "-q", "-x", "-k", f"direct and {op}")
    # Without torch's cache every tensor is an allocation of its own, so that an access past its end is seen.
    return Unit(f"{tool} {op}", [program, *options, *tests], 90, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _compile(share: float, *selection: str) -> Unit:
    """All cores compile beforehand what the next units run: Triton itself compiles in one process, at the first call."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"
    words = ("--dtype", "bf16,fp32", *selection)
    return Unit(" ".join(("compile", *selection)), _bench("inspect", "--target", target, "--keep", *words), share)


def _tests(name: str, share: float, passed: Path, *selection: str) -> Unit:
    """Several processes: tests spend their time compiling."""
    parallel = ["-n", "8", "--dist", "worksteal"] if find_spec("xdist") else []
    return Unit(
        name, _python("-m", "pytest", *selection, "-q", *parallel, "-p", "tests.passed", "--passed", str(passed)), share
    )


def gpu_tests() -> list[str]:
    """The files whose tests run on a GPU where there is one, those of a GPU alone first."""
    files = sorted(
        (ROOT / "tests").glob("test_*.py"), key=lambda path: (path.stem not in ("test_gpu", "test_contract"), path.stem)
    )
    return [f"tests/{path.name}" for path in files if re.search(r"\bDEVICE\b|\bmark\.gpu\b", path.read_text())]


def units(out: Path, git_sha: str) -> list[Unit]:
    """The commands, most valuable first."""
    ops = list(families())
    passed = STATE / f"passed-{git_sha[:12]}.txt"
    run = ["run", "--device", "cuda", "--resume", "--out", str(out)]
    # Of libraries that are not here each case would say so, in a process of its own.
    peers = [name for name in PEERS if provider.load(name).available() is None]
    in_torch = ["dlaccel", "eager", "native", "cudnn", "addmm_activation"]
    return [
        _tests("smoke", 120, passed, "tests/test_gpu.py", "-k", "smoke"),
        _compile(60, "--per-kernel", "4"),  # the first cases': all together are 1100 codes
        Unit("kernels", _python("-m", "dlaccel.bench.kernel_times", "--out", str(out)), 120),
        Unit("goal rows", _bench(*run, "--preset", "default", "--provider", ",".join(in_torch)), 180),
        _tests("tests", 150, passed, *gpu_tests()),
        *(
            unit
            for op in ops
            for unit in (
                _compile(60, "--op", op, "--full"),
                Unit(f"tune {op}", _bench("tune", "--op", op, "--shipped", "--resume"), 60),
            )
        ),
        _sanitizer("memcheck", ops[0]),
        *(
            Unit(name, _python(f"examples/{name}.py", "--device", "cuda"), 60)
            for name in ("resnet_block", "mobilenet", "digits")
        ),
        *(
            Unit(f"claim {n}", _bench("claims", "--claim", str(n), "--preset", "full", "--resume", "--out", str(out)), 60)
            for n in CLAIMS
        ),
        *([Unit("other libraries", _bench(*run, "--preset", "default", "--provider", ",".join(peers)), 180)] if peers else []),
        Unit("verify", _bench("verify", "--device", "cuda", "--out", str(out)), 300),
        *(_sanitizer("memcheck", op) for op in ops[1:]),
        *(_sanitizer(tool, op) for tool in ("racecheck", "initcheck") for op in ops),
        Unit("everything", _bench(*run, "--preset", "full", "--provider", ",".join([*in_torch, *peers])), 600),
        # Last: its programs wait for each other, and if they wait forever the unit's share is what they cost.
        Unit("tune one launch", _bench("tune", "--op", "batch_norm", "--shipped", "--one-launch"), 60),
    ]


def outcomes(log: Path, git_sha: str) -> list[Outcome]:
    """How the units of this commit ended so far."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else ():
        with suppress(ValueError, TypeError):  # half a line, of a call that was killed
            found.append(Outcome(**json.loads(line)))
    return [one for one in found if one.git_sha == git_sha]


def next_unit(todo: Sequence[Unit], before: Sequence[Outcome], failed: set[str]) -> Unit | None:
    """Of the units that have not succeeded, and not failed in this call, the first of those with the fewest whole shares."""
    over = {one.unit for one in before if one.code == 0} | failed
    spent = {unit.name: sum(one.seconds for one in before if one.unit == unit.name) for unit in todo}
    return min((u for u in todo if u.name not in over), key=lambda u: (spent[u.name] + 1) // u.share, default=None)


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _within(
    seconds: float, command: Sequence[str], env: dict[str, str], output: IO[bytes], meanwhile: Callable[[], None]
) -> int | None:
    """The exit code, or None if it took too long. Ends what the command started as well: workers would hold the GPU."""
    end = time.monotonic() + seconds
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent
    )
    try:
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(min(left, REFRESH))
            except subprocess.TimeoutExpired:
                meanwhile()
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP leave by the `finally` of _within."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def archive(path: Path, files: Sequence[Path], root: Path) -> bool:
    """Writes the files whole or not at all. False: they are more than LARGEST."""
    part = path.with_name(path.name + ".part")
    with tarfile.open(part, "w:gz", compresslevel=1) as tar:
        for file in files:
            with suppress(FileNotFoundError):  # a scratch file of a unit at work
                tar.add(file, file.relative_to(root), recursive=False)
    fits = part.stat().st_size <= LARGEST
    part.replace(path) if fits else part.unlink()
    return fits


def _files(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]


def visit(
    todo: Sequence[Unit],
    log: Path,
    state: Path,
    budget: float,
    git_sha: str,
    say: Callable[[str], None] = print,
    save: Callable[[bool], None] = lambda after_a_unit: None,
) -> int:
    """Runs units until none is left or the budget is used. 1 if one failed.

    save: called after each unit with True, and every REFRESH seconds during it with False.
    """
    end = time.monotonic() + budget
    failed: set[str] = set()
    state.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(state / "triton")}
    with results.Writer(log) as file, _ended_in_order():
        while (left := end - time.monotonic()) >= LEAST:
            if (unit := next_unit(todo, outcomes(log, git_sha), failed)) is None:
                break
            printed = state / f"{re.sub('[^a-z0-9]+', '-', unit.name)}.log"
            seconds = min(left, unit.share)
            say(f"{unit.name}, at most {seconds:.0f} s: {shlex.join(unit.command)}")
            started = time.monotonic()
            with printed.open("ab") as output:
                begin = output.tell()
                try:
                    code = _within(seconds, unit.command, env | unit.env, output, lambda: save(False))
                except OSError as error:  # compute-sanitizer is not everywhere
                    code = 127
                    output.write(f"{error}\n".encode())
            took = time.monotonic() - started
            file.write(asdict(Outcome(unit.name, code, round(took, 1), git_sha, results.now())))
            if code:
                failed.add(unit.name)
            with printed.open("rb") as output:
                output.seek(begin)
                lines = output.read().decode(errors="replace").splitlines()[-SHOWN:]
            say("\n".join(f"    {line[:200]}" for line in lines))
            say(f"{unit.name}: {'ended' if code is None else f'exit code {code}'} after {took:.0f} s")
            save(True)
    report(todo, outcomes(log, git_sha), state, say)
    return 1 if failed else 0


def report(todo: Sequence[Unit], before: Sequence[Outcome], state: Path, say: Callable[[str], None]) -> None:
    """How each unit stands, and the tests that failed."""
    how = {unit.name: "not begun" for unit in todo}
    for one in before:
        how[one.unit] = "to be continued" if one.code is None else f"failed ({one.code})" if one.code else "done"
    for unit in todo:
        say(f"{how[unit.name]:16} {unit.name}")
    for path in sorted(state.glob("passed-*.failed")):
        passed = path.with_suffix(".txt")
        since = {*passed.read_text().splitlines()} if passed.exists() else set()
        failures = dict.fromkeys(
            line.removeprefix("FAILED ") for line in path.read_text().splitlines() if line[:7] == "FAILED "
        )
        names = [name for name in failures if name not in since]
        say("\n".join([f"{len(names)} failures in {path.name}:", *names[:40]]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dlaccel.bench.gpu", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="of the whole call; default: 540")
    parser.add_argument("--only", default="", metavar="WORDS", help="units whose name contains one of these, comma-separated")
    parser.add_argument("--given", type=Path, action="append", default=[], metavar="FILE", help="an archive of an earlier call")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.budget
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; this is for a machine that has one", file=sys.stderr)
        return 2
    for given in args.given:
        with tarfile.open(given) as tar:
            tar.extractall(ROOT, filter="data")
    out = ROOT / "bench" / "results" / device_name()
    sha = results.provenance("cuda", threads=0, clock="", precision="", seed=0)["git_sha"]
    todo = [unit for unit in units(out, sha) if any(word in unit.name for word in args.only.split(","))]
    keep = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    cache = STATE / "triton"

    def say(text: str) -> None:
        print(text, flush=True)
        if keep is not None:
            with (keep / "log.txt").open("a") as log:
                log.write(text + "\n")

    def save(after_a_unit: bool) -> None:
        if keep is None:
            return
        found = [file for file in _files(out, ROOT / "kernels" / "tuned", STATE) if cache not in file.parents]
        if not archive(keep / "results.tar.gz", found, ROOT):
            say("the results are too large to send")
        if after_a_unit:  # the code, and what `inspect` reads
            found = [file for file in _files(cache) if file.suffix in (".cubin", ".json", ".so", ".ttir")]
            if not archive(keep / "triton.tar.gz", found, ROOT):
                say("Triton's cache is too large to send")

    return visit(todo, out / "steps.jsonl", STATE, end - time.monotonic(), sha, say, save)


if __name__ == "__main__":
    sys.exit(main())
