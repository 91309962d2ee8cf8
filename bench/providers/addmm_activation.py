"""torch._addmm_activation: torch's one route to cuBLASLt's fused bias and ReLU. It has no derivative."""

import math

import torch
from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.provider import need, pick

NAME = "addmm_activation"
DISTRIBUTION = "torch"
MODES = ("fwd",)


def available() -> str | None:
    return None if hasattr(torch, "_addmm_activation") else "this torch has no _addmm_activation"


def implementation(case: Case) -> Function:
    return pick(case, linear_relu=linear_relu)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    need(bias is not None, "needs a bias")
    assert bias is not None
    y = torch._addmm_activation(bias, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.t())
    return y.view(*x.shape[:-1], weight.shape[0])
