"""torch.compile of the eager form, default mode."""

import shutil

import torch

from dlaccel.bench.case import Case, Function, families

NAME = "compile"
DISTRIBUTION = "torch"


def available() -> str | None:
    if torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++") or shutil.which("gcc"):
        return None
    return "torch.compile needs a C++ compiler"


def implementation(case: Case) -> Function:
    torch._dynamo.reset()  # one case's graphs must not count against the next one's recompile limit
    compiled: Function = torch.compile(families()[case.op].eager, dynamic=False)
    return compiled
