"""Two networks with the same weights, one on dlaccel's modules and one on torch's, trained side by side on the same digits."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, where dlaccel is not installed
from dlaccel.bench import data


@dataclass
class Twins:
    """What training side by side found; times are CPU seconds of one thread, or on a GPU wall seconds, of a step."""

    losses: list[tuple[float, float]] = field(default_factory=list)  # (dlaccel, torch) of each step
    seconds: list[tuple[float, float]] = field(default_factory=list)
    accuracy: tuple[float, float] = (0.0, 0.0)

    @property
    def difference(self) -> float:
        """The largest difference of the two losses in a step, relative to torch's."""
        return max(abs(a - b) / abs(b) for a, b in self.losses)

    @property
    def speed(self) -> float:
        """Torch's time over dlaccel's, the median over pairs of steps taken one after the other."""
        return statistics.median(b / a for a, b in self.seconds)


def train(
    ours: nn.Module, theirs: nn.Module, digits: data.Digits, steps: int, batch: int, lr: float, device: str, dtype: torch.dtype
) -> Twins:
    """Each step both networks see the same images; who goes first alternates."""
    theirs.load_state_dict(ours.state_dict())
    training, held_out = (part.to(device) for part in digits.split(0))
    generator = torch.Generator().manual_seed(0)
    nets = [net.to(device, dtype).train() for net in (ours, theirs)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9) for net in nets]
    found = Twins()
    for step in range(steps):
        index = torch.randint(len(training), (batch,), generator=generator)
        images, labels = training.images[index].to(dtype), training.labels[index]
        loss, seconds = [0.0, 0.0], [0.0, 0.0]
        for which in (0, 1) if step % 2 else (1, 0):
            begin = _clock(device)
            output = F.cross_entropy(nets[which](images), labels)
            optimizers[which].zero_grad()
            output.backward()
            optimizers[which].step()
            seconds[which] = _clock(device) - begin
            loss[which] = float(output.detach())
        found.losses.append((loss[0], loss[1]))
        if step:  # the first step sets things up
            found.seconds.append((seconds[0], seconds[1]))
    with torch.no_grad():
        right = [(net.eval()(held_out.images.to(dtype)).argmax(1) == held_out.labels).float().mean() for net in nets]
    found.accuracy = (float(right[0]), float(right[1]))
    return found


def _clock(device: str) -> float:
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def show(found: Twins) -> None:
    print(f"{'step':>6} {'dlaccel':>9} {'torch':>9}   loss")
    every = max(1, len(found.losses) // 10)
    for step in range(0, len(found.losses), every):
        ours, theirs = found.losses[step]
        print(f"{step:6d} {ours:9.5f} {theirs:9.5f}   {'#' * round(16 * theirs)}")
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*found.seconds, strict=True))
    early = Twins(found.losses[:10]).difference
    print(f"Losses differ by at most {early:.0e} of their value in the first ten steps, {found.difference:.0e} in all.")
    if found.difference:
        print(
            "Both sum the same numbers in another order, and training amplifies rounding; --float64 shows how much is rounding."
        )
    print(f"Held-out accuracy: dlaccel {found.accuracy[0]:.3f}, torch {found.accuracy[1]:.3f}.")
    print(f"A training step: dlaccel {ours:.1f} ms, torch {theirs:.1f} ms; dlaccel is {found.speed:.2f} times as fast.")


def main(build: Callable[[bool, int], nn.Module], description: str, argv: list[str] | None = None) -> int:
    """`build(dlaccel, side of an image)` makes a network of either kind with the same state_dict."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=data.NAMES, help="default: mnist5k, or digits where only that is installed")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--float64", action="store_true")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    try:
        digits = data.load(args.data)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, theirs = (build(dlaccel, digits.images.shape[-1]) for dlaccel in (True, False))
    if args.channels_last:
        ours, theirs = (net.to(memory_format=torch.channels_last) for net in (ours, theirs))
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"{parameters:,} weights, {len(digits)} images ({digits.name}), {args.device}, {args.steps} steps of {args.batch}.")
    dtype = torch.float64 if args.float64 else torch.float32
    show(train(ours, theirs, digits, args.steps, args.batch, args.lr, args.device, dtype))
    return 0
