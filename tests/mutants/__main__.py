"""Runs the mutants; see the package's docstring."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests import mutants
from tests.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
DOCS, BEGIN, END = ROOT / "docs" / "testing.md", "<!-- mutants -->", "<!-- /mutants -->"
RESULTS = ROOT / "build" / "mutants.jsonl"
COPIED = ("bench", "dlaccel", "examples", "kernels", "tests", "pyproject.toml", "setup.py", "constraints.txt", "README.md")
CPU_S, TIMEOUT_S = 900, 7200  # an endless loop is a kill, by CPU time: a busy machine is none; waiting for nothing is broken
UNCHANGED = "(unchanged)"


def tree_hash() -> str:
    files = sorted(p for name in COPIED for p in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*.py")))
    digest = hashlib.sha256()
    for path in files:
        if "mutants" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def copy_tree(to: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        elif source.exists():
            shutil.copy(source, to / name)


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[str, str, str]:
    """(verdict, test that failed, how)."""
    wide = {"COLUMNS": "300"}  # pytest cuts its short summary to the width of the terminal
    env = {**os.environ, **wide, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join([str(tree), *_python_path()])}
    options = ["-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "--color=no", "-o", "faulthandler_timeout=0"]
    for arguments in tests:
        limit = ("sh", "-c", f'ulimit -t {CPU_S}; exec "$@"', "sh")
        command = [*limit, sys.executable, "-m", "pytest", *options, *shlex.split(arguments)]
        try:
            run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return "broken", arguments, f"did not end within {TIMEOUT_S} s"
        if run.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "killed", arguments, f"did not end within {CPU_S} s of CPU time"
        if run.returncode < 0:
            return "killed", arguments, f"the process died of signal {-run.returncode}"
        if run.returncode == 1:
            return "killed", *_failure(run.stdout)
        if run.returncode != 0:
            last = (run.stdout + run.stderr).strip().splitlines()[-1:]
            return "broken", arguments, f"pytest ended with {run.returncode}: {''.join(last)}"
    return "survived", "", ""


def _python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _failure(output: str) -> tuple[str, str]:
    """(test, message) of the first line of pytest's short summary."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::\S.*?)(?: - (.*))?$", output, re.MULTILINE)
    if found is None:
        return "?", ""
    fault = re.search(r"(out of bounds|race: [\w ]+?|lanes of one store disagree)(?= by|:| on)", output)
    message = f"checked interpreter: {fault[1]}" if "KernelFault" in output and fault else found[2] or ""
    return found[1], message


def judge(mutant: Mutant, tests: tuple[str, ...], tree: Path) -> dict[str, Any]:
    path, start = tree / mutant.file, time.monotonic()
    source = path.read_text() if mutant.name != UNCHANGED else ""
    if mutant.name != UNCHANGED and (source.count(mutant.old) != 1 or mutant.old == mutant.new):
        verdict, test, how = "stale", "", f"the text stands {source.count(mutant.old)} times in {mutant.file}"
    else:
        if mutant.name != UNCHANGED:
            path.write_text(source.replace(mutant.old, mutant.new))
        try:
            verdict, test, how = run_tests(tree, mutant.tests or tests)
        finally:
            if mutant.name != UNCHANGED:
                path.write_text(source)
    return {"verdict": verdict, "test": test, "how": how, "seconds": round(time.monotonic() - start)}


def lists_of(names: list[str]) -> dict[str, Any]:
    known = [m.name for m in pkgutil.iter_modules(mutants.__path__) if not m.name.startswith("_")]
    if unknown := set(names) - set(known):
        raise SystemExit(f"no mutants of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return {name: importlib.import_module(f"tests.mutants.{name}") for name in names or known}


def table(op: str, rows: list[tuple[str, dict[str, Any]]]) -> str:
    def cell(text: str) -> str:
        short = text if len(text) < 90 else text[:87] + "..."
        return short.replace("|", "\\|").replace("<", "&lt;")

    lines = [f"| {op}: mutant | verdict | by test | how |", "|---|---|---|---|"]
    for name, row in rows:
        test = row["test"].replace("tests/", "")
        lines.append(f"| {cell(name)} | {row['verdict']} | {cell(test)} | {cell(row['how'])} |")
    return "\n".join(lines)


def write_docs(tables: dict[str, str]) -> None:
    before, _, rest = DOCS.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    tables = {t.split(":")[0].removeprefix("| "): t for t in old.strip().split("\n\n") if t} | tables
    DOCS.write_text("\n\n".join([before + BEGIN, *(tables[op] for op in sorted(tables)), END]) + after)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Run the tests against seeded bugs.")
    parser.add_argument("ops", nargs="*", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="test processes at a time")
    parser.add_argument("--docs", action="store_true", help="also renew these ops' tables in docs/testing.md")
    options = parser.parse_args()

    lists, now = lists_of(options.ops), tree_hash()
    RESULTS.parent.mkdir(exist_ok=True)
    stored = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {r["key"]: r for r in stored if r["tree"] == now}
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def verdict_of(op: str, mutant: Mutant) -> tuple[str, dict[str, Any]]:
        key = repr((op, lists[op].TESTS, mutant))
        if key not in known:
            tree = trees.get()
            try:
                known[key] = {"key": key, "tree": now, **judge(mutant, lists[op].TESTS, tree)}
            finally:
                trees.put(tree)
            with RESULTS.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
        row = known[key]
        print(f"{op}: {mutant.name}: {row['verdict']} {row['test']} {row['how']} ({row['seconds']} s)", flush=True)
        return mutant.name, row

    tables, bad = {}, 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        for i in range(options.jobs):
            copy_tree(Path(folder) / str(i))
            trees.put(Path(folder) / str(i))
        for op, module in lists.items():
            unchanged = verdict_of(op, Mutant(UNCHANGED, "", "", ""))[1]
            if unchanged["verdict"] != "survived":
                raise SystemExit(f"{op}: the tests fail without any mutant")
            rows = list(pool.map(lambda m, op=op: verdict_of(op, m), module.MUTANTS))
            tables[op] = table(op, rows)
            bad += sum(row["verdict"] != "killed" for _, row in rows)
    print("\n" + "\n\n".join(tables.values()))
    if options.docs:
        write_docs(tables)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
