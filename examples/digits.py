"""The lecture's digit classifier: weights -> prediction -> loss -> optimizer -> weights, on real handwritten digits.

    python examples/digits.py                        three networks, about half a minute on one core
    python examples/digits.py --seeds 1 --epochs 5   a first look
    python examples/digits.py --resume --epochs 40   go on from the saved checkpoints

It prints one training step in slow motion, trains with RMSprop on images shifted by up to two pixels, reports the
accuracy on images it never saw, and writes to --out: a checkpoint for each seed, digits.json, and two figures that show
what each layer makes of an image. Runs from the checkout or beside an installed dlaccel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, where dlaccel is not installed
from dlaccel.bench import data
from dlaccel.nn import CrossEntropyLoss, LinearReLU

OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}


def build(pixels: int) -> nn.Sequential:
    """The whole model: three matrix products, two of them with a ReLU."""
    return nn.Sequential(nn.Flatten(), LinearReLU(pixels, 512), LinearReLU(512, 256), nn.Linear(256, 10))


def logistic_regression(pixels: int) -> nn.Sequential:
    """What one had before deep learning: one linear layer and the same loss."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 10))


class Shifts:
    """Every image under all shifts of up to `pixels` in each direction, as views: a batch costs one gather."""

    def __init__(self, images: Tensor, pixels: int) -> None:
        height, width = images.shape[2:]
        self.choices = 2 * pixels + 1
        self.windows = F.pad(images, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)

    def random(self, index: Tensor, generator: torch.Generator) -> Tensor:
        dy, dx = torch.randint(self.choices, (2, len(index)), generator=generator)
        return self.windows[index, :, dy, dx]


class Trainer:
    """One network with all that a checkpoint holds: weights, optimizer, random numbers, epochs done."""

    def __init__(
        self, digits: data.Digits, seed: int, args: argparse.Namespace, build: Callable[[int], nn.Sequential] = build
    ) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(args.device)
        self.training, self.held_out = (part.to(self.device) for part in digits.split(seed))
        self.shifts = Shifts(self.training.images, args.shift)
        self.model = build(digits.images[0].numel()).to(self.device)
        self.loss = CrossEntropyLoss()
        self.optimizer = OPTIMIZERS[args.optimizer](self.model.parameters(), lr=args.lr)
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same batches on every device
        given = ("optimizer", "lr", "batch", "shift")
        self.options = {"data": digits.name, "seed": seed} | {name: getattr(args, name) for name in given}
        self.epochs = 0

    def step(self, images: Tensor, labels: Tensor) -> float:
        """The lecture's loop, once."""
        prediction = self.model(images)  # what the present weights say
        loss = self.loss(prediction, labels)  # how far that is from the truth
        self.optimizer.zero_grad()
        loss.backward()  # which way each weight should move
        self.optimizer.step()  # the weights move
        return float(loss.detach())

    def epoch(self) -> float:
        """One pass over the training images; the mean loss.

        The step size falls as 1 / (1 + epochs / 10), whatever the total, so that training can go on from any checkpoint.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.options["lr"] / (1 + self.epochs / 10)
        order = torch.randperm(len(self.training), generator=self.generator)
        batches = order.split(self.options["batch"])
        losses = [self.step(self.shifts.random(b, self.generator), self.training.labels[b]) for b in batches]
        self.epochs += 1
        return sum(losses) / len(losses)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the held-out images whose largest score is the right one."""
        return float((self.model(self.held_out.images).argmax(1) == self.held_out.labels).float().mean())

    def save(self, path: Path) -> None:
        """Writes beside `path` and renames, so that a run killed half-way leaves the last whole checkpoint."""
        state = {
            "options": self.options,
            "epochs": self.epochs,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Goes on where `save` stopped: on the CPU bit for bit as if it had never stopped."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for key, value in self.options.items():
            if (was := state["options"][key]) != value:
                raise SystemExit(f"{path} was trained with {key}={was}, not {value}: use another --out")
        self.epochs = state["epochs"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())


def slow_motion(trainer: Trainer) -> str:
    """One training step on an untrained network, with the numbers of each station of the loop."""
    images, labels = trainer.training.images[:128], trainer.training.labels[:128]
    weights = [p for p in trainer.model.parameters() if p.dim() == 2]
    before = [w.detach().clone() for w in weights]

    def guess() -> str:
        with torch.no_grad():
            share = trainer.model(images[:1]).softmax(1)[0]
        likely, right = int(share.argmax()), int(labels[0])
        return f"digit {likely} with {share[likely]:.0%}; for the right answer, {right}, {share[right]:.0%}"

    first = guess()
    loss = trainer.step(images, labels)
    gradient = norm([w.grad for w in weights if w.grad is not None])
    moved = norm([w.detach() - b for w, b in zip(weights, before, strict=True)]) / norm(before)
    with torch.no_grad():
        after = float(trainer.loss(trainer.model(images), labels))
    return "\n".join(
        [
            "One step in slow motion (128 images)",
            f"  weights     {sum(p.numel() for p in trainer.model.parameters()):,} random numbers in {len(weights)} layers",
            f"  prediction  the first image: {first}",
            f"  loss        {loss:.3f}  (guessing: ln 10 = 2.303)",
            f"  gradient    norm {gradient:.3f}",
            f"  optimizer   {type(trainer.optimizer).__name__} moves the weights by {moved:.1%} of their norm",
            f"  loss        {after:.3f}  on the same images, with the new weights",
            f"  prediction  the first image: {guess()}",
        ]
    )


def norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm())


