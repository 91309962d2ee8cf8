"""Which backend runs a call, and why.

Backends are `triton` (the kernels) and `torch` (plain torch operators, any device). `auto`, the default, takes Triton for the
CUDA and ROCm tensors that the kernels accept and torch for the rest.

Environment variables, all of them read at import:

    DLACCEL_BACKEND    auto | triton | torch: the backend at start (default auto)
    DLACCEL_CHECK      1: the Triton kernels' callers check data-dependent arguments (targets), at the price of a host sync
    DLACCEL_CACHE_DIR  folder of tuned configurations (default $XDG_CACHE_HOME/dlaccel, ~/.cache/dlaccel)
    DLACCEL_LOG        a logging level such as INFO: print the backend of every operator that runs, once per reason, to stderr
                       (where `auto` calls aten on the CPU instead, none does; `explain` says where)
"""

from __future__ import annotations

import functools
import logging
import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dlaccel.ops._register import Op

BACKENDS = ("auto", "triton", "torch")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHECK = os.environ.get("DLACCEL_CHECK", "0") == "1"

log = logging.getLogger("dlaccel")
_logged: set[tuple[str, str]] = set()
_ON_THE_CPU = "the tensors are on the CPU"
_FORCED = "the backend was chosen by use_backend or DLACCEL_BACKEND"


def _valid(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# One setting for the process, as in torch.backends: CUDA's backward runs on threads of autograd's own.
forced = _valid(os.environ.get("DLACCEL_BACKEND", "auto"))
if "DLACCEL_LOG" in os.environ:
    log.addHandler(logging.StreamHandler())
    log.setLevel(os.environ["DLACCEL_LOG"].upper())


class use_backend:
    """Choose the backend of every dlaccel op: `auto`, `triton` or `torch`, for the whole process.

    Takes effect when called; as a context manager it restores the former choice at the end. `triton` raises at the first call
    that the kernels cannot run, with the reason.

    >>> with use_backend("torch"):
    ...     y = dlaccel.functional.linear_relu(x, weight)
    """

    def __init__(self, name: str) -> None:
        global forced
        self.previous, forced = forced, _valid(name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global forced
        forced = self.previous


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used in this process at all, or None."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # absent, or broken in any way
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def interpreting() -> bool:
    """Whether Triton kernels are interpreted on the CPU (TRITON_INTERPRET=1 when they were first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def device_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return triton_problem()
    if device.type == "meta" or (device.type == "cpu" and interpreting()):  # on meta launches are only recorded
        return triton_problem()
    return f"the kernels do not run on {device.type} (without a GPU, TRITON_INTERPRET=1 interprets them)"


def obstacle(op: Op, args: tuple[Any, ...]) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    x: Tensor = args[0]
    if not op.has_kernel:
        return "it has no Triton kernel"
    problem = device_problem(x.device)
    if problem is None and x.dtype not in KERNEL_DTYPES and not (x.dtype == torch.float64 and interpreting()):
        problem = f"the kernels do not take {x.dtype}"
    if problem is None and op.unsupported is not None:
        problem = op.unsupported(*args)
    return problem


def decide(op: Op, args: tuple[Any, ...]) -> tuple[str, str]:
    """(backend, reason) of a call."""
    if forced == "torch":
        return "torch", _FORCED
    if forced == "auto" and args[0].is_cpu:
        return "torch", _ON_THE_CPU
    problem = obstacle(op, args)
    if forced == "triton":
        if problem is not None:
            raise RuntimeError(f"{op.name}: backend 'triton' was chosen but {problem}")
        return "triton", _FORCED
    if problem is None and op.prefers_torch is not None:
        problem = op.prefers_torch(*args)
    return ("triton", "the kernels take the call") if problem is None else ("torch", problem)


def choose(op: Op, args: tuple[Any, ...]) -> str:
    """The backend of a call; `auto` logs its reason once."""
    if forced == "torch":  # the common cases first: this runs on every call
        return forced
    if forced == "auto" and args[0].is_cpu and (op.name, _ON_THE_CPU) in _logged:
        return "torch"
    backend, reason = decide(op, args)
    if forced == "auto" and (op.name, reason) not in _logged:
        _logged.add((op.name, reason))
        log.info("%s: %s, because %s", op.name, backend, reason)
    return backend
