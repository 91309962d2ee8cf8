"""Modules: subclasses of torch.nn with the same parameters, buffers and state_dict."""

from __future__ import annotations

import torch
from torch import Tensor

from dlaccel import functional as F

__all__ = ["LinearReLU"]


class LinearReLU(torch.nn.Linear):
    """`torch.nn.Linear` followed by ReLU in one operator.

    Arguments, parameters and state_dict are those of `torch.nn.Linear`; input (\\*, in_features), output (\\*, out_features).
    `isinstance(m, torch.nn.Linear)` holds, but the output is that behind the ReLU.

    >>> layer = LinearReLU(784, 512)
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, self.weight, self.bias)