def train(trainer: Trainer, epochs: int, checkpoint: Path) -> float:
    """Trains up to `epochs` in total, saving after each; returns the held-out accuracy."""
    seed = trainer.options["seed"]
    with progress(epochs, trainer.epochs, f"seed {seed}") as bar:
        while trainer.epochs < epochs:
            loss = trainer.epoch()
            trainer.save(checkpoint)
            bar(f"loss {loss:.3f}, held out {trainer.accuracy():.3f}")
    return trainer.accuracy()


@contextlib.contextmanager
def progress(total: int, done: int, name: str) -> Iterator[Callable[[str], None]]:
    """A function that counts one step and shows a note: tqdm's bar on a terminal, else the last line only."""
    last = ""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    bar = tqdm(total=total, initial=done, desc=name, unit="epoch", disable=None) if tqdm else None

    def step(note: str) -> None:
        nonlocal last
        last = note
        if bar is not None:
            bar.set_postfix_str(note, refresh=False)
            bar.update()

    yield step
    if bar is not None:
        bar.close()
    if last and (bar is None or bar.disable):
        print(f"  {name}: {total} epochs, {last}", flush=True)


@torch.no_grad()
def representations(model: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """The output of every layer for these images, (N, features), by a readable name."""
    names = ["pixels", "layer 1", "layer 2", "scores"]
    outputs, x = {}, images
    for name, layer in zip(names, model, strict=True):
        x = layer(x)
        outputs[name] = x.cpu()
    return outputs


def nearest_class_mean(fit: Tensor, fit_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """How informative features are about the digit: the accuracy of assigning each to the closest class mean."""
    means = torch.stack([fit[fit_labels == digit].mean(0) for digit in range(10)])
    return float((torch.cdist(test, means).argmin(1) == test_labels).float().mean())


def figures(trainer: Trainer, out: Path) -> dict[str, float]:
    """Writes layers.png and classes.png; returns how informative each layer is."""
    labels, held_out = trainer.training.labels.cpu(), trainer.held_out.labels.cpu()
    fit = representations(trainer.model, trainer.training.images)
    test = representations(trainer.model, trainer.held_out.images)
    informative = {name: nearest_class_mean(fit[name], labels, test[name], held_out) for name in fit}
    try:
        import matplotlib
    except ImportError:
        print("No figures: matplotlib is not installed.")
        return informative
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    one_each = [int((held_out == digit).nonzero()[0]) for digit in range(10)]
    fig, axes = plt.subplots(len(test), 10, figsize=(10, 4.6), layout="constrained")
    fig.suptitle("What each layer makes of an image: ever less like it, ever clearer about the digit")
    for row, (name, values) in zip(axes, test.items(), strict=True):
        for ax, index in zip(row, one_each, strict=True):
            picture = values[index]
            height = max(h for h in range(1, int(picture.numel() ** 0.5) + 1) if picture.numel() % h == 0)
            if name == "scores":
                colours = ["C3" if digit == held_out[index] else "0.6" for digit in range(10)]
                ax.bar(range(10), picture.softmax(0).tolist(), color=colours)
                ax.set_ylim(0, 1)
            else:
                ax.imshow(picture.view(height, -1).numpy(), cmap="magma" if name != "pixels" else "gray_r")
            ax.set_xticks(range(10) if name == "scores" else [])
            ax.tick_params(labelsize=6, length=0)
            ax.set_yticks([])
        row[0].set_ylabel(name)
    fig.savefig(out / "layers.png", dpi=100)

    fig, axes = plt.subplots(1, len(test), figsize=(12, 3.6), layout="constrained")
    fig.suptitle("Held-out images in the two main directions of each layer, coloured by digit")
    for ax, (name, values) in zip(axes, test.items(), strict=True):
        centred = values - values.mean(0)
        plane = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        dots = ax.scatter(*plane.T.numpy(), c=held_out.numpy(), cmap="tab10", s=5, vmin=-0.5, vmax=9.5)
        ax.set_title(f"{name}\nnearest class mean {informative[name]:.1%}", fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    fig.colorbar(dots, ax=axes, ticks=range(10))
    fig.savefig(out / "classes.png", dpi=100)
    plt.close("all")
    return informative


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def number(least: int) -> Callable[[str], int]:
        def convert(text: str) -> int:
            if (value := int(text)) < least:
                raise argparse.ArgumentTypeError(f"{value} is less than {least}")
            return value

        return convert

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=data.NAMES, help="default: mnist5k, or digits where only that is installed")
    p.add_argument("--seeds", type=number(1), default=3, help="networks, each with its own split (default: %(default)s)")
    p.add_argument("--epochs", type=number(1), default=30, help="in total, also with --resume (default: %(default)s)")
    p.add_argument("--batch", type=number(1), default=128)
    p.add_argument("--optimizer", choices=list(OPTIMIZERS), default="rmsprop")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--shift", type=number(0), help="pixels; default 2, for 8 x 8 images 1")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # Two threads gain little on layers this small, and wait for each other for minutes on a machine with other work.
    p.add_argument("--threads", type=number(1), default=1, help="CPU threads (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("results/digits"))
    p.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        digits = data.load(args.data)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    if args.shift is None:
        args.shift = 2 if digits.images.shape[-1] >= 16 else 1
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(digits)} images: {digits.source}. Device: {args.device}.")
    if not args.resume:
        print(slow_motion(Trainer(digits, 0, args)))

    start, accuracies = time.perf_counter(), []
    for seed in range(args.seeds):
        trainer = Trainer(digits, seed, args)
        checkpoint = args.out / f"seed{seed}.pt"
        if args.resume and checkpoint.exists():
            trainer.load(checkpoint)
            print(f"{checkpoint}: {trainer.epochs} epochs done, held out {trainer.accuracy():.3f}")
        try:
            accuracies.append(train(trainer, args.epochs, checkpoint))
        except KeyboardInterrupt:
            print(f"\nStopped after {trainer.epochs} epochs of seed {seed}; --resume goes on from there.", file=sys.stderr)
            return 130
        if seed == 0:
            informative = figures(trainer, args.out)
    seconds, mean = time.perf_counter() - start, sum(accuracies) / len(accuracies)

    args.shift = 0  # a linear model has no use for shifted images
    baseline = Trainer(digits, 0, args, logistic_regression)
    while baseline.epochs < args.epochs:
        baseline.epoch()
    print(f"Logistic regression on the pixels, in its place: {baseline.accuracy():.1%} held out")
    print("How well the nearest class mean tells the digit, layer by layer (seed 0)")
    for name, accuracy in informative.items():
        print(f"  {name:8} {accuracy:6.1%}  {'#' * round(40 * accuracy)}")
    spread = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
    print(f"Held-out accuracy {mean:.1%}, mean of {args.seeds} seeds ({spread}), in {seconds:.1f} s. Files: {args.out}")
    record = {
        "data": digits.name,
        "source": digits.source,
        "device": args.device,
        "epochs": args.epochs,
        "held_out_accuracy": accuracies,
        "mean": mean,
        "logistic_regression": baseline.accuracy(),
        "informative": informative,
        "seconds": round(seconds, 2),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (args.out / "digits.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
