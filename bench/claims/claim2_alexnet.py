"""Training throughput of AlexNet in Caffe over 20 iterations: the Tesla K80 against a CPU."""

from __future__ import annotations

import contextlib
import resource
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Baseline, Row
from dlaccel.functional import cross_entropy, linear_relu

CLAIM = 2
TITLE = "AlexNet trains many times as fast on a Tesla K80"
SAYS = (
    "NVIDIA's bar chart: training throughput of AlexNet in Caffe over 20 iterations, against an Intel E5-2697 v2 at 2.7 "
    "GHz; the K80 has 4992 cores, 2.9 TFLOPS, 480 GB/s, and is twice as fast, with double the memory."
)
COMPARES = (
    "The board is two GPUs, and a process of 2014 used one. 4992 cores and 480 GB/s are sums of both; 2.9 TFLOPS is their "
    'double-precision rate at boost clock, printed beside single-precision work (8.7 TFLOPS). "Twice" and "double" are '
    "against the K40, not the CPU. The chart does not say how many sockets, threads or which BLAS the CPU had, and "
    "Caffe's CPU path of 2014 multiplied one image at a time: batching alone made it 4.5 times as fast (arXiv "
    "1504.04343)."
)
READING = (
    "The values of the bars are not in the text of the lecture and were not found elsewhere, so the protocol is repeated "
    "instead: 20 iterations of forward, backward and update on AlexNet as Caffe ships it. Rates of convolutions are "
    "nominal: libraries that use fewer multiplications may pass the peak."
)
HEADLINES = ("AlexNet training, fp32, torch ops", "AlexNet training, fp32, dlaccel ops", "CaffeNet training")


