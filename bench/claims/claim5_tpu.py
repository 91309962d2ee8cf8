"""Google's TPU is ten times as fast as the best GPUs, and far more energy efficient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Row

CLAIM = 5
TITLE = "The TPU is ten times as fast as the best GPUs"
SAYS = "Google's TPU is reported to be ten times as fast, and far more energy efficient, than top-of-the-line GPUs."
COMPARES = (
    "Google's announcement of 2016 says an order of magnitude better performance per watt. The paper that followed "
    "compares 8-bit inference on the TPU with one die of a Tesla K80 of 2014: 15 to 30 times as fast, 30 to 80 times per "
    "watt. Neither is training, neither is single precision."
)
READING = (
    "Two statements have become one. No TPU is measured here. The nearest thing on other machines is what their matrix "
    "units gain over their vector units when precision is given up, which is how the TPU was fast."
)
HEADLINES = ("inference per watt", "bf16 product")
PAPER = "Jouppi et al., ISCA 2017, arXiv 1704.04760"
SIDE = {"quick": 1024, "default": 1024, "full": 2048}


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book, tpu = lab.Notebook(CLAIM, preset), lab.devices()["tpu_v1"]
    more = {"hardware": "other", "note": tpu["note"]}
    yield book.cited("H7", "8-bit peak, inference", 1e3 * tpu["int8_tops"], "Gop/s", tpu["name"], tpu["source"], **more)
    for what, low, high in (
        ("inference, over one K80 die or a Haswell CPU", 15, 30),
        ("inference per watt, over one K80 die or a Haswell CPU", 30, 80),
    ):
        middle = (low * high) ** 0.5
        yield book.cited("H7", what, middle, "x", tpu["name"], PAPER, low=low, high=high, hardware="other")
    yield book.cited("H7", "performance per watt, \"an order of magnitude\"", 10, "x", tpu["name"],
                     "Google I/O keynote, 18 May 2016", hardware="other")  # fmt: skip
    yield book.not_measured(
        "H7", "a TPU, and energy on any device", "no TPU here, and power is not read", PAPER, hardware="other"
    )

    machines = lab.machines(device)
    for index, on in enumerate(machines):
        n = 8192 if on.device == "cuda" else SIDE[preset]
        yield from _precisions(book, on, n, lambda note, done: progress(note, (index + done) / len(machines)))
    if device != "cuda":
        yield book.no_gpu("H7", "fp32 on vector units against bf16 and int8 on matrix units")


def _precisions(book: lab.Notebook, on: lab.Machine, n: int, progress: lab.Progress) -> Iterator[Row]:
    fp32: Row | None = None
    for index, name in enumerate(("fp32", "bf16", "int8")):
        progress(f"{name} product", index / 3)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(name)
        if dtype is not None:
            x, y = (torch.randn(n, n, device=on.device).to(dtype) for _ in range(2))
            spread = on.time(lambda: torch.mm(x, y))
        else:
            x, y = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device=on.device) for _ in range(2))
            try:
                spread = on.time(lambda: torch._int_mm(x, y))
            except RuntimeError as error:  # a private operator: not on every build
                yield book.not_measured("H7", f"int8 product of {n}x{n}", f"torch._int_mm: {error}", hardware=on.hardware)
                continue
        row = book.measured(
            "H7", f"{name} product of {n}x{n}", spread.per(2 * n**3 / 1e9), "Gop/s", on,
            baseline=lab.baseline(fp32, "its fp32 product") if fp32 else None,
        )  # fmt: skip
        fp32 = fp32 or row
        yield row


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    ratios = [row for row in rows if row.unit == "Gop/s"]
    return [plot.dots(ratios, out / "claim5_tpu.png", "Precision given up for speed", "10^9 operations a second")]
