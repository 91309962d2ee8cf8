"""What is expected of each kernel's machine code: tests/expected/<target>.json, the gates, and how they are brought up to date.

An entry holds what must not get worse: tensor-core and 16-byte accesses where there are some, shared memory, maxima that lose a
NaN. Register counts are no gate, they differ between versions of Triton. `note` is written by hand and says why an entry is
allowed what the gates refuse: a spill, or a maximum that loses a NaN where the result does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dlaccel.bench.compile import Report
from dlaccel.bench.inspect import ROOT, Inspected, Selection, gpu_cases, inspect

TARGETS = ("sm_80", "sm_90", "gfx942")
FOLDER = ROOT / "tests" / "expected"
SLACK = 1.25  # shared memory may grow by so much: versions of Triton differ


def selection(op: str, targets: Sequence[str]) -> Selection:
    """The fixed list: each kernel of the op once for a dtype and target, in the first case that starts it."""
    return Selection(gpu_cases(op), targets=targets, per_kernel=1)


def compiled(ops: Sequence[str], targets: Sequence[str], processes: int | None = None) -> dict[str, Inspected]:
    """The fixed list of these ops, compiled, by key; the first of launches that share one."""
    found: dict[str, Inspected] = {}
    for op in ops:
        for one in inspect(selection(op, targets), processes):
            found.setdefault(f"{one.report.target} {key(one)}", one)
    return found


def key(one: Inspected) -> str:
    return f"{one.op} {one.report.kernel} {one.dtype} {one.config}"


def entry(report: Report) -> dict[str, Any]:
    return {
        "tensor_core": report.tensor_core_ops > 0,
        "wide_loads": report.vector_loads + report.tma_loads > 0,
        "wide_stores": report.vector_stores + report.tma_stores > 0,
        "shared_bytes": report.shared_bytes,
        "nan_dropping": report.nan_dropping,
    }


def failures(report: Report, expected: dict[str, Any], ieee: bool) -> list[str]:
    """What is worse than expected, or never right. ieee: a float32 kernel that was not given leave to use TF32."""
    note, worse = expected.get("note"), []
    if report.status == "spills" and note:
        pass
    elif report.status != "ok":
        worse.append(f"{report.status}: {report.reason}")
    if report.status == "failed":
        return worse
    now = entry(report)
    for name, what in (
        ("tensor_core", "tensor-core instructions"),
        ("wide_loads", "16-byte loads"),
        ("wide_stores", "16-byte stores"),
    ):
        if expected[name] and not now[name]:
            worse.append(f"no {what} any more")
    if now["shared_bytes"] > SLACK * expected["shared_bytes"]:
        worse.append(f"{now['shared_bytes']} bytes of shared memory, expected {expected['shared_bytes']}")
    if now["nan_dropping"] > (expected["nan_dropping"] if note else 0):
        worse.append(f"{now['nan_dropping']} maxima or minima that lose a NaN")
    if ieee and report.tf32_ops:
        worse.append(f"{report.tf32_ops} TF32 instructions where IEEE was asked for")
    return worse


def is_ieee(one: Inspected) -> bool:
    return one.dtype == "float32" and "tf32" not in str(one.launch.options.get("PRECISION"))


def load(target: str) -> dict[str, dict[str, Any]]:
    path = FOLDER / f"{target}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def update(ops: Sequence[str], targets: Sequence[str], processes: int | None = None) -> str:
    """Rewrite the entries of these ops; notes of entries that stay are kept. Returns what changed and what now fails."""
    lines = []
    found = compiled(ops, targets, processes)
    for target in targets:
        old = load(target)
        new = {k: v for k, v in old.items() if k.partition(" ")[0] not in ops}
        for one in (one for one in found.values() if one.report.target == target):
            new[key(one)] = entry(one.report) | {k: v for k, v in old.get(key(one), {}).items() if k == "note"}
            lines += [f"{target} {key(one)}: {worse}" for worse in failures(one.report, new[key(one)], is_ieee(one))]
        changed = sum(old.get(k) != new.get(k) for k in {*old, *new})
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{target}.json").write_text(json.dumps(dict(sorted(new.items())), indent=1) + "\n")
        lines.append(f"{FOLDER / target}.json: {len(new)} entries, {changed} changed")
    return "\n".join(lines)


def unexpected(target: str, found: dict[str, Inspected]) -> list[str]:
    """Entries of the file that nothing compiles any more."""
    ops = {one.op for one in found.values()}
    return [k for k in load(target) if k.partition(" ")[0] in ops and f"{target} {k}" not in found]
