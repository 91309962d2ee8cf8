"""Signals faded with depth until the late 2000s; today thousands of layers train from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dlaccel.bench import data
from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Baseline, Row
from dlaccel.functional import cross_entropy, depthwise_conv2d, linear_relu
from dlaccel.nn import BatchNormReLU1d, BatchNormReLU2d

CLAIM = 6
TITLE = "Thousands of layers from scratch"
SAYS = (
    "Until the late 2000s the feedback signal faded as layers were added. Better activations, initialisation and "
    "optimizers (RMSprop, Adam), then residual connections, batch normalization and depthwise-separable convolutions "
    "fixed it: models thousands of layers deep train from scratch."
)
COMPARES = (
    "Nets of 64 units a layer on 8 x 8 digits. Signal: the norm of a weight's gradient in the first hidden layer over "
    "that in the last, before training; 1 is undiminished. Then accuracy on images not trained on, with Adam at one "
    "learning rate and an equal number of epochs for all."
)
READING = (
    "The signal of a sigmoid net does fade, to nothing at 50 layers. No remedy works alone: batch normalization without "
    "residual connections makes the gradient explode, 1.21 times a layer (Yang et al., arXiv 1902.08129), which is worse "
    "than nothing. Both together train at any depth tried. A shallow sigmoid net only looks untrainable: with enough "
    "epochs it learns. Depthwise-separable convolution saves arithmetic; no source was found that it helps gradients. "
    '"Thousands" is thin: 1001 layers were shown in 2016 (He et al., arXiv 1603.05027).'
)
HEADLINES = (
    "gradient, first / last hidden layer, sigmoid, Xavier, 20",
    "accuracy, sigmoid, Xavier, 20",
    "accuracy, residual, batch norm, 20",
)
WIDTH, BATCH, LR = 64, 128, 1e-3
DEPTHS = {"quick": (5, 20), "default": (5, 20, 50, 100), "full": (5, 20, 50, 100, 300, 1000)}
SEEDS = {"quick": 1, "default": 3, "full": 3}
EPOCHS = {"quick": 5, "default": 10, "full": 10}


class Plain(nn.Module):
    """Linear, batch normalization if wanted, activation; repeated."""

    def __init__(self, depth: int, relu: bool, batch_norm: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.relu = relu
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.norm = nn.ModuleList(BatchNormReLU1d(width) for _ in range(depth - 1)) if batch_norm else None
        self.out = nn.Linear(width, 10)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            (_he if relu else nn.init.xavier_uniform_)(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.hidden):
            if self.norm is not None:
                x = self.norm[i](layer(x))
            elif self.relu:
                x = linear_relu(x, layer.weight, layer.bias)  # type: ignore[arg-type]
            else:
                x = torch.sigmoid(layer(x))
        return self.out(x)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """x + W relu(batch_norm(x)), repeated; `depth` counts linear layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth - 2))
        self.norm = nn.ModuleList(BatchNormReLU1d(WIDTH) for _ in range(depth - 2))
        self.last_norm = BatchNormReLU1d(WIDTH)
        self.out = nn.Linear(WIDTH, 10)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            _he(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer, norm in zip(self.hidden, self.norm, strict=True):
            x = x + layer(norm(x))
        return self.out(self.last_norm(x))  # type: ignore[no-any-return]


class SeparableBlock(nn.Module):
    """x + pointwise(depthwise(relu(batch_norm(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNormReLU2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = depthwise_conv2d(self.norm(x), self.depthwise.weight, padding=1)
        return x + self.pointwise(y)  # type: ignore[no-any-return]


def separable(blocks: int, channels: int = 16) -> nn.Sequential:
    """A residual net of depthwise-separable convolutions with 2 x blocks + 1 convolutions."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        *(SeparableBlock(channels) for _ in range(blocks)),
        BatchNormReLU2d(channels),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels, 10),
    )


