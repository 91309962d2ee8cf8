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
    "DepthwiseConv2d",
    "DepthwiseSeparableBlock",
    "LinearReLU",
    "SeparableConv2d",
    "SyncBatchNorm",
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
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, activation={self.activation}"


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

    Input (N, C, \\*) or (C,), target of classes or probabilities; see `dlaccel.functional.cross_entropy`. Its `fused` is an
    argument of the module, and its `num_items`, which changes from step to step, one of the call.

    >>> loss = CrossEntropyLoss(label_smoothing=0.1)(torch.randn(32, 10), torch.randint(10, (32,)))
    """

    def __init__(self, *args: Any, fused: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused = fused

    def forward(self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            num_items=num_items,
            fused=self.fused,
        )


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` for any device and backend of torch.distributed, gloo on the CPU included.

    In training, the statistics are those of all processes of `process_group`, whose inputs may differ in size or be empty.
    Arguments and state_dict are torch's, and `activation`: None, "relu" or "relu6", behind the sum with `residual`. Outside of
    a process group, in evaluation and in a group of one it is batch norm. Differentiable once where it synchronises.

    >>> model = SyncBatchNorm.convert_sync_batchnorm(model)
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return _batch_norm(self, input, residual, self.activation)
        group: Any = self.process_group or distributed.group.WORLD
        if distributed.get_world_size(group) == 1:
            return _batch_norm(self, input, residual, self.activation)
        from dlaccel.distributed import sync_batch_norm

        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        tracks = self.track_running_stats
        return sync_batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.momentum,
            self.eps,
            group,
            residual=residual,
            activation=self.activation,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Replaces every batch norm in `module`, the fused ones included; parameters and buffers stay the same objects.

        Returns `module`, or the new layer where `module` is a batch norm itself.
        """
        converted = module
        if isinstance(module, _BatchNorm):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
                activation=getattr(module, "activation", None),
            )
            converted.weight, converted.bias = module.weight, module.bias
            converted.running_mean, converted.running_var = module.running_mean, module.running_var
            converted.num_batches_tracked = module.num_batches_tracked
            converted.train(module.training)
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted

    def extra_repr(self) -> str:
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return plain if self.activation is None else f"{plain}, activation={self.activation}"


class LinearReLU(torch.nn.Linear):
    """`torch.nn.Linear` followed by ReLU in one operator.

    Arguments, parameters and state_dict are those of `torch.nn.Linear`; input (\\*, in_features), output (\\*, out_features).
    `isinstance(m, torch.nn.Linear)` holds, but the output is that behind the ReLU.

    >>> layer = LinearReLU(784, 512)
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, self.weight, self.bias)


_Size = int | tuple[int, int]


class DepthwiseConv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` with groups = in_channels on `dlaccel.functional.depthwise_conv2d`; input (N, C, H, W) or (C, H, W).

    Arguments and state_dict are those of `torch.nn.Conv2d`; `groups` may be left out, and raises ValueError if it is another
    number than in_channels. out_channels is a multiple of in_channels.

    >>> layer = DepthwiseConv2d(32, 32, 5, padding=2)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups not in (None, in_channels):
            raise ValueError(f"DepthwiseConv2d: groups: expected in_channels, {in_channels}, got {groups}")
        options: dict[str, Any] = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, **options)

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return F.depthwise_conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation)
        input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        return F.depthwise_conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation)


class SeparableConv2d(torch.nn.Module):
    """A depthwise, then a 1x1 convolution, as `dlaccel.functional.separable_conv2d`; input (N, C, H, W) or (C, H, W).

    The submodules are `depthwise` (a `DepthwiseConv2d` without bias, with depth_multiplier filters a channel) and `pointwise`
    (a 1x1 `torch.nn.Conv2d`, which has the bias): the state_dict is that of the same torch modules under those names. Under
    `torch.no_grad` both convolutions may be one operator, and the submodules are not called.

    >>> layer = SeparableConv2d(32, 64, 3, padding=1)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        mid = in_channels * depth_multiplier
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.depthwise = DepthwiseConv2d(in_channels, mid, kernel_size, stride, padding, dilation, bias=False, **where)
        self.pointwise = torch.nn.Conv2d(mid, out_channels, 1, bias=bias, **where)

    def forward(self, input: Tensor) -> Tensor:
        dw, pw = self.depthwise, self.pointwise
        if torch.is_grad_enabled():
            result: Tensor = pw(dw(input))
            return result
        return F.separable_conv2d(input, dw.weight, pw.weight, pw.bias, dw.stride, dw.padding, dw.dilation)


class DepthwiseSeparableBlock(torch.nn.Module):
    """MobileNet's block, as `dlaccel.functional.depthwise_separable_block`; input (N, in_channels, H, W).

    The submodules are `depthwise`, `bn1`, `pointwise` and `bn2`, so the state_dict is that of the same torch modules under
    those names. padding=None keeps the size where stride is 1 and the kernel odd. activation: "relu" or "relu6".

    >>> layer = DepthwiseSeparableBlock(32, 64, stride=2)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2) if padding is None else padding
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.depthwise = DepthwiseConv2d(in_channels, in_channels, kernel_size, stride, padding, dilation, bias=False, **where)
        self.bn1 = BatchNormReLU2d(in_channels, eps, momentum, activation=activation, **where)
        self.pointwise = torch.nn.Conv2d(in_channels, out_channels, 1, bias=False, **where)
        self.bn2 = BatchNormReLU2d(out_channels, eps, momentum, activation=activation, **where)

    def forward(self, input: Tensor) -> Tensor:
        bn1, bn2 = self.bn1, self.bn2
        fixed = all(not bn.training and bn.running_mean is not None for bn in (bn1, bn2))
        if fixed and bn1.eps == bn2.eps and not torch.is_grad_enabled():
            return self._infer(input)
        result: Tensor = bn2(self.pointwise(bn1(self.depthwise(input))))
        return result

    def _infer(self, input: Tensor) -> Tensor:
        """With the batch norms folded into the convolutions."""
        dw, bn1, bn2 = self.depthwise, self.bn1, self.bn2
        return F.depthwise_separable_block(
            input,
            dw.weight,
            *(bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var),
            self.pointwise.weight,
            *(bn2.weight, bn2.bias, bn2.running_mean, bn2.running_var),
            stride=dw.stride,
            padding=dw.padding,
            dilation=dw.dilation,
            eps=bn1.eps,
            activation=bn1.activation,
        )
