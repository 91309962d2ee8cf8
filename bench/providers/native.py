"""torch's own kernels: eager with cuDNN switched off on a GPU, with oneDNN switched off on a CPU.

Of the depthwise kernels that is _conv_depthwise2d and its gradients; the 1x1 convolutions beside them are torch's own too.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

from dlaccel.bench.case import Case, Function, families
from dlaccel.bench.provider import need, switched

NAME = "native"
DISTRIBUTION = "torch"


def available() -> str | None:
    return None


def implementation(case: Case) -> Function:
    need(case.op != "cross_entropy", "eager uses no other library here")
    eager: Function = families()[case.op].eager
    return eager


def context() -> AbstractContextManager[Any]:
    return switched(torch.backends.cudnn if torch.cuda.is_available() else torch.backends.mkldnn, enabled=False)
