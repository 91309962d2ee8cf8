"""separable_conv2d, depthwise_separable_block and their modules: what the contract tests do not cover."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import dlaccel
import dlaccel.functional as F
from dlaccel.bench.cases.separable_conv2d import eager, reference
from dlaccel.nn import DepthwiseSeparableBlock, SeparableConv2d
from tests.kit import DEVICE, LAYOUTS, check


def torchs_block(channels: int, out: int, kernel: int = 3, stride: int = 1, dilation: int = 1, act: Any = torch.relu) -> Any:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = torch.nn.Conv2d(
                channels, channels, kernel, stride, dilation * (kernel // 2), dilation, channels, bias=False
            )
            self.bn1 = torch.nn.BatchNorm2d(channels)
            self.pointwise = torch.nn.Conv2d(channels, out, 1, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(out)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = act(self.bn2(self.pointwise(act(self.bn1(self.depthwise(x))))))
            return result

    return Block().to(DEVICE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "column slice"])
@pytest.mark.parametrize("options", [(1, 1, 1), (2, 0, 1), (1, 2, 2)], ids=str)
def test_separable_conv2d(backend: str, options: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 5, 7, 6, device=DEVICE))
    weights = [torch.randn(s, device=DEVICE) / 3 for s in ((10, 1, 3, 3), (7, 10, 1, 1), (7,))]
    check(
        lambda *t: F.separable_conv2d(*t, *options), lambda *t: eager(*t, *options),
        [t.requires_grad_() for t in (x, *weights)], reference=lambda *t: reference(*t, *options),
        terms=[32.0, 600.0, 600.0, 3000.0, 300.0],
    )  # fmt: skip


def test_separable_module_is_torchs_two(backend: str) -> None:
    ours = SeparableConv2d(4, 6, 3, stride=2, padding=1, depth_multiplier=2, device=DEVICE)
    theirs = torch.nn.Sequential()
    theirs.depthwise = torch.nn.Conv2d(4, 8, 3, 2, 1, groups=4, bias=False, device=DEVICE)
    theirs.pointwise = torch.nn.Conv2d(8, 6, 1, device=DEVICE)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for shape in ((2, 4, 7, 6), (4, 7, 6)):
        x = torch.randn(shape, device=DEVICE)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_block_trains_as_torchs(layout: str, activation: str) -> None:
    """Three steps of SGD, then evaluation: losses, parameters, statistics and counters."""
    torch.manual_seed(0)
    act = torch.relu if activation == "relu" else torch.nn.functional.relu6
    theirs = torchs_block(6, 9, 5, 2, act=act)
    ours = DepthwiseSeparableBlock(6, 9, 5, 2, activation=activation, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = LAYOUTS[layout](torch.randn(4, 6, 11, 9, device=DEVICE) * 3)
    losses: list[list[float]] = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0])
    for (name, p), q in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, msg=name)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("affine", [True, False])
def test_folded_evaluation(affine: bool) -> None:
    """Without a gradient the batch norms are folded into the convolutions; with one they are not. Same numbers."""
    torch.manual_seed(0)
    block = DepthwiseSeparableBlock(5, 7, dilation=2).to(DEVICE)
    for bn in (block.bn1, block.bn2):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        if affine:
            torch.nn.init.normal_(bn.weight)
            torch.nn.init.normal_(bn.bias)
        else:
            bn.weight = bn.bias = None
    block.eval()
    x = torch.randn(2, 5, 8, 7, device=DEVICE)
    calls = []
    block.bn1.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        inferred = block(x)
    assert not calls
    torch.testing.assert_close(inferred, block(x))
    assert len(calls) == 1


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    """bn1 in evaluation inside a block that trains: its own flag decides."""
    theirs, ours = torchs_block(4, 5), DepthwiseSeparableBlock(4, 5).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 6, 6, device=DEVICE)
    for model in (theirs, ours):
        model.bn1.eval()
        with torch.no_grad():
            model(x)
    for (name, p), q in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, msg=name)


def test_functional_block_updates_statistics_and_counters() -> None:
    block = DepthwiseSeparableBlock(4, 6, stride=2).to(DEVICE)
    state = {k: v.clone() for k, v in block.state_dict().items()}
    x = torch.randn(3, 4, 7, 7, device=DEVICE)
    y = block(x)
    bn = [[state[f"bn{i}.{n}"] for n in ("weight", "bias", "running_mean", "running_var")] for i in (1, 2)]
    counters = {f"bn{i}_num_batches_tracked": state[f"bn{i}.num_batches_tracked"] for i in (1, 2)}
    got = F.depthwise_separable_block(
        x, state["depthwise.weight"], *bn[0], state["pointwise.weight"], *bn[1], 2, training=True, **counters
    )
    torch.testing.assert_close(got, y)
    for name, p in block.state_dict().items():
        torch.testing.assert_close(state[name], p, msg=name)


def test_deepcopy_shares_nothing() -> None:
    block, x = DepthwiseSeparableBlock(4, 5), torch.randn(2, 4, 6, 6)
    other = copy.deepcopy(block)
    other(x)
    assert int(block.bn1.num_batches_tracked) == 0 and int(other.bn1.num_batches_tracked) == 1


def test_explain_names_every_operator() -> None:
    x, dw, pw = torch.ones(2, 4, 6, 6), torch.ones(4, 1, 3, 3), torch.ones(5, 4, 1, 1)
    bn = [[torch.ones(c) for _ in range(4)] for c in (4, 5)]
    with dlaccel.use_backend("torch"):
        found = dlaccel.explain(F.depthwise_separable_block, x, dw, *bn[0], pw, *bn[1], training=True)
    assert found.backend == "torch" and found.kernel.startswith("depthwise_conv2d: aten")
    assert found.kernel.count("; batch_norm") == 2
