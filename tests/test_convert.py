"""Weights of Keras and timm in dlaccel's modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dlaccel.convert import from_timm, load_keras_weights
from dlaccel.nn import DepthwiseConv2d, DepthwiseSeparableBlock, SeparableConv2d

Array = NDArray[np.float32]
RANDOM = np.random.default_rng(0)


def array(*shape: int) -> Array:
    return RANDOM.standard_normal(shape, dtype=np.float32)


def keras_depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """Keras's DepthwiseConv2D, padding "valid", by its definition: x (N, H, W, C), kernel (KH, KW, C, M)."""
    kh, kw, channels, multiplier = kernel.shape
    n, height, width = x.shape[0], (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = np.zeros((n, height, width, channels * multiplier), np.float32)
    for i, j, c, m in np.ndindex(height, width, channels, multiplier):
        window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw, c]
        y[:, i, j, c * multiplier + m] = (window * kernel[:, :, c, m]).sum((1, 2))
    return y


def keras_batch_norm(x: Array, gamma: Array, beta: Array, mean: Array, variance: Array, eps: float) -> Array:
    y: Array = (x - mean) / np.sqrt(variance + np.float32(eps)) * gamma + beta
    return y


def applied(module: torch.nn.Module, x: Array) -> Array:
    """The module on an input as Keras has it, (N, H, W, C)."""
    with torch.no_grad():
        y: Array = module.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    return y


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_keras_depthwise(bias: bool, stride: int) -> None:
    x, kernel, shift = array(2, 7, 6, 3), array(3, 2, 3, 2), array(6)
    layer = DepthwiseConv2d(3, 6, (3, 2), stride, bias=bias)
    load_keras_weights(layer, [kernel, shift] if bias else [kernel])
    want = keras_depthwise(x, kernel, stride) + (shift if bias else 0)
    np.testing.assert_allclose(applied(layer, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_keras_separable(bias: bool) -> None:
    x, depthwise, pointwise, shift = array(2, 6, 7, 3), array(3, 3, 3, 2), array(1, 1, 6, 5), array(5)
    layer = SeparableConv2d(3, 5, 3, depth_multiplier=2, bias=bias).to(memory_format=torch.channels_last)
    load_keras_weights(layer, [depthwise, pointwise, shift] if bias else [depthwise, pointwise])
    want = keras_depthwise(x, depthwise, 1) @ pointwise[0, 0] + (shift if bias else 0)
    np.testing.assert_allclose(applied(layer, x), want, rtol=1e-5, atol=1e-5)
    assert layer.depthwise.weight.is_contiguous(memory_format=torch.channels_last)  # loading keeps the format


def test_keras_block() -> None:
    bn1, bn2 = ([array(c), array(c), array(c), np.abs(array(c)) + 0.5] for c in (3, 5))
    x, depthwise, pointwise = array(2, 6, 7, 3), array(3, 3, 3, 1), array(1, 1, 3, 5)
    block = DepthwiseSeparableBlock(3, 5, padding=0, eps=1e-3)
    load_keras_weights(block, [depthwise, *bn1, pointwise, *bn2])
    mid = np.maximum(keras_batch_norm(keras_depthwise(x, depthwise, 1), *bn1, eps=1e-3), 0)
    want = np.maximum(keras_batch_norm(mid @ pointwise[0, 0], *bn2, eps=1e-3), 0)
    np.testing.assert_allclose(applied(block, x), want, rtol=1e-5, atol=1e-5)


def test_keras_padding_of_stride_2() -> None:
    """Keras's "same" at stride 2 is a zero at the bottom and on the right, as the documentation of the loader says."""
    x, kernel = array(1, 6, 6, 2), array(3, 3, 2, 1)
    layer = DepthwiseConv2d(2, 2, 3, 2, bias=False)
    load_keras_weights(layer, [kernel])
    padded = torch.nn.functional.pad(torch.from_numpy(x).permute(0, 3, 1, 2), (0, 1, 0, 1)).permute(0, 2, 3, 1).numpy()
    same = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    np.testing.assert_allclose(applied(layer, padded), keras_depthwise(same, kernel, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module, arrays, error, match",
    [
        (torch.nn.Conv2d(2, 2, 3, groups=2), [], TypeError, "expected a DepthwiseConv2d, SeparableConv2d or"),
        (DepthwiseConv2d(2, 2, 3), [array(3, 3, 2, 1)], ValueError, r"expected 2 \(weight, bias\), got 1"),
        (DepthwiseConv2d(2, 2, 3, bias=False), [array(3, 3, 1, 2, 1)], ValueError, "weight: expected"),
        (
            SeparableConv2d(2, 4, 3, bias=False),
            [array(3, 3, 2, 1), array(1, 1, 4, 2)],
            ValueError,
            "pointwise.weight: expected",
        ),
    ],
)
def test_keras_refused(module: torch.nn.Module, arrays: list[Any], error: type[Exception], match: str) -> None:
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(error, match=match):
        load_keras_weights(module, arrays)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_timm_names() -> None:
    class Theirs(torch.nn.Module):
        """timm's DepthwiseSeparableConv with pw_act=True, noskip=True: its names, its order."""

        def __init__(self) -> None:
            super().__init__()
            self.conv_dw = torch.nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(4)
            self.conv_pw = torch.nn.Conv2d(4, 6, 1, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x)).relu())).relu()
            return y

    theirs, ours = Theirs(), DepthwiseSeparableBlock(4, 6, stride=2)
    x = torch.randn(3, 4, 7, 8)
    theirs(x)  # moves the running statistics
    ours.load_state_dict(from_timm(theirs.state_dict()))
    theirs.eval(), ours.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    prefixed = {f"blocks.0.{k}": v for k, v in theirs.state_dict().items()}
    assert [k.removeprefix("blocks.0.") for k in from_timm(prefixed)] == list(from_timm(theirs.state_dict()))
    separable = SeparableConv2d(4, 6, 3)
    names = {"conv_dw.weight": torch.ones(4, 1, 3, 3), "conv_pw.weight": torch.ones(6, 4, 1, 1), "conv_pw.bias": torch.ones(6)}
    separable.load_state_dict(from_timm(names))
