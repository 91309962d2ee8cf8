"""Modules: subclasses of torch.nn with the same parameters, buffers and state_dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dlaccel import functional as F

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "CrossEntropyLoss",
    "LinearReLU",
]


def _batch_norm(m: _BatchNorm, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The forward of a batch norm module; the counter goes to the operator, so that no call waits for the device."""
    m._check_input_dim(input)
    updates = m.training and m.track_running_stats
    keeps = updates or not m.training
    counter = m.num_batches_tracked if updates else None
    momentum = 0.0 if m.momentum is None and counter is None else m.momentum
    return F.batch_norm(
        input,
        m.running_mean if keeps else None,
        m.running_var if keeps else None,
        m.weight,
        m.bias,
        m.training or (m.running_mean is None and m.running_var is None),
        momentum,
        m.eps,
        residual=residual,
        activation=activation,
        num_batches_tracked=counter,
    )


class BatchNorm1d(torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on `dlaccel.functional.batch_norm`: same arguments and state_dict. Input (N, C) or (N, C, L)."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on `dlaccel.functional.batch_norm`: same arguments, state_dict, results. Input (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on `dlaccel.functional.batch_norm`: same arguments, state_dict, results. Input (N, C, D, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class _Activated(_BatchNorm):
    """Batch norm, then the sum with a residual if one is given, then the activation, in one operator."""

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if activation not in ("relu", "relu6"):
            raise ValueError(f"{type(self).__name__}: activation: expected 'relu' or 'relu6', got {activation!r}")
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _batch_norm(self, input, residual, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class BatchNormReLU1d(_Activated, torch.nn.BatchNorm1d):
    """`act(BatchNorm1d(input) + residual)` in one operator; input (N, C) or (N, C, L), residual like it or None.

    Arguments and state_dict are those of `torch.nn.BatchNorm1d`, and `activation`: "relu" or "relu6".

    >>> layer = BatchNormReLU1d(64)
    """


class BatchNormReLU2d(_Activated, torch.nn.BatchNorm2d):
    """`act(BatchNorm2d(input) + residual)` in one operator; input (N, C, H, W), residual like it or None.

    Arguments and state_dict are those of `torch.nn.BatchNorm2d`, and `activation`: "relu" or "relu6".

    >>> layer = BatchNormReLU2d(64, activation="relu6")
    >>> y = layer(x, residual=shortcut)
    """


class BatchNormReLU3d(_Activated, torch.nn.BatchNorm3d):
    """`act(BatchNorm3d(input) + residual)` in one operator; input (N, C, D, H, W), residual like it or None.

    Arguments and state_dict are those of `torch.nn.BatchNorm3d`, and `activation`: "relu" or "relu6".

    >>> layer = BatchNormReLU3d(64)
    """


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`: same arguments, same buffer `weight`, same results.

    Input (N, C, \\*) or (C,), target of classes or probabilities; see `dlaccel.functional.cross_entropy`.

    >>> loss = CrossEntropyLoss(label_smoothing=0.1)(torch.randn(32, 10), torch.randint(10, (32,)))
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearReLU(torch.nn.Linear):
    """`torch.nn.Linear` followed by ReLU in one operator.

    Arguments, parameters and state_dict are those of `torch.nn.Linear`; input (\\*, in_features), output (\\*, out_features).
    `isinstance(m, torch.nn.Linear)` holds, but the output is that behind the ReLU.

    >>> layer = LinearReLU(784, 512)
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, self.weight, self.bias)
