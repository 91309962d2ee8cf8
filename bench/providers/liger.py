"""Liger-Kernel (BSD-2-Clause). Its cross-entropy writes the gradient into the logits during the forward pass."""

from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.provider import importable, need, pick

NAME = "liger"
DISTRIBUTION = "liger-kernel"
TRITON = True
OVERWRITES = ("cross_entropy",)


def available() -> str | None:
    return importable("liger_kernel.transformers.functional")


def implementation(case: Case) -> Function:
    return pick(case, cross_entropy=cross_entropy)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    num_items: int | Tensor | None = None,
) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    need(input.dim() == 2 and not target.is_floating_point(), "takes (N, C) logits and class indices only")
    need(num_items is None and size_average is None and reduce is None, "has no such option")
    loss: Tensor = liger_cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss
