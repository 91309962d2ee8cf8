"""torch's own kernels: eager with cuDNN switched off on a GPU, with oneDNN switched off on a CPU."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from dlaccel.bench.case import Case, Function, families
from dlaccel.bench.provider import need

NAME = "native"
DISTRIBUTION = "torch"


def available() -> str | None:
    return None


def implementation(case: Case) -> Function:
    need(case.op != "cross_entropy", "eager uses no other library here")
    eager: Function = families()[case.op].eager
    return eager


def context() -> AbstractContextManager[Any]:
    if torch.cuda.is_available():
        return torch.backends.cudnn.flags(enabled=False)
    return torch.backends.mkldnn.flags(enabled=False)
