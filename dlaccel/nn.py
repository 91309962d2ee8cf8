"""Modules: subclasses of torch.nn with the same parameters, buffers and state_dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.modules.utils import _pair

from dlaccel import functional as F

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "CrossEntropyLoss",
    "DepthwiseConv1d",
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
    return F.batch_norm(
        input,
        m.running_mean if keeps else None,
        m.running_var if keeps else None,
        m.weight,
        m.bias,
        m.training or (m.running_mean is None and m.running_var is None),
        m.momentum,
        m.eps,
        residual=residual,
        activation=activation,
        num_batches_tracked=m.num_batches_tracked if updates else None,
    )


def _sync_batch_norm(m: SyncBatchNorm, input: Tensor, residual: Tensor | None) -> Tensor:
    """The forward of SyncBatchNorm."""
    distributed = torch.distributed
    if not (m.training and distributed.is_available() and distributed.is_initialized()):
        return _batch_norm(m, input, residual, m.activation)
    group: Any = m.process_group or distributed.group.WORLD
    if distributed.get_world_size(group) == 1:
        return _batch_norm(m, input, residual, m.activation)
    from dlaccel.distributed import sync_batch_norm

    m._check_input_dim(input)
    m._check_non_zero_input_channels(input)
    tracks = m.track_running_stats
    return sync_batch_norm(
        input,
        m.running_mean if tracks else None,
        m.running_var if tracks else None,
        m.weight,
        m.bias,
        m.momentum,
        m.eps,
        group,
        residual=residual,
        activation=m.activation,
        num_batches_tracked=m.num_batches_tracked if tracks else None,
    )


# They look at the input: to torch.fx a call is one node, as one of torch's own batch norm modules is.
torch.fx.wrap("_batch_norm")
torch.fx.wrap("_sync_batch_norm")


def _check_activation(m: torch.nn.Module, activation: str | None, *known: str | None) -> None:
    if activation not in known:
        *others, last = map(repr, known)
        raise ValueError(f"{type(m).__name__}: activation: expected {', '.join(others)} or {last}, got {activation!r}")


def _infers(input: Tensor) -> bool:
    """Whether a call without gradients may leave its submodules out; a tracer's graph serves other calls too."""
    traced: bool = torch.jit.is_tracing() or isinstance(input, torch.fx.Proxy)  # type: ignore[attr-defined, no-untyped-call]
    return not (torch.is_grad_enabled() or traced)


