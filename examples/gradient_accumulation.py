"""Gradient accumulation that equals one large batch.

    python examples/gradient_accumulation.py

A batch too large for memory is split into micro-batches whose gradients add up. Where some targets do not count (padding,
or here images nobody has labelled), micro-batches hold different numbers of targets, and the mean of their means is not the
mean of the batch. `num_items`, what the sum is divided by, makes it so: the number of targets that count in the whole batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, where dlaccel is not installed
from dlaccel.bench import data
from dlaccel.functional import cross_entropy
from dlaccel.nn import LinearReLU

IGNORED = -100
Loss = Callable[[Tensor, Tensor], Tensor]


def batches(digits: data.Digits, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in which labels are missing unevenly: the first half keeps few, as texts of unequal length would."""
    while True:
        index = torch.randint(len(digits), (batch,), generator=generator)
        keep = torch.rand(batch, generator=generator) < torch.linspace(0.05, 1, batch)
        yield digits.images[index], digits.labels[index].where(keep, IGNORED)


def gradient(model: nn.Module, parts: list[tuple[Tensor, Tensor]], loss: Loss) -> Tensor:
    """What the optimizer would see after all the parts, as one vector."""
    model.zero_grad()
    for images, labels in parts:
        loss(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(model: nn.Module, images: Tensor, labels: Tensor, parts: int) -> tuple[float, float]:
    """Relative errors of the accumulated gradient against that of the whole batch: mean of means, and with num_items."""
    counted = (labels != IGNORED).sum()
    split = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    whole = gradient(model, [(images, labels)], cross_entropy)
    means = gradient(model, split, lambda x, y: cross_entropy(x, y) / parts)
    exact = gradient(model, split, lambda x, y: cross_entropy(x, y, num_items=counted))
    return tuple(float((g - whole).norm() / whole.norm()) for g in (means, exact))  # type: ignore[return-value]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=data.NAMES, help="default: mnist5k, or digits where only that is installed")
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--parts", type=int, default=8, help="micro-batches in a batch (default: %(default)s)")
    p.add_argument("--steps", type=int, default=5)
    args = p.parse_args(argv)
    try:
        digits = data.load(args.data)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), LinearReLU(digits.images[0].numel(), 256), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    print(f"Relative error of the gradient of {args.parts} micro-batches against that of one batch of {args.batch}")
    print(f"{'step':>4} {'labels that count in each':32} {'mean of means':>14} {'num_items':>10}")
    stream = batches(digits, args.batch, torch.Generator().manual_seed(0))
    for step, (images, labels) in zip(range(args.steps), stream, strict=False):
        means, exact = compare(model, images, labels, args.parts)
        counts = " ".join(str(int((part != IGNORED).sum())) for part in labels.chunk(args.parts))
        print(f"{step:4d} {counts:32} {means:14.1e} {exact:10.1e}")
        optimizer.step()  # with the gradient that was accumulated last
    return 0


if __name__ == "__main__":
    sys.exit(main())
