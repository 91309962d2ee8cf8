"""Layers make an image ever more informative about the answer; a change of coordinates can make a problem easy."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlaccel.bench import data
from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Baseline, Row
from dlaccel.functional import cross_entropy
from dlaccel.nn import LinearReLU

CLAIM = 7
TITLE = "Representations learned layer by layer"
SAYS = (
    "A digit network's layers turn the image into representations ever more different from it and ever more informative "
    "about the answer. Black and white points become separable by a line in polar coordinates. A model is five or six "
    "tensor operations. It can go on learning from new data without starting again."
)
COMPARES = (
    "Informative: the accuracy of naming the class whose mean is nearest, on images not trained on. Different: 1 - linear "
    "CKA with the pixels (Kornblith et al., arXiv 1905.00414); 0 is the same up to rotation and scale. Beside them "
    "logistic regression on the pixels, what one had before."
)
READING = (
    "Both trends hold on this small net, though the first layer adds almost nothing to pixels for such a simple "
    "classifier. The polar coordinates are given, not learned: they show what a good representation does, not that one is "
    "found. A net can go on from a checkpoint, and with more images of digits it knows it gains by it. With digits it "
    "never saw, its last layer is in the way, and it learns them no faster than a new net; shown the new digits alone, it "
    "forgets the old ones."
)
HEADLINES = ("nearest class mean on pixels", "nearest class mean on scores", "held-out accuracy, digit net")
EPOCHS = {"quick": 6, "default": 8, "full": 8}
SEEDS = {"quick": 1, "default": 1, "full": 3}
LAYERS = {2: "convolution 1", 5: "convolution 2", 7: "linear", 8: "scores"}  # index in lenet() -> name


def lenet() -> nn.Sequential:
    """28 x 28 images; 31,000 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), LinearReLU(400, 64), nn.Linear(64, 10),
    )  # fmt: skip


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book, on = lab.Notebook(CLAIM, preset), lab.machine(device)
    with on.active():
        progress("polar coordinates", 0)
        yield from _polar(book, lab.machine("cpu"))
        if reason := data.why_missing("mnist5k"):
            yield book.not_measured("A4", "representations of digits, layer by layer", reason)
            return
        digits = data.load("mnist5k").to(on.device)
        progress("logistic regression", 0.1)
        logistic = _logistic(book, on, digits)
        yield logistic
        for seed in range(SEEDS[preset]):
            progress(f"digit net, seed {seed}", 0.2 + 0.4 * seed / SEEDS[preset])
            yield from _representations(book, on, digits, seed, EPOCHS[preset], logistic)
        progress("tensor operations", 0.6)
        yield _operations(book, on)
        progress("going on with new digits", 0.65)
        yield from _continued(book, on, digits, EPOCHS[preset])