class AlexNet(nn.Module):
    """BVLC/caffe models/bvlc_alexnet/train_val.prototxt for 227 x 227 images: groups of 2, LRN before pooling.

    Weights start as its fillers say. The options of `forward` change what is computed, not the weights, so that variants
    share one network.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, 4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.fc6, self.fc7, self.fc8 = nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, classes)
        std = {"fc6": 0.005, "fc7": 0.005}
        bias = {"conv2": 0.1, "conv4": 0.1, "conv5": 0.1, "fc6": 0.1, "fc7": 0.1}
        for name, layer in self.named_children():
            assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
            nn.init.normal_(layer.weight, std=std.get(name, 0.01))
            nn.init.constant_(layer.bias, bias.get(name, 0.0))

    def forward(self, x: Tensor, lrn: bool = True, caffenet: bool = False, dlaccel: bool = False) -> Tensor:
        """`lrn` off, or `caffenet` order (pooling before LRN), or `dlaccel` for the fully connected layers with ReLU."""

        def norm(x: Tensor) -> Tensor:
            return F.local_response_norm(x, 5, 1e-4, 0.75, 1.0) if lrn else x

        def reduce(x: Tensor) -> Tensor:
            return norm(F.max_pool2d(x, 3, 2)) if caffenet else F.max_pool2d(norm(x), 3, 2)

        def dense(x: Tensor, layer: nn.Linear) -> Tensor:
            x = linear_relu(x, layer.weight, layer.bias) if dlaccel else layer(x).relu_()
            return F.dropout(x, 0.5, self.training)

        x = reduce(F.relu_(self.conv1(x)))
        x = reduce(F.relu_(self.conv2(x)))
        x = F.relu_(self.conv4(F.relu_(self.conv3(x))))
        x = F.max_pool2d(F.relu_(self.conv5(x)), 3, 2).flatten(1)
        return self.fc8(dense(dense(x, self.fc6), self.fc7))  # type: ignore[no-any-return]

    def optimizer(self) -> torch.optim.SGD:
        """The solver's: momentum .9; biases learn twice as fast and do not decay."""
        weights = [p for p in self.parameters() if p.dim() > 1]
        biases = [p for p in self.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 5e-4}, {"params": biases, "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def multiply_adds() -> list[int]:
    """Of each layer, for one image, forward."""
    with torch.device("meta"):
        model, sizes = AlexNet(), (55, 27, 13, 13, 13)
    convs = [model.conv1, model.conv2, model.conv3, model.conv4, model.conv5]
    dense = [model.fc6, model.fc7, model.fc8]
    return [c.weight.numel() * side**2 for c, side in zip(convs, sizes, strict=True)] + [d.weight.numel() for d in dense]


def training_flops() -> int:
    """Of one image: forward, gradients of weights and of inputs, the last not for the first layer."""
    counts = multiply_adds()
    return 2 * (3 * sum(counts) - counts[0])


@dataclass(frozen=True)
class Variant:
    name: str
    lrn: bool = True
    caffenet: bool = False
    dlaccel: bool = False
    autocast: bool = False
    precision: str = "ieee"


PLAIN = Variant("fp32, torch ops")
VARIANTS = [
    PLAIN,
    Variant("fp32, dlaccel ops", dlaccel=True),
    Variant("fp32, torch ops, no LRN", lrn=False),
    Variant("fp32, dlaccel ops, no LRN", lrn=False, dlaccel=True),
    Variant("fp32, torch ops, CaffeNet order", caffenet=True),
    Variant("bf16 autocast, torch ops", autocast=True),
    Variant("bf16 autocast, dlaccel ops", autocast=True, dlaccel=True),
]
GPU_VARIANTS = [*VARIANTS, Variant("tf32, torch ops", precision="tf32")]
ITERATIONS = 20
BATCH = {"quick": 8, "default": 32, "full": 256}
GPU_BATCH = 256
OTHERS = {"quick": 3, "default": 8, "full": ITERATIONS}  # iterations of every variant but the first


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book = lab.Notebook(CLAIM, preset)
    yield from _published(book)
    yield from _projections(book)
    yield book.not_measured("H4", "the bars of the chart", "their values were not recovered", hardware="gpu")
    machines = lab.machines(device)
    cpu: Row | None = None
    for index, on in enumerate(machines):
        for row in _train(book, on, preset, lambda note, done: progress(note, (index + done) / len(machines))):
            if row.unit == "images/s" and row.baseline is None:  # PLAIN: the others are set against it
                if cpu is not None:
                    row = replace(
                        row, baseline=lab.baseline(cpu, f"this CPU: {cpu.quantity}, threads: {cpu.environment['threads']}")
                    )
                cpu = cpu or row
            yield row
    if device != "cuda":
        yield book.no_gpu("H4", f"AlexNet, {ITERATIONS} iterations of {GPU_BATCH} images on a GPU, fp32, tf32 and bf16")


def _published(book: lab.Notebook) -> Iterator[Row]:
    caffe = "BVLC/caffe docs/performance_hardware.md at 44da39f: 20 iterations of 256 images, CaffeNet"
    for device, seconds in (("Tesla K40, cuDNN", 19.2), ("Tesla K40, without cuDNN", 26.5), ("GTX 770, cuDNN", 24.3)):
        value, formula = ITERATIONS * 256 / seconds, f"20 x 256 / {seconds} s"
        yield book.cited("H4", "CaffeNet training", value, "images/s", device, caffe, formula=formula, hardware="gpu")
    runs = [
        ("AlexNet forward + backward, batch 16", 732, "TITAN X, cuDNN 5.1", "gpu", "jcjohnson/cnn-benchmarks 83d441f"),
        (
            "AlexNet forward + backward, batch 16",
            336,
            "Tesla K80, one of its two dies",
            "gpu",
            "Paperspace/cnn-benchmarks df524d3",
        ),
        (
            "AlexNet forward + backward, batch 128",
            26,
            "i7-5930K (6 cores), Caffe + OpenBLAS",
            "cpu",
            "soumith/convnet-benchmarks",
        ),
        ("AlexNet forward + backward, batch 256", 46, "i7-5930K (6 cores), Caffe + MKL", "cpu", "soumith/convnet-benchmarks"),
        ("AlexNet forward + backward, batch 256", 83, "i7-5930K (6 cores), Intel's Caffe", "cpu", "soumith/convnet-benchmarks"),
    ]
    for quantity, value, device, hardware, source in runs:
        yield book.cited("H4", quantity, value, "images/s", device, source, hardware=hardware)
    board, die = lab.devices()["k80_board"], lab.devices()["k80_die"]
    yield book.cited("H3", "fp64 peak at boost clock", 1e3 * board["fp64_tflops"], "GFLOP/s", board["name"], board["source"],
                     hardware="gpu", note="the slide's 2.9 TFLOPS")  # fmt: skip
    yield book.cited("H3", "fp32 peak at boost clock", 1e3 * die["fp32_tflops"], "GFLOP/s", die["name"], die["source"],
                     hardware="gpu", note="what the chart's process could use")  # fmt: skip


# What AlexNet reached of a peak at boost clock in published runs: K40 .22 (2014, cuDNN 1) to TITAN X .46 (2016, cuDNN 5); of
# the nominal peak of an i7-5930K (6 x 3.5 GHz x 32 FLOP a cycle) Caffe with OpenBLAS .16 to Intel's Caffe .51.
EFFICIENCY = {"gpu": (0.22, 0.46), "cpu": (0.16, 0.51)}
RUNS = {
    "gpu": "efficiencies: K40 in Caffe's documentation, TITAN X in jcjohnson/cnn-benchmarks",
    "cpu": "efficiencies: i7-5930K in soumith/convnet-benchmarks, Caffe with OpenBLAS and Intel's",
}


def _projections(book: lab.Notebook) -> Iterator[Row]:
    flops = training_flops()
    for id in ("k80_die", "k80_board", "titan_x", "e5_2697v2", "h100_sxm", "h200_sxm"):
        chip = lab.devices()[id]
        bound = 1e12 * chip["fp32_tflops"] / flops
        least, most = EFFICIENCY[chip["hardware"]]
        low, high = bound * least, bound * most
        yield book.projected(
            "H4", "AlexNet training, fp32", (low * high) ** 0.5, "images/s", chip["name"],
            f"{chip['fp32_tflops']} TFLOPS / {flops / 1e9:.3f} GFLOP an image x {least} to {most} of peak",
            RUNS[chip["hardware"]], low=low, high=high,
            hardware=chip["hardware"], note=f"at 100 % of peak {bound:,.0f} images/s",
        )  # fmt: skip


def _train(book: lab.Notebook, on: lab.Machine, preset: str, progress: lab.Progress) -> Iterator[Row]:
    gpu = on.device == "cuda"
    batch = GPU_BATCH if gpu else BATCH[preset]
    variants = GPU_VARIANTS if gpu else VARIANTS
    many = {v.name: ITERATIONS if gpu or v is PLAIN else OTHERS[preset] for v in variants}
    total = sum(many.values())
    torch.manual_seed(0)
    model = AlexNet().train().to(on.device)
    optimizer = model.optimizer()
    x = torch.randn(batch, 3, 227, 227, device=on.device)
    y = torch.randint(0, 1000, (batch,), device=on.device)
    phases: dict[str, list[list[float]]] = {v.name: [] for v in variants}
    done = 0
    with on.active():
        for iteration in range(-1, ITERATIONS):  # variants alternate, so that all see the same load; the first is not counted
            for variant in variants:
                if iteration < many[variant.name]:
                    progress(f"AlexNet, {batch} images, {variant.name}", done / total)
                    times = _step(on, model, optimizer, x, y, variant)
                    if iteration >= 0:
                        phases[variant.name].append(times)
                        done += 1
    seconds = {v: [sum(times) for times in phases[v.name]] for v in variants}
    for variant in variants:
        spread = lab.Spread(seconds[variant])
        parts = [statistics.median(t) for t in zip(*phases[variant.name], strict=True)]
        # Ours against torch's ops in the same network, any other network against the plain one, over the same iterations.
        other = replace(variant, name=variant.name.replace("dlaccel", "torch"), dlaccel=False) if variant.dlaccel else PLAIN
        same = lab.Spread(seconds[other][: len(spread.samples)]).per(batch)
        yield book.measured(
            "H4", f"AlexNet training, {variant.name}, {many[variant.name]} x {batch}", spread.per(batch), "images/s", on,
            precision=variant.precision, note=f"forward, backward, update: {', '.join(f'{1e3 * p:.0f}' for p in parts)} ms",
            series={"seconds": [round(s, 4) for s in spread.samples]},
            baseline=None if variant == other else Baseline(what=other.name, value=same.median, status="measured"),
        )  # fmt: skip
        if variant is PLAIN:
            rate, formula = training_flops() * batch / spread.median / 1e9, f"{training_flops() / 1e9:.3f} GFLOP an image"
            yield book.measured("H4", f"AlexNet, {variant.name}, nominal rate", rate, "GFLOP/s", on, formula=formula)
    memory = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield book.measured("H4", f"peak memory of the process, batch {batch}", memory / 1e9, "GB", on)


def _step(
    on: lab.Machine, model: AlexNet, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, variant: Variant
) -> list[float]:
    """One training iteration; seconds of forward, backward, update."""
    held: list[Tensor] = []

    def forward() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(on.device, torch.bfloat16, enabled=variant.autocast):
            prediction = model(x, variant.lrn, variant.caffenet, variant.dlaccel)
            held.append((cross_entropy if variant.dlaccel else F.cross_entropy)(prediction, y))

    def backward() -> None:
        held[0].backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        optimizer.step()

    with lab.float32_products(variant.precision) if on.device == "cuda" else contextlib.nullcontext():
        return [max(on.watch.time(phase), 1e-9) for phase in (forward, backward, update)]


def _label(row: Row) -> str:
    """With the ratio: rates of different iterations are not to be divided."""
    from dlaccel.bench.claims import plot

    against = f"{lab.readable(row.ratio)} x {row.baseline.what}, same iterations\n" if row.ratio and row.baseline else ""
    return against + plot.label(row)


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    rates = [row for row in rows if row.unit == "images/s"]
    return [plot.dots(rates, out / "claim2_alexnet.png", "AlexNet training", "images/s", name=_label)]
