"""torch as a user would write it, in its fastest form: the baseline of every ratio. As a provider it is the control."""

import importlib

import torch
from torch import Tensor

from dlaccel.bench.case import Case, Function

NAME = "eager"
DISTRIBUTION = "torch"


def available() -> str | None:
    return None


def implementation(case: Case) -> Function:
    eager: Function = importlib.import_module(f"dlaccel.bench.cases.{case.op}").eager
    return eager


def backend(case: Case, tensors: tuple[Tensor, ...]) -> str:
    """What the eager form is; on a GPU also whether cuDNN is there to be chosen."""
    cudnn = tensors[0].is_cuda and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    return f"{case.eager_form or 'eager'}{f', cuDNN {torch.backends.cudnn.version()}' if cudnn else ''}"