def ring(points: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points in a square, (N, 2), and whether each is white: farther than .7 from the centre."""
    xy = torch.rand(points, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return xy, xy.norm(dim=1) > 0.7


def polar(xy: Tensor) -> Tensor:
    return torch.stack([xy.norm(dim=1), torch.atan2(xy[:, 1], xy[:, 0])], 1)


def linear_accuracy(features: Tensor, white: Tensor) -> float:
    """Of the best line that logistic regression finds, on the points it was fitted to."""
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    weight = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(features @ weight, white.float())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(((features @ weight > 0) == white).float().mean())


def _polar(book: lab.Notebook, on: lab.Machine) -> Iterator[Row]:
    xy, white = ring()
    majority = max(float(white.float().mean()), 1 - float(white.float().mean()))
    always = Baseline(what="always naming the commoner colour", value=majority, status="measured")
    for name, features in (("Cartesian", xy), ("polar", polar(xy))):
        score = linear_accuracy(features, white)
        yield book.measured("A5", f"points told apart by a line, {name} coordinates", score, "of 1", on, baseline=always)


def fit(model: nn.Module, part: data.Digits, epochs: int, seed: int = 0) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(part), generator=generator).split(128):
            loss = cross_entropy(model(part.images[batch]), part.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, part: data.Digits) -> float:
    return float((model(part.images).argmax(1) == part.labels).float().mean())


def _logistic(book: lab.Notebook, on: lab.Machine, digits: data.Digits) -> Row:
    training, held_out = digits.split(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).to(on.device)
    fit(model, training, 20)
    return book.measured("A4", "held-out accuracy, logistic regression on the pixels", accuracy(model, held_out), "of 1", on)


def _representations(
    book: lab.Notebook, on: lab.Machine, digits: data.Digits, seed: int, epochs: int, logistic: Row
) -> Iterator[Row]:
    training, held_out = digits.split(seed)
    torch.manual_seed(seed)
    model = lenet().to(on.device)
    fit(model, training, epochs, seed)
    yield book.measured("A4", f"held-out accuracy, digit net, seed {seed}", accuracy(model, held_out), "of 1", on,
                        baseline=lab.baseline(logistic, "logistic regression"), note=f"{epochs} epochs")  # fmt: skip
    with torch.no_grad():
        seen, new = training.images, held_out.images
        pixels = new.flatten(1)
        for index, layer in enumerate([nn.Identity(), *model], start=-1):
            seen, new = layer(seen), layer(new)
            if index != -1 and index not in LAYERS:
                continue
            name = LAYERS.get(index, "pixels")
            score = nearest_class_mean(seen.flatten(1), training.labels, new.flatten(1), held_out.labels)
            series = _plane(new.flatten(1)[:300], held_out.labels[:300]) if seed == 0 else {}
            yield book.measured("A4", f"nearest class mean on {name}, seed {seed}", score, "of 1", on, series=series)
            if index == -1:
                continue
            distance = 1 - linear_cka(new.flatten(1), pixels)
            yield book.measured("A4", f"distance of {name} from the pixels, seed {seed}", distance,
                                "1 - CKA", on)  # fmt: skip


def nearest_class_mean(fit_on: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    means = torch.stack([fit_on[labels == digit].mean(0) for digit in range(10)])
    return float((torch.cdist(test, means).argmin(1) == test_labels).float().mean())


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Similarity of two representations of the same images, each (N, features): 1 is equal up to rotation and scale."""
    a, b = a - a.mean(0), b - b.mean(0)
    similar_a, similar_b = a @ a.T, b @ b.T
    return float((similar_a * similar_b).sum() / (similar_a.norm() * similar_b.norm()))


def _plane(features: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """The two main directions of the features, for the figure."""
    centred = features - features.mean(0)
    xy = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    columns = {"x": xy[:, 0] / xy.abs().max(), "y": xy[:, 1] / xy.abs().max(), "digit": labels.float()}
    return {name: [round(v, 3) for v in column.tolist()] for name, column in columns.items()}


class _Count(TorchDispatchMode):
    """Which tensor operations run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        self.names[name] = self.names.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _operations(book: lab.Notebook, on: lab.Machine) -> Row:
    model, image = lenet().to(on.device), torch.rand(1, 1, 28, 28, device=on.device)
    with _Count() as count:
        model(image)
    # A view of the same numbers, or of a weight, computes nothing.
    computing = {name: n for name, n in count.names.items() if name not in ("view", "t", "_unsafe_view", "detach", "alias")}
    listed = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in sorted(computing.items()))
    return book.measured("A7", "different tensor operations in the digit net", len(computing), "operations", on, note=listed)


def _continued(book: lab.Notebook, on: lab.Machine, digits: data.Digits, epochs: int) -> Iterator[Row]:
    """A net trained on a part of the data is saved; later, with all of it, one epoch more: loaded, or from scratch.

    The part is a quarter of the images of every digit, or all images of the digits 0 to 4.
    """
    training, held_out = digits.split(0)
    old, new = training.labels < 5, training.labels >= 5
    quarter = torch.arange(len(training), device=on.device) < len(training) // 4

    def one_epoch(start: bytes | None, part: data.Digits, new_head: bool = False) -> nn.Sequential:
        torch.manual_seed(1)
        model = lenet().to(on.device)
        if start is not None:
            model.load_state_dict(torch.load(io.BytesIO(start), weights_only=True))
        if new_head:
            model[-1].reset_parameters()  # type: ignore[operator]
        fit(model, part, 1)
        return model

    def checkpoint(part: data.Digits) -> bytes:
        torch.manual_seed(0)
        model, file = lenet().to(on.device), io.BytesIO()
        fit(model, part, epochs)
        torch.save(model.state_dict(), file)
        return file.getvalue()

    few, low_digits = checkpoint(training[quarter]), checkpoint(training[old])
    plans: list[tuple[str, bytes | None, data.Digits, bool]] = [
        ("from scratch", None, training, False),
        ("from a net that knew a quarter of the images", few, training, False),
        ("from a net that knew 0 to 4", low_digits, training, False),
        ("from a net that knew 0 to 4, with a new last layer", low_digits, training, True),
        ("of 5 to 9 alone, from a net that knew 0 to 4", low_digits, training[new], False),
    ]
    scratch: Row | None = None
    for name, start, part, new_head in plans:
        model = one_epoch(start, part, new_head)
        known = accuracy(model, held_out[held_out.labels < 5])
        row = book.measured(
            "A6", f"accuracy on all digits after one epoch {name}", accuracy(model, held_out), "of 1", on,
            baseline=lab.baseline(scratch, "from scratch") if scratch else None,
            note=f"on 0 to 4 {known:.3f}" + (f"; {epochs} epochs before" if start else ""),
        )  # fmt: skip
        scratch = scratch or row
        yield row


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    paths = [_ring_figure(out / "claim7_polar.png")]
    means = [r for r in rows if r.quantity.startswith("nearest class mean") and r.series]
    if means:
        distances = {_layer(r): r.value for r in rows if r.unit == "1 - CKA" and r.quantity.endswith("seed 0")}
        path = out / "claim7_layers.png"
        with plot.figure(path, 11, 3, ncols=len(means)) as (fig, axes):
            for ax, row in zip(axes, means, strict=True):
                name = _layer(row)
                dots = ax.scatter(
                    row.series["x"], row.series["y"], c=row.series["digit"], cmap="tab10", vmin=-0.5, vmax=9.5, s=6
                )
                ax.set_title(f"{name}\nclass mean {row.value:.1%}\n1 - CKA {distances.get(name, 0):.2f}", fontsize=9)
                ax.set_xticks([])
                ax.set_yticks([])
            fig.colorbar(dots, ax=axes, ticks=range(10), label="digit")
        paths.append(path)
    return paths


def _layer(row: Row) -> str:
    start = "nearest class mean on " if row.quantity.startswith("nearest") else "distance of "
    return row.quantity.removeprefix(start).split(",")[0].removesuffix(" from the pixels")


def _ring_figure(path: Path) -> Path:
    from dlaccel.bench.claims import plot

    xy, white = ring(600)
    views: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("Cartesian: no line separates them", lambda p: p),
        ("polar: one does", polar),
    ]
    with plot.figure(path, 7, 3.2, ncols=2) as (_, axes):
        for ax, (name, change) in zip(axes, views, strict=True):
            points = change(xy)
            for chosen, colour in ((white, "white"), (~white, "black")):
                ax.scatter(*points[chosen].T.tolist(), c=colour, edgecolors="black", linewidths=0.5, s=12)
            ax.set_title(name, fontsize=10)
        axes[1].axvline(0.7, color="C3")
        axes[1].set_xlabel("radius")
        axes[1].set_ylabel("angle")
    return path
