"""Weights of other libraries for dlaccel's modules: Keras's arrays, timm's names.

    load_keras_weights(module, arrays)      DepthwiseConv2d, SeparableConv2d, DepthwiseSeparableBlock
    from_timm(state_dict)                   names of timm's DepthwiseSeparableConv and SeparableConv2d -> ours

Layouts, from the libraries' documentation (Keras 3 layers DepthwiseConv2D, SeparableConv2D, BatchNormalization; timm 1.0.31,
timm/models/_efficientnet_blocks.py and timm/layers/separable_conv.py). Neither library is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlaccel.nn import DepthwiseConv2d, DepthwiseSeparableBlock, SeparableConv2d

__all__ = ["from_timm", "load_keras_weights"]

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")  # Keras: gamma, beta, moving_mean, moving_variance


def _depthwise(kernel: Tensor) -> Tensor:
    """(KH, KW, C, M) -> (C * M, 1, KH, KW): filter m of channel c is output channel c M + m in both."""
    return kernel.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)


def _pointwise(kernel: Tensor) -> Tensor:
    """(1, 1, C, F) -> (F, C, 1, 1)."""
    return kernel.permute(3, 2, 0, 1)


def load_keras_weights(module: torch.nn.Module, arrays: Sequence[Any]) -> None:
    """Copy the arrays of a Keras layer's `get_weights()` into `module`, in place.

    Args:
        module: a `DepthwiseConv2d`, `SeparableConv2d` or `DepthwiseSeparableBlock` of `dlaccel.nn`.
        arrays: NumPy arrays or tensors in Keras's order and layout. DepthwiseConv2D: depthwise kernel (KH, KW, C, M), and bias
            if the module has one. SeparableConv2D: depthwise kernel, pointwise kernel (1, 1, C * M, F), and bias if the module
            has one. A block: the weights of its four layers one after another, depthwise kernel; gamma, beta, moving_mean,
            moving_variance; pointwise kernel; gamma, beta, moving_mean, moving_variance.

    Raises:
        TypeError: no such module.
        ValueError: another number of arrays, or an array of another shape.

    Keras's eps is 1e-3, its momentum 0.99 where ours is 0.01; and at stride 2 its padding "same" puts the odd zeros at the
    bottom and on the right, where a module pads both sides alike: pad such inputs first, `F.pad(x, (0, 1, 0, 1))` for 3x3.

    >>> load_keras_weights(layer, keras_layer.get_weights())
    """
    names: list[str]
    if isinstance(module, DepthwiseConv2d):
        names = ["weight"] + ["bias"] * (module.bias is not None)
    elif isinstance(module, SeparableConv2d):
        names = ["depthwise.weight", "pointwise.weight"] + ["pointwise.bias"] * (module.pointwise.bias is not None)
    elif isinstance(module, DepthwiseSeparableBlock):
        bn1, bn2 = ([f"{bn}.{name}" for name in _BATCH_NORM] for bn in ("bn1", "bn2"))
        names = ["depthwise.weight", *bn1, "pointwise.weight", *bn2]
    else:
        expected = "DepthwiseConv2d, SeparableConv2d or DepthwiseSeparableBlock"
        raise TypeError(f"load_keras_weights: module: expected a {expected}, got {type(module).__name__}")
    if len(arrays) != len(names):
        raise ValueError(f"load_keras_weights: arrays: expected {len(names)} ({', '.join(names)}), got {len(arrays)}")
    state, loaded = module.state_dict(), {}
    for name, array in zip(names, arrays, strict=True):
        t = torch.as_tensor(array)
        if t.dim() == 4:
            t = _pointwise(t) if name.startswith("pointwise") else _depthwise(t)
        if t.shape != state[name].shape:
            raise ValueError(
                f"load_keras_weights: {name}: expected {tuple(state[name].shape)} in torch's layout, got {tuple(t.shape)} "
                f"from an array of {tuple(torch.as_tensor(array).shape)}"
            )
        loaded[name] = t
    module.load_state_dict(loaded, strict=False)  # num_batches_tracked, which Keras has not, stays


def from_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with timm's names conv_dw and conv_pw as depthwise and pointwise; every other name stays.

    For timm's `DepthwiseSeparableConv` (conv_dw, bn1, conv_pw, bn2) the result is that of a `DepthwiseSeparableBlock`, for its
    `SeparableConv2d` (conv_dw, conv_pw) that of a `SeparableConv2d`. Names may have prefixes ("blocks.0.0.conv_dw.weight").

    The block computes what timm's does with pw_act=True and noskip=True, as in MobileNetV1: with an activation at its end and
    without a residual connection. timm's squeeze-and-excitation, `se`, has no place in it: load_state_dict refuses its names.

    >>> block.load_state_dict(from_timm(timm_block.state_dict()))
    """
    names = {"conv_dw": "depthwise", "conv_pw": "pointwise"}
    return {".".join(names.get(part, part) for part in key.split(".")): value for key, value in state_dict.items()}
