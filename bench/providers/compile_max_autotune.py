"""torch.compile of the eager form, mode max-autotune without CUDA graphs, so that launch costs stay comparable."""

import torch

from dlaccel.bench.case import Case, Function, families
from dlaccel.bench.providers.compile import available as available

NAME = "compile_max_autotune"
DISTRIBUTION = "torch"


def implementation(case: Case) -> Function:
    torch._dynamo.reset()
    compiled: Function = torch.compile(families()[case.op].eager, dynamic=False, mode="max-autotune-no-cudagraphs")
    return compiled
