"""What is expected of each kernel's machine code: tests/expected/<target>.json, the gates, and how they are brought up to date.

An entry holds what must not get worse: tensor-core and 16-byte accesses where there are some, shared memory, bytes of stack
(spills), maxima that lose a NaN. Register counts are no gate, they differ between versions of Triton. Entries are those of
Triton BASE; what another version does worse stands in the entry under that version ("triton 3.9"). `note` is written by hand
and says why an entry is allowed what the gates refuse: a spill, or a maximum that loses a NaN where the result does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from dlaccel.bench.compile import Report
from dlaccel.bench.inspect import ROOT, Inspected, Selection, gpu_cases, inspect

TARGETS = ("sm_80", "sm_90", "gfx942")
FOLDER = ROOT / "tests" / "expected"
BASE = "triton 3.7"  # of constraints.txt
SLACK = 1.25  # shared memory may grow by so much: versions of Triton differ


def selection(op: str, targets: Sequence[str]) -> Selection:
    """The fixed list: each kernel of the op once for a dtype and target, in the first case that starts it."""
    return Selection(gpu_cases(op), targets=targets, per_kernel=1)


def compiled(ops: Sequence[str], targets: Sequence[str], processes: int | None = None) -> dict[str, Inspected]:
    """The fixed list of these ops, compiled, by key; the first of launches that share one."""
    found: dict[str, Inspected] = {}
    backends: Any = torch.backends
    conv = backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "tf32"  # torch's default, which decides what is launched
    try:
        for op in ops:
            for one in inspect(selection(op, targets), processes):
                found.setdefault(f"{one.report.target} {key(one)}", one)
    finally:
        conv.fp32_precision = before
    return found


def key(one: Inspected) -> str:
    return f"{one.op} {one.report.kernel} {one.dtype} {one.config}"


def entry(report: Report) -> dict[str, Any]:
    return {
        "tensor_core": report.tensor_core_ops > 0,
        "wide_loads": report.vector_loads + report.tma_loads > 0,
        "wide_stores": report.vector_stores + report.tma_stores > 0,
        "shared_bytes": report.shared_bytes,
        "stack_bytes": report.stack_bytes,
        "nan_dropping": report.nan_dropping,
    }


def failures(report: Report, expected: dict[str, Any], ieee: bool) -> list[str]:
    """What is worse than expected, or never right. ieee: a float32 kernel that was not given leave to use TF32."""
    excused, worse = "note" in expected, []
    spills_as_expected = report.status == "spills" and excused and report.stack_bytes <= expected["stack_bytes"]
    if report.status != "ok" and not spills_as_expected:
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
    if now["nan_dropping"] > (expected["nan_dropping"] if excused else 0):
        worse.append(f"{now['nan_dropping']} maxima or minima that lose a NaN")
    if ieee and report.tf32_ops:
        worse.append(f"{report.tf32_ops} TF32 instructions where IEEE was asked for")
    return worse


def is_ieee(one: Inspected) -> bool:
    return one.dtype == "float32" and "tf32" not in str(one.launch.options.get("PRECISION"))


def version() -> str:
    import triton

    return "triton " + ".".join(triton.__version__.split(".")[:2])


def stored(target: str) -> dict[str, dict[str, Any]]:
    """The file, with what each version of Triton does worse."""
    path = FOLDER / f"{target}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load(target: str) -> dict[str, dict[str, Any]]:
    """What is expected of this process's Triton."""
    return {name: of_version(entry) for name, entry in stored(target).items()}


def of_version(entry: dict[str, Any], triton: str | None = None) -> dict[str, Any]:
    own: dict[str, Any] = entry.get(triton or version(), {})
    return {k: v for k, v in entry.items() if not k.startswith("triton ")} | own


def updated(old: dict[str, Any] | None, report: Report, ieee: bool, triton: str) -> dict[str, Any]:
    """The entry of a kernel, given the old one: of BASE what is compiled now, of another version what fails without it."""
    now = entry(report)
    if old is None:
        return now
    if triton == BASE:
        return now | {k: v for k, v in old.items() if k not in now}
    common = {k: v for k, v in old.items() if k != triton}
    if failures(report, of_version(common, triton), ieee):
        common[triton] = {k: v for k, v in now.items() if v != common[k]}
    return common


def update(ops: Sequence[str], targets: Sequence[str], processes: int | None = None) -> str:
    """Rewrite the entries of these ops for this process's Triton. Returns what changed and what fails all the same."""
    lines = []
    found = compiled(ops, targets, processes)
    for target in targets:
        old = stored(target)
        new = {k: v for k, v in old.items() if k.partition(" ")[0] not in ops}
        for one in (one for one in found.values() if one.report.target == target):
            ieee = is_ieee(one)
            new[key(one)] = now = updated(old.get(key(one)), one.report, ieee, version())
            lines += [f"{target} {key(one)}: {worse}" for worse in failures(one.report, of_version(now), ieee)]
        changed = sum(old.get(k) != new.get(k) for k in {*old, *new})
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{target}.json").write_text(json.dumps(dict(sorted(new.items())), indent=1) + "\n")
        lines.append(f"{FOLDER / target}.json: {len(new)} entries, {changed} changed")
    return "\n".join(lines)


def unexpected(target: str, found: dict[str, Inspected]) -> list[str]:
    """Entries of the file that nothing compiles any more."""
    ops = {one.op for one in found.values()}
    return [k for k in stored(target) if k.partition(" ")[0] in ops and f"{target} {k}" not in found]
