"""Cut Cross-Entropy (Apple): linear layer and cross-entropy in one, so it is compared with that composite only."""

from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.provider import importable, need, pick

NAME = "cce"
DISTRIBUTION = "cut-cross-entropy"


def available() -> str | None:
    return importable("cut_cross_entropy")


def implementation(case: Case) -> Function:
    return pick(case, linear_cross_entropy=linear_cross_entropy)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as function

    need(bias is None, "takes no bias")
    impl = "cce" if input.is_cuda else "torch_compile"
    loss: Tensor = function(input, weight, target, ignore_index=ignore_index, reduction=reduction, impl=impl)
    return loss
