"""A small MobileNetV1: blocks of depthwise convolution, batch norm, ReLU, pointwise convolution, batch norm, ReLU.

    python examples/mobilenet.py                     beside the same network on torch's modules
    python examples/mobilenet.py --channels-last

Howard et al., arXiv 1704.04861. A 3 x 3 convolution of C channels to C costs 9 C^2 multiply-adds a pixel; split into a
depthwise and a pointwise one, 9 C + C^2. The state_dict is that of torch's modules.
"""

from __future__ import annotations

import sys

import twins
from torch import Tensor, nn

from dlaccel.nn import BatchNormReLU2d, DepthwiseSeparableBlock


class TorchBatchNormReLU2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


class TorchBlock(nn.Module):
    """`DepthwiseSeparableBlock` out of torch's modules, with the same state_dict."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.bn1 = TorchBatchNormReLU2d(channels)
        self.pointwise = nn.Conv2d(channels, out, 1, bias=False)
        self.bn2 = TorchBatchNormReLU2d(out)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.bn2(self.pointwise(self.bn1(self.depthwise(input))))
        return result


def block(dlaccel: bool, channels: int, out: int, stride: int) -> nn.Module:
    return DepthwiseSeparableBlock(channels, out, stride=stride) if dlaccel else TorchBlock(channels, out, stride)


def build(dlaccel: bool, side: int) -> nn.Module:
    """For images of 28 x 28 the map shrinks to 7 x 7, for 8 x 8 to 2 x 2."""
    norm = BatchNormReLU2d if dlaccel else TorchBatchNormReLU2d
    plan = [(16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        norm(16),
        *(block(dlaccel, *sizes) for sizes in plan),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


if __name__ == "__main__":
    sys.exit(twins.main(build, __doc__ or ""))
