"""The modules beside torch's own utilities: torch.fx, torch.jit.trace, what they say of themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dlaccel.functional as F
from dlaccel import nn
from tests.kit import DEVICE

MODULES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 6)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4, momentum=None), (3, 4, 2, 3, 2)),
    "BatchNormReLU1d": (lambda: nn.BatchNormReLU1d(4), (3, 4, 5)),
    "BatchNormReLU2d": (lambda: nn.BatchNormReLU2d(4, activation="relu6"), (3, 4, 5, 6)),
    "BatchNormReLU3d": (lambda: nn.BatchNormReLU3d(4, track_running_stats=False), (3, 4, 2, 3, 2)),
    "DepthwiseConv1d": (lambda: nn.DepthwiseConv1d(4, 8, 3, padding="same"), (2, 4, 9)),
    "DepthwiseConv2d": (lambda: nn.DepthwiseConv2d(4, 4, 3, 2, 1), (2, 4, 5, 6)),
    "DepthwiseConv2d circular": (lambda: nn.DepthwiseConv2d(4, 4, 3, 2, 1, padding_mode="circular"), (2, 4, 5, 6)),
    "DepthwiseSeparableBlock": (lambda: nn.DepthwiseSeparableBlock(4, 6), (2, 4, 5, 6)),
    "LinearReLU": (lambda: nn.LinearReLU(4, 5), (3, 4)),
    "SeparableConv2d": (lambda: nn.SeparableConv2d(4, 6, 3), (2, 4, 5, 6)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4, activation="relu"), (3, 4, 5, 6)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_torch_fx_traces(name: str, gradients: bool, training: bool) -> None:
    """The traced module computes the same, has the same state, and goes from training to evaluation as ours does."""
    make, shape = MODULES[name]
    x = torch.randn(shape, device=DEVICE)
    ours = torch.nn.Sequential(make(), torch.nn.Identity()).to(DEVICE).train(training)
    with torch.set_grad_enabled(gradients):
        traced = torch.fx.symbolic_trace(copy.deepcopy(ours))
        traced.graph.lint()
        torch.testing.assert_close(traced(x), ours(x))
        assert traced.state_dict().keys() == ours.state_dict().keys()
        for key, value in traced.state_dict().items():
            torch.testing.assert_close(value, ours.state_dict()[key], msg=key)
        torch.testing.assert_close(traced.eval()(x), ours.eval()(x))


def test_torch_fx_traces_functions() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(F.depthwise_conv2d(x, weight, padding=1), None, None, training=True, activation="relu")

    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [F.depthwise_conv2d, F.batch_norm]
    args = torch.randn(2, 3, 5, 6, device=DEVICE), torch.randn(3, 1, 3, 3, device=DEVICE)
    torch.testing.assert_close(traced(*args), model(*args))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["BatchNormReLU2d", "DepthwiseConv2d", "DepthwiseSeparableBlock", "SeparableConv2d"])
def test_torch_jit_traces(name: str) -> None:
    """torch traces again without gradients, to compare."""
    make, shape = MODULES[name]
    x, module = torch.randn(shape, device=DEVICE), make().to(DEVICE).eval()
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["DepthwiseSeparableBlock", "SeparableConv2d"])
def test_torch_compile_sees_the_submodules(name: str, gradients: bool) -> None:
    make, shape = MODULES[name]
    x, module = torch.randn(shape, device=DEVICE), make().to(DEVICE).eval()
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