def _is_forward(module: torch.nn.Module, *classes: type[torch.nn.Module]) -> bool:
    """Whether a call of `module` is the forward of one of these classes and nothing more.

    torch's utilities, and others', put a class of their own in its place, hook the call (some make the weight there) or give
    the module another forward.
    """
    return (
        type(module) in classes
        and not (module._forward_pre_hooks or module._forward_hooks or _global_forward_pre_hooks or _global_forward_hooks)
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
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
        _check_activation(self, activation, "relu", "relu6")
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _batch_norm(self, input, residual, self.activation)

    def extra_repr(self) -> str:
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, activation={self.activation}"


class BatchNormReLU1d(_Activated, torch.nn.BatchNorm1d):
    """`act(BatchNorm1d(input) + residual)` in one operator; input (N, C) or (N, C, L), residual like it or None.

    Arguments and state_dict are those of `torch.nn.BatchNorm1d`, and `activation`: "relu" or "relu6".
    `isinstance(m, torch.nn.BatchNorm1d)` holds, but the output is that behind the activation: what puts another layer in the
    place of a batch norm drops it (`torch.nn.SyncBatchNorm.convert_sync_batchnorm`: use that of `dlaccel.nn.SyncBatchNorm`;
    `torch.nn.utils.fusion.fuse_conv_bn_eval`).

    >>> layer = BatchNormReLU1d(64)
    """


class BatchNormReLU2d(_Activated, torch.nn.BatchNorm2d):
    """`act(BatchNorm2d(input) + residual)` in one operator; input (N, C, H, W), residual like it or None.

    Arguments and state_dict are those of `torch.nn.BatchNorm2d`, and `activation`: "relu" or "relu6".
    `isinstance(m, torch.nn.BatchNorm2d)` holds, but the output is that behind the activation: what puts another layer in the
    place of a batch norm drops it (`torch.nn.SyncBatchNorm.convert_sync_batchnorm`: use that of `dlaccel.nn.SyncBatchNorm`;
    `torch.nn.utils.fusion.fuse_conv_bn_eval`).

    >>> layer = BatchNormReLU2d(64, activation="relu6")
    >>> y = layer(x, residual=shortcut)
    """


class BatchNormReLU3d(_Activated, torch.nn.BatchNorm3d):
    """`act(BatchNorm3d(input) + residual)` in one operator; input (N, C, D, H, W), residual like it or None.

    Arguments and state_dict are those of `torch.nn.BatchNorm3d`, and `activation`: "relu" or "relu6".
    `isinstance(m, torch.nn.BatchNorm3d)` holds, but the output is that behind the activation: what puts another layer in the
    place of a batch norm drops it (`torch.nn.SyncBatchNorm.convert_sync_batchnorm`: use that of `dlaccel.nn.SyncBatchNorm`;
    `torch.nn.utils.fusion.fuse_conv_bn_eval`).

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
    Arguments and state_dict are torch's, and `activation`: None, "relu" or "relu6", behind the sum with `residual`; torch's
    utilities drop it as they do that of `BatchNormReLU2d`. Outside of a process group, in evaluation and in a group of one it
    is batch norm. Differentiable once where it synchronises.

    >>> model = SyncBatchNorm.convert_sync_batchnorm(model)
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_activation(self, activation, None, "relu", "relu6")
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _sync_batch_norm(self, input, residual)

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


_Size = int | tuple[int, ...]


class _Depthwise(_ConvNd):
    """A convolution with groups = in_channels."""

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
            raise ValueError(f"{type(self).__name__}: groups: expected in_channels, {in_channels}, got {groups}")
        options: dict[str, Any] = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        initialise: Any = super().__init__  # that of Conv1d or Conv2d
        initialise(in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, **options)

    def forward(self, input: Tensor) -> Tensor:
        convolve: Any = F.depthwise_conv1d if len(self.kernel_size) == 1 else F.depthwise_conv2d
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            padding, input = 0, torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        result: Tensor = convolve(input, self.weight, self.bias, self.stride, padding, self.dilation)
        return result


class DepthwiseConv1d(_Depthwise, torch.nn.Conv1d):
    """`torch.nn.Conv1d` with groups = in_channels on `dlaccel.functional.depthwise_conv1d`; input (N, C, L) or (C, L).

    Arguments and state_dict are those of `torch.nn.Conv1d`; `groups` as in `DepthwiseConv2d`.

    >>> layer = DepthwiseConv1d(32, 32, 4, padding="same")
    """


class DepthwiseConv2d(_Depthwise, torch.nn.Conv2d):
    """`torch.nn.Conv2d` with groups = in_channels on `dlaccel.functional.depthwise_conv2d`; input (N, C, H, W) or (C, H, W).

    Arguments and state_dict are those of `torch.nn.Conv2d`; `groups` may be left out, and raises ValueError if it is another
    number than in_channels. out_channels is a multiple of in_channels.

    >>> layer = DepthwiseConv2d(32, 32, 5, padding=2)
    """


def _has_bias(module: torch.nn.Module) -> bool:
    return module._parameters.get("bias") is not None  # an eighth of the time of module.bias


def _is_depthwise(module: torch.nn.Conv2d) -> bool:
    """Whether a call is `depthwise_conv2d` with the module's weight and geometry."""
    return _is_forward(module, DepthwiseConv2d) and module.padding_mode == "zeros" and not _has_bias(module)


def _is_pointwise(module: torch.nn.Conv2d) -> bool:
    """Whether a call is `conv2d` with the module's weight, 1x1, and bias."""
    return (
        _is_forward(module, torch.nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


class SeparableConv2d(torch.nn.Module):
    """A depthwise, then a 1x1 convolution, as `dlaccel.functional.separable_conv2d`; input (N, C, H, W) or (C, H, W).

    The submodules are `depthwise` (a `DepthwiseConv2d` without bias, with depth_multiplier filters a channel) and `pointwise`
    (a 1x1 `torch.nn.Conv2d`, which has the bias): the state_dict is that of the same torch modules under those names. Under
    `torch.no_grad` both convolutions may be one operator: then the submodules are not called, unless one of them has been
    replaced, parametrized, wrapped or hooked (also by `torch.nn.utils.weight_norm`, `prune`, `fully_shard` and their like).

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
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        mid = in_channels * depth_multiplier
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        geometry = kernel_size, stride, padding, dilation
        self.depthwise = DepthwiseConv2d(in_channels, mid, *geometry, bias=False, padding_mode=padding_mode, **where)
        self.pointwise = torch.nn.Conv2d(mid, out_channels, 1, bias=bias, **where)

    def forward(self, input: Tensor) -> Tensor:
        dw, pw = self.depthwise, self.pointwise
        if _infers(input) and _is_depthwise(dw) and _is_pointwise(pw):
            return F.separable_conv2d(input, dw.weight, pw.weight, pw.bias, dw.stride, dw.padding, dw.dilation)
        result: Tensor = pw(dw(input))
        return result


class DepthwiseSeparableBlock(torch.nn.Module):
    """MobileNet's block, as `dlaccel.functional.depthwise_separable_block`; input (N, in_channels, H, W).

    The submodules are `depthwise`, `bn1`, `pointwise` and `bn2`, so the state_dict is that of the same torch modules under
    those names. padding=None keeps the size where stride is 1 and the kernel odd. activation: "relu" or "relu6". In evaluation
    under `torch.no_grad` the batch norms are folded into the convolutions, and the submodules are not called, unless one of
    them has been changed as `SeparableConv2d` says.

    >>> layer = DepthwiseSeparableBlock(32, 64, stride=2)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size = 3,
        stride: _Size = 1,
        padding: str | _Size | None = None,
        dilation: _Size = 1,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            top, left = (d * (k // 2) for d, k in zip(_pair(dilation), _pair(kernel_size), strict=True))
            padding = top, left
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.depthwise = DepthwiseConv2d(in_channels, in_channels, kernel_size, stride, padding, dilation, bias=False, **where)
        self.bn1 = BatchNormReLU2d(in_channels, eps, momentum, activation=activation, **where)
        self.pointwise = torch.nn.Conv2d(in_channels, out_channels, 1, bias=False, **where)
        self.bn2 = BatchNormReLU2d(out_channels, eps, momentum, activation=activation, **where)

    def forward(self, input: Tensor) -> Tensor:
        dw, bn1, pw, bn2 = self.depthwise, self.bn1, self.pointwise, self.bn2
        if (
            _infers(input)
            and not (bn1.training or bn2.training)
            and _is_depthwise(dw)
            and _is_forward(bn1, BatchNormReLU2d, SyncBatchNorm)
            and _is_pointwise(pw)
            and not _has_bias(pw)
            and _is_forward(bn2, BatchNormReLU2d, SyncBatchNorm)
            and bn1.eps == bn2.eps
            and bn1.activation == bn2.activation is not None
        ):
            state1, state2 = ((bn.weight, bn.bias, bn.running_mean, bn.running_var) for bn in (bn1, bn2))
            if state1[2] is not None and state2[2] is not None:
                options: Any = dw.stride, dw.padding, dw.dilation, False, 0.0, bn1.eps, bn1.activation
                return F.depthwise_separable_block(input, dw.weight, *state1, pw.weight, *state2, *options)
        norms: tuple[torch.nn.Module, ...] = bn1, bn2
        for bn in norms:
            if type(bn) is torch.nn.SyncBatchNorm:
                raise TypeError(
                    "DepthwiseSeparableBlock: torch.nn.SyncBatchNorm has no activation, which the batch norm before it had: "
                    "convert with dlaccel.nn.SyncBatchNorm.convert_sync_batchnorm"
                )
        result: Tensor = bn2(pw(bn1(dw(input))))
        return result
