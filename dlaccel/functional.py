"""torch-shaped functions. Each runs a registered operator `torch.ops.dlaccel.<name>`: differentiable to any order, known to
autocast, torch.compile, torch.func, export and DTensor. See `dlaccel.explain` for what a call would run on."""

from __future__ import annotations

from torch import Tensor

from dlaccel.ops import linear_relu as _linear_relu

__all__ = ["linear_relu"]


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`relu(x @ weight.T + bias)`: `torch.relu(torch.nn.functional.linear(x, weight, bias))` in one operator.

    NaN passes through, -0.0 stays, and the gradient at 0 is 0, as in torch. For `relu(a @ b)` pass `weight=b.mT`.

    Args:
        x: (\\*, K), floating point, any strides.
        weight: (N, K), the layout of `torch.nn.Linear`.
        bias: (N,).

    Returns:
        (\\*, N), contiguous, in x's dtype (under autocast in autocast's).

    Raises:
        RuntimeError: shapes do not match, or dtypes or devices differ.

    >>> y = linear_relu(torch.randn(32, 784), torch.randn(512, 784), torch.zeros(512))
    """
    return _linear_relu.linear_relu(x, weight, bias)
