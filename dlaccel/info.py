"""`python -m dlaccel.info`: versions, devices, and what each op would run on here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from dlaccel import __version__, backend
from dlaccel.ops._register import REGISTRY

VARIABLES = (
    "DLACCEL_BACKEND",
    "DLACCEL_CHECK",
    "DLACCEL_CACHE_DIR",
    "DLACCEL_LOG",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cpu = f"cpu: {cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        return [cpu, "no CUDA or ROCm device: torch.cuda.is_available() is False"]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        problem = backend.device_problem(torch.device("cuda", i))
        found.append(
            f"cuda:{i}: {p.name}, capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 1e9:.0f} GB" + (f"; Triton not available: {problem}" if problem else "")
        )
    return [cpu, *found]


def report() -> str:
    """The text that `python -m dlaccel.info` prints."""
    lines = [
        f"dlaccel {__version__}",
        f"python {sys.version.split()[0]}, torch {torch.__version__}, triton {_version('triton')}, numpy {_version('numpy')}",
        f"cuda {torch.version.cuda}, hip {torch.version.hip}",
        *_devices(),
        f"triton backend: {backend.triton_problem() or 'importable'}" + (", interpreted" if backend.interpreting() else ""),
        "environment: " + (", ".join(f"{v}={os.environ[v]}" for v in VARIABLES if v in os.environ) or "nothing set"),
        "operators (`dlaccel.explain(op, *tensors)` tells what one call would run):",
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.empty(1, device=device)
    for name, op in sorted(REGISTRY.items()):
        if device.type == "cpu" and backend.forced != "triton":
            lines.append(f"  {name}: torch, because there is no GPU")
        else:
            problem = backend.device_problem(x.device)
            lines.append(f"  {name}: {'triton' if problem is None and op.has_kernel else f'torch, because {problem}'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