def _he(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


NETS: dict[str, Callable[[int], nn.Module]] = {
    "sigmoid, Xavier": lambda depth: Plain(depth, relu=False),
    "ReLU, He": lambda depth: Plain(depth, relu=True),
    "ReLU, He, batch norm": lambda depth: Plain(depth, relu=True, batch_norm=True),
    "residual, batch norm": Residual,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
}
RATES = {"SGD": (0.3, 0.1, 0.03), "RMSprop": (3e-3, 1e-3, 3e-4), "Adam": (3e-3, 1e-3, 3e-4)}


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book, on = lab.Notebook(CLAIM, preset), lab.machine(device)
    yield book.cited("A3", "layers of a network trained from scratch", 1001, "layers", "ResNet on CIFAR-10, 4.62 % error",
                     "He et al., arXiv 1603.05027", hardware="gpu")  # fmt: skip
    if reason := data.why_missing("digits"):
        yield book.not_measured("A1", "gradients and accuracy by depth", reason)
        return
    with on.active():
        yield _growth(book, on)
        digits = data.load("digits")
        plan = [(depth, name) for depth in DEPTHS[preset] for name in NETS]
        cost = [depth + 5.0 for depth, _ in plan]
        for i, (depth, name) in enumerate(plan):
            done = 0.8 * sum(cost[:i]) / sum(cost)
            yield from _one(book, on, digits, preset, depth, name, partial(progress, done=done))
        yield from _longer(book, on, digits, preset, partial(progress, done=0.8))
        yield from _optimizers(book, on, digits, preset, partial(progress, done=0.85))
        yield from _separable(book, on, digits, preset, partial(progress, done=0.95))


def _one(
    book: lab.Notebook,
    on: lab.Machine,
    digits: data.Digits,
    preset: str,
    depth: int,
    name: str,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    seeds, epochs = SEEDS[preset], EPOCHS[preset]
    if depth >= 300:
        seeds, epochs = 1, 4
    scores = []
    for seed in range(seeds):
        progress(f"{depth} layers, {name}, seed {seed}")
        training, held_out = _parts(digits, seed, on.device)
        torch.manual_seed(seed)
        net = NETS[name](depth).to(on.device)
        if seed == 0:
            norms = gradient_norms(net, training)
            yield book.measured(
                "A1", f"gradient, first / last hidden layer, {name}, {depth} layers", _ratio(norms), "x", on,
                series={"depth": [float(depth)], "norm": norms},
            )  # fmt: skip
        train(net, training, epochs)
        scores.append(accuracy(net, held_out))
    yield book.measured(
        "A2", f"accuracy, {name}, {depth} layers", lab.Spread(scores).median, "of 1", on, low=min(scores), high=max(scores),
        series={"depth": [float(depth)]}, note=f"{epochs} epochs, Adam, {seeds} seed{'s' * (seeds > 1)}; chance is 0.1",
    )  # fmt: skip


def _parts(digits: data.Digits, seed: int, device: str) -> tuple[data.Digits, data.Digits]:
    training, held_out = digits.split(seed)
    return training.to(device), held_out.to(device)


def gradient_norms(net: nn.Module, training: data.Digits) -> list[float]:
    """Of each hidden layer's weight, for one batch, before training."""
    net.train()
    cross_entropy(net(training.images[:BATCH].flatten(1)), training.labels[:BATCH]).backward()
    norms = [float(layer.weight.grad.norm()) for layer in net.hidden]  # type: ignore[union-attr, operator]
    net.zero_grad()
    return norms


def _ratio(norms: list[float]) -> float:
    return norms[0] / norms[-1] if norms[-1] else math.nan


def train(net: nn.Module, training: data.Digits, epochs: int, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Whole batches only, as batch normalization likes them. Returns the last epoch's mean loss."""
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=LR)
    images = training.images.flatten(1)
    net.train()
    for _ in range(epochs):
        total = torch.zeros((), device=images.device)
        batches = torch.randperm(len(training), device=images.device).split(BATCH)[: len(training) // BATCH]
        for part in batches:
            loss = cross_entropy(net(images[part]), training.labels[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach()
    return float(total) / len(batches)


@torch.no_grad()
def accuracy(net: nn.Module, held_out: data.Digits) -> float:
    net.eval()
    return float((net(held_out.images.flatten(1)).argmax(1) == held_out.labels).float().mean())


def _growth(book: lab.Notebook, on: lab.Machine, layers: int = 20, width: int = 512) -> Row:
    """How much the gradient grows through one layer of linear + batch norm + ReLU, on random inputs.

    Through the linear layer and the division by the standard deviation of what it sums, the squared gradient is multiplied by
    E[relu'(z)^2] / Var[relu(z)] = (1/2) / (1/2 - 1/(2 pi)) = pi / (pi - 1), z standard normal.
    """
    torch.manual_seed(0)
    net = Plain(layers, relu=True, batch_norm=True, width=width).to(on.device)
    x = torch.randn(width, width, device=on.device)
    cross_entropy(net(x), torch.randint(0, 10, (width,), device=on.device)).backward()
    norms = [float(layer.weight.grad.norm()) for layer in net.hidden]  # type: ignore[union-attr, operator]
    growth = (norms[0] / norms[-1]) ** (1 / (len(norms) - 1))
    theory = Baseline(what="mean-field value sqrt(pi / (pi - 1))", value=math.sqrt(math.pi / (math.pi - 1)), status="projected")
    return book.measured(
        "A2", "gradient growth, ReLU + batch norm without residual connections", growth, "x a layer", on, baseline=theory,
        note=f"{layers} layers of {width}, batch {width}", series={"norm": norms},
    )  # fmt: skip


def _longer(
    book: lab.Notebook, on: lab.Machine, digits: data.Digits, preset: str, progress: Callable[[str], None]
) -> Iterator[Row]:
    """Is it depth, or only patience? The shallow sigmoid net with many more epochs."""
    if preset == "quick":
        return
    progress("sigmoid, 5 layers, 150 epochs")
    training, held_out = _parts(digits, 0, on.device)
    torch.manual_seed(0)
    net = NETS["sigmoid, Xavier"](5).to(on.device)
    train(net, training, 150)
    yield book.measured("A1", "accuracy, sigmoid, Xavier, 5 layers, 150 epochs", accuracy(net, held_out), "of 1", on)


def _optimizers(
    book: lab.Notebook, on: lab.Machine, digits: data.Digits, preset: str, progress: Callable[[str], None], depth: int = 20
) -> Iterator[Row]:
    """Each optimizer with the best of three learning rates, chosen by the training loss."""
    if preset == "quick":
        return
    training, held_out = _parts(digits, 0, on.device)
    for name, make in OPTIMIZERS.items():
        progress(f"{name}, {depth} layers")
        results = []
        for rate in RATES[name]:
            torch.manual_seed(0)
            net = NETS["ReLU, He"](depth).to(on.device)
            loss = train(net, training, EPOCHS[preset], make(net.parameters(), lr=rate))
            results.append((loss if math.isfinite(loss) else math.inf, rate, accuracy(net, held_out)))
        _, rate, score = min(results)
        yield book.measured("A2", f"accuracy, ReLU, He, {depth} layers, {name}", score, "of 1", on,
                            note=f"{EPOCHS[preset]} epochs; learning rate {rate}, best of three")  # fmt: skip


def _separable(
    book: lab.Notebook, on: lab.Machine, digits: data.Digits, preset: str, progress: Callable[[str], None]
) -> Iterator[Row]:
    plan = {
        "quick": ((4, 2),),
        "default": ((4, 10),),
        "full": ((4, 10), (50, 5), *(((500, 3),) if on.device == "cuda" else ())),
    }
    training, held_out = _parts(digits, 0, on.device)
    for blocks, epochs in plan[preset]:
        progress(f"depthwise-separable, {2 * blocks + 1} convolutions")
        torch.manual_seed(0)
        net = separable(blocks).to(on.device)
        train(net, training, epochs)
        yield book.measured("A2", f"accuracy, residual depthwise-separable net, {2 * blocks + 1} convolutions",
                            accuracy(net, held_out), "of 1", on, note=f"{epochs} epochs, Adam")  # fmt: skip


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    measured = [row for row in rows if row.status == "measured" and "depth" in row.series]
    gradients = [row for row in measured if "norm" in row.series]
    if not gradients:
        return []
    paths = []
    shown = max((d for d in (r.series["depth"][0] for r in gradients) if d <= 50), default=gradients[0].series["depth"][0])
    path = out / "claim6_gradients.png"
    with plot.figure(path) as (_, ax):
        for row in gradients:
            if row.series["depth"][0] == shown:
                norms = [n if n > 0 and math.isfinite(n) else math.nan for n in row.series["norm"]]
                ax.plot(range(1, len(norms) + 1), norms, marker=".", label=_net(row))
        ax.set_yscale("log")
        ax.set_xlabel("hidden layer")
        ax.set_ylabel("norm of the weight's gradient")
        ax.set_title(f"Does the signal reach the first layer? {shown:.0f} layers, before training", fontsize=11)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    paths.append(path)

    path = out / "claim6_accuracy.png"
    with plot.figure(path) as (_, ax):
        for name in NETS:
            line = [(r.series["depth"][0], r.value, r.low, r.high) for r in measured if r.unit == "of 1" and _net(r) == name]
            if not line:
                continue
            depths, values, low, high = zip(*sorted(line), strict=True)
            ax.plot(depths, values, marker="o", label=name)
            ax.fill_between(depths, low, high, alpha=0.15)
        ax.axhline(0.1, color="0.5", ls=":", lw=1)
        ax.annotate("guessing", (5, 0.11), fontsize=7, color="0.4")
        ax.set_xscale("log")
        ax.set_xlabel("layers")
        ax.set_ylabel("accuracy on held-out digits")
        ax.set_title("Which nets learn at which depth", fontsize=11)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return [*paths, path]


def _net(row: Row) -> str:
    return next((name for name in sorted(NETS, key=len, reverse=True) if f", {name}," in row.quantity), "")
