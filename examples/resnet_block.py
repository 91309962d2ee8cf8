"""A small residual network: each block ends in one operator for batch norm, sum with the shortcut, and ReLU.

    python examples/resnet_block.py                  beside the same network on torch's modules
    python examples/resnet_block.py --channels-last

The residual block of He et al., arXiv 1512.03385: conv, batch norm, ReLU, conv, batch norm, + shortcut, ReLU. Besides the
convolutions that is five operators in torch and two in dlaccel. The state_dict is that of torch's modules.
"""

from __future__ import annotations

import sys

import twins
from torch import Tensor, nn

from dlaccel.nn import BatchNormReLU2d


def conv(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """On dlaccel's modules."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels), BatchNormReLU2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), BatchNormReLU2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)  # type: ignore[no-any-return]


class TorchBlock(nn.Module):
    """The same on torch's, as one writes it for speed: in place where autograd allows it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        return self.bn2(self.conv2(y)).add_(x).relu_()  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stem, blocks, average, linear. `blocks` at each of three widths."""

    def __init__(self, dlaccel: bool, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2) -> None:
        super().__init__()
        make = Block if dlaccel else TorchBlock
        stages: list[nn.Module] = []
        for before, width in zip((1, *widths), widths, strict=False):
            stages += [conv(before, width, stride=1 if before == 1 else 2), *(make(width) for _ in range(blocks))]
        self.stages = nn.Sequential(*stages)
        self.out = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stages(x).mean((2, 3)))  # type: ignore[no-any-return]


def build(dlaccel: bool, side: int) -> nn.Module:
    return ResNet(dlaccel)


if __name__ == "__main__":
    sys.exit(twins.main(build, __doc__ or ""))
