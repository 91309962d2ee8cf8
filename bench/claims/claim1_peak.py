"""A TITAN X of 2015 peaks at 6.6 TFLOPS, about 350 times a modern laptop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Baseline, Row
from dlaccel.functional import linear_relu

CLAIM = 1
TITLE = "A $1,000 graphics card is worth 350 laptops"
SAYS = "The NVIDIA TITAN X, $1,000 at the end of 2015, reaches 6.6 TFLOPS in single precision: about 350 times a modern laptop."
COMPARES = (
    "The most a GPU could do at its boost clock, with what a laptop program without vector instructions achieves: 6.6 "
    "TFLOPS / 350 = 18.9 GFLOPS. A 2-core laptop of 2015 could do 173 GFLOPS, so peak against peak the card was 38 "
    "laptops. No workload, precision or source is given with the number."
)
READING = (
    "Measured on the same network, the card was 19 to 61 times a 6-core desktop CPU, depending on the CPU's software "
    "alone. No public measurement supports 350. A peak of 350 such laptops came seven years later, with the H100; "
    "laptops had moved on by then."
)
HEADLINES = ("fp32 matrix product", "TITAN X over i7")
CITED_RUNS = [
    ("TITAN X over dual E5-2630v3, 8 networks, forward + backward", 40.5, 49.4, "jcjohnson/cnn-benchmarks 83d441f, cuDNN 5.1"),
    ("K80 die over dual E5-2666v3, 9 networks, forward + backward", 7.9, 22.2, "Paperspace/cnn-benchmarks df524d3"),
    (
        "TITAN X over i7-5930K, AlexNet, three versions of Caffe on the CPU",
        19.0,
        61.0,
        "soumith/convnet-benchmarks, branch cpu",
    ),
]
SIZES = {"quick": (256, 512, 1024), "default": (256, 512, 1024, 2048), "full": (256, 512, 1024, 2048, 4096)}
GPU_SIZES = (1024, 4096, 8192)


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book, table = lab.Notebook(CLAIM, preset), lab.devices()
    implied = Baseline(what=table["laptop_implied"]["name"], value=18.9, status="cited")
    for id in ("titan_x", "k80_die", "k40", "h100_sxm"):
        chip = table[id]
        yield book.cited(
            "H1", "fp32 peak", 1e3 * chip["fp32_tflops"], "GFLOP/s", chip["name"], chip["source"], hardware="gpu",
            baseline=implied, note=f"{chip['clock']}; {chip.get('note', '')}".rstrip("; "),
        )  # fmt: skip
    for id in ("laptop_2015", "e5_2697v2"):
        chip = table[id]
        yield book.projected(
            "H2",
            "fp32 peak",
            1e3 * chip["fp32_tflops"],
            "GFLOP/s",
            chip["name"],
            chip["source"],
            "upper bound",
            baseline=implied,
        )
    for what, low, high, source in CITED_RUNS:
        yield book.cited("H2", what, (low * high) ** 0.5, "x", "as named", source, low=low, high=high, hardware="gpu")

    # One core always; all cores where no other work would be timed with them.
    machines, now = [lab.Machine("cpu", "thread", 1)], lab.machine("cpu")
    if now.clock == "wall":
        machines.append(now)
    else:
        reason = f"load {now.environment()['load']}: the other work on this machine would be in the time"
        yield book.not_measured("H2", "matrix products on all cores", reason)
    if device == "cuda":
        machines.append(lab.machine("cuda"))
    best: Row | None = None  # fp32 on this CPU
    for index, on in enumerate(machines):
        for row in _products(book, preset, on, lambda note, done: progress(note, (index + done) / len(machines))):
            if on.device == "cuda" and best is not None:
                row = replace(row, baseline=lab.baseline(best, f"this CPU: {best.quantity}"))
            elif row.quantity.startswith("fp32 matrix") and (best is None or (row.value or 0) > (best.value or 0)):
                best = row
            yield row
    if device != "cuda":
        yield book.no_gpu("H1", "fp32, tf32, bf16 and fp64 matrix product on a GPU, against this CPU")


def _products(book: lab.Notebook, preset: str, on: lab.Machine, progress: lab.Progress) -> Iterator[Row]:
    """The best size of each precision: a peak is a best case."""
    gpu = on.device == "cuda"
    sizes = GPU_SIZES if gpu else SIZES[preset]
    kinds = [("fp32", torch.float32, "ieee"), ("fp64", torch.float64, "ieee"), ("bf16", torch.bfloat16, "ieee")]
    if gpu:
        kinds.insert(1, ("tf32", torch.float32, "tf32"))
    total = len(kinds) + 1
    for index, (name, dtype, precision) in enumerate(kinds):
        progress(f"{name} matrix product", index / total)
        with lab.float32_products(precision) if gpu else nullcontext():
            rates = {n: _rate(on, n, dtype) for n in sizes if not (name == "fp64" and n > 2048 and not gpu)}
        yield _best(book, f"{name} matrix product", rates, on, precision)
    progress("fp32 linear_relu", (total - 1) / total)
    rates = {n: _linear_relu_rate(on, n) for n in sizes}
    yield _best(book, "fp32 dlaccel.functional.linear_relu", rates, on, "ieee")


def _best(book: lab.Notebook, quantity: str, rates: dict[int, lab.Spread], on: lab.Machine, precision: str) -> Row:
    side = max(rates, key=lambda n: rates[n].median)
    series = {"side": [float(n) for n in rates], "gflops": [round(r.median, 2) for r in rates.values()]}
    implied = Baseline(what="the laptop that 350x implies", value=18.9, status="cited")
    if on.device == "cpu":
        quantity += f", {on.threads} thread{'s' * (on.threads > 1)}"
    return book.measured(
        "H1" if on.device == "cuda" else "H2", quantity, rates[side], "GFLOP/s", on,
        precision=precision, baseline=implied, series=series, note=f"best of sides {', '.join(map(str, rates))}: {side}",
    )  # fmt: skip


def _rate(on: lab.Machine, n: int, dtype: torch.dtype) -> lab.Spread:
    x, y = (torch.randn(n, n, device=on.device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    return on.time(lambda: torch.mm(x, y, out=out)).per(2 * n**3 / 1e9)


@torch.no_grad()
def _linear_relu_rate(on: lab.Machine, n: int) -> lab.Spread:
    x, w, b = (torch.randn(*shape, device=on.device) for shape in ((n, n), (n, n), (n,)))
    return on.time(lambda: linear_relu(x, w, b)).per(2 * n**3 / 1e9)


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    peaks = [row for row in rows if row.unit == "GFLOP/s" and row.value]
    return [plot.dots(peaks, out / "claim1_peak.png", "Arithmetic rate: peaks, and products measured here", "GFLOP/s")]
