"""What a kernel ought to take on a GPU: bytes, FLOPs and instructions over that GPU's rates. A model, not a measurement.

Bytes: each tensor that the kernel uses moves once (its distinct elements). FLOPs: 2 M N K of a kernel with those arguments.
Instructions: of a kernel without loops, exactly; with loops they are not known and do not bound. The longest of the three
counts, stretched where the grid leaves multiprocessors idle, plus a fixed time for starting and draining the kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dlaccel.bench.compile import Report
    from dlaccel.kernels.launch import Launch

PREDICTED = Path(__file__).parent / "results" / "predicted"
MODEL = 1  # raise it when the formulas or the assumptions change


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates by its data sheet: bytes/s, FLOP/s, thread-instructions/s."""

    name: str
    target: str
    bandwidth: float
    tensor: float  # fp16 and bf16, dense
    tf32: float
    vector: float  # fp32
    issue: float  # multiprocessors x 128 lanes x boost clock


# NVIDIA's data sheets: H100 SXM5 80 GB, H200 SXM, A100 SXM4 80 GB.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", "sm_90", 3.35e12, 989e12, 494e12, 67e12, 132 * 128 * 1.98e9),
        Gpu("H200", "sm_90", 4.8e12, 989e12, 494e12, 67e12, 132 * 128 * 1.98e9),
        Gpu("A100", "sm_80", 2.04e12, 312e12, 156e12, 19.5e12, 108 * 128 * 1.41e9),
    )
}

# Assumed, none of them measured here. What a well-tuned kernel sustains of the data sheet: copies reach 0.9 of DRAM's rate, and
# published cuBLAS products 0.69 of the tensor cores' (8192 x 8192 x 8192 on an H200, NVIDIA/tilus#154).
BANDWIDTH, MATH, ISSUE, START_US = 0.9, 0.65, 0.8, 2.0
ASSUMPTIONS = (
    f"cold cache, each tensor once at {BANDWIDTH} of the DRAM rate; {MATH} of the peak FLOP rate; {ISSUE} of the issue rate; "
    f"a grid smaller than the device gets its share of the math and twice its share of the bandwidth; {START_US} us to start"
)


@dataclass(frozen=True)
class Prediction:
    """Microseconds, and what they are made of."""

    us: float
    bound: str  # memory | math | issue
    memory_us: float
    math_us: float
    issue_us: float | None  # None: not known, the kernel has loops
    bytes: int
    flops: int

    @property
    def of_roofline(self) -> float:
        """The data sheet's time (no efficiencies, no start) over the predicted time."""
        return max(self.memory_us * BANDWIDTH, self.math_us * MATH) / self.us


def predict(launch: Launch, report: Report, dtype: str, gpu: Gpu) -> Prediction:
    """How long `launch` should take on `gpu`, whose target `report` was compiled for."""
    from dlaccel.kernels.config import TARGETS

    programs, sms = math.prod(launch.grid), TARGETS[gpu.target].sms
    fill = min(1.0, programs / sms)
    moved, flops = bytes_of(launch, report.unused), flops_of(launch)
    memory = moved / (gpu.bandwidth * BANDWIDTH * min(1.0, 2 * fill))
    peak = gpu.vector if dtype == "float32" and not report.tf32_ops else gpu.tf32 if dtype == "float32" else gpu.tensor
    waves = _waves(programs, sms * max(report.blocks_per_sm, 1)) if flops else 1.0
    maths = flops / (peak * MATH) * max(waves, 1 / fill)
    threads = programs * report.warps * 32
    issue = None if report.loop_instructions else report.instructions * threads / (gpu.issue * ISSUE * fill)
    parts = {"memory": memory, "math": maths, "issue": issue or 0.0}
    bound = max(parts, key=parts.__getitem__)
    return Prediction(
        us=parts[bound] * 1e6 + START_US, bound=bound, memory_us=memory * 1e6, math_us=maths * 1e6,
        issue_us=None if issue is None else issue * 1e6, bytes=moved, flops=flops,
    )  # fmt: skip


def _waves(programs: int, slots: int) -> float:
    """How much longer whole waves take than the work in them."""
    return math.ceil(programs / slots) * slots / programs if programs > slots else 1.0


def bytes_of(launch: Launch, unused: str = "") -> int:
    """The distinct elements of the tensor arguments but the unused ones, in bytes."""
    tensors: dict[int, int] = {}
    for name, a in zip(launch.kernel.arg_names, launch.args, strict=False):
        t = a if isinstance(a, Tensor) else getattr(a, "base", None)
        if isinstance(t, Tensor) and name not in unused.split(","):
            elements = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
            tensors[id(t)] = elements * t.element_size()
    return sum(tensors.values())


def flops_of(launch: Launch) -> int:
    """2 M N K for kernels that take M, N and K; 0 for the rest, which memory or instructions bound."""
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    return 2 * math.prod(named[name] for name in "MNK") if {"M", "N", "K"} <= named.keys() else 0


# --- the committed predictions ---


def row(op: str, case: str, dtype: str, launch: Launch, report: Report, config: str, gpu: Gpu) -> dict[str, Any]:
    predicted = predict(launch, report, dtype, gpu)
    numbers = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(predicted).items()}
    numbers["predicted_us"] = numbers.pop("us")
    return {
        "op": op, "case": case, "kernel": report.kernel, "dtype": dtype, "gpu": gpu.name, "target": gpu.target,
        "grid": list(launch.grid), "config": config, **numbers,
        "triton": report.triton, "model": MODEL, "assumptions": ASSUMPTIONS,
    }  # fmt: skip


def write_predictions(gpu: Gpu, rows: Iterable[dict[str, Any]], folder: Path = PREDICTED, results: Path | None = None) -> int:
    """Write bench/results/predicted/<gpu>.jsonl. Of an op that was measured on the GPU the old rows stay, and none is added.

    Returns how many rows are new or changed.
    """
    path = folder / f"{gpu.name}.jsonl"
    done = _measured_ops(gpu, results or folder.parent)
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [r for r in old if r["op"] in done]
    new = [r for r in rows if r["op"] not in done]
    untouched = [r for r in old if r["op"] not in done and r["op"] not in {n["op"] for n in new}]
    order = sorted([*kept, *untouched, *new], key=lambda r: (r["op"], r["case"], r["dtype"], r["kernel"]))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in order))
    return sum(r not in old for r in new)


def _measured_ops(gpu: Gpu, results: Path) -> set[str]:
    """Ops with a timed row of dlaccel's on this GPU anywhere in bench/results."""
    found = set()
    for path in results.glob("*/*.jsonl"):
        if path.parent.name == "predicted":
            continue
        for line in path.read_text().splitlines():
            measured = json.loads(line)
            if measured.get("provider") == "dlaccel" and measured.get("median_ms") and gpu.name in str(measured.get("gpu")):
                found.add(measured["op"])
    return found
