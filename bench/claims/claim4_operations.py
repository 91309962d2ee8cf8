"""A 5x5 matrix is 25 scalar operations, 5 vector operations or 1 matrix operation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Row

CLAIM = 4
TITLE = "Twenty-five scalar operations, five vector operations, or one matrix operation"
SAYS = "On a 5x5 matrix a CPU does 25 scalar operations, a GPU 5 vector operations, a TPU 1 matrix operation."
COMPARES = (
    "Numbers of instructions for an element-wise operation, not speeds. A product of two 5x5 matrices is 125 "
    "multiply-adds: 125 scalar, 5 vector-matrix or 1 matrix operation. CPUs have vector units, and recent CPUs and GPUs "
    "have matrix units."
)
READING = (
    "At 5x5 five calls of torch can be slower than 25 additions in Python, because a call costs more than the work in it. "
    "At 256x256 calls hardly count: vector operations are hundreds of times as fast as the scalar loop, and one "
    "matrix operation several times as fast as they. The scalar loop is Python's: the ratio belongs to this code, "
    "which stands below it."
)
HEADLINES = ("5x5 product, scalar", "5x5 product, matrix", "256x256 product, scalar", "256x256 product, matrix")
SIDES = {"quick": (5, 64, 256), "default": (5, 16, 64, 128, 256), "full": (5, 16, 64, 128, 256, 512)}
SCALAR_ROWS = 8  # of a large product the scalar loop computes this many rows, and the time is scaled
CODE = """\
scalar   for row in a: for j in range(n): for k in range(n): total += row[k] * b[k][j]     (lists of Python floats)
vector   for row, line in zip(a, out): torch.mv(b.T, row, out=line)                        (fp32 tensors)
matrix   torch.mm(a, b, out=out)"""


def scalar_add(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[a[i][j] + b[i][j] for j in range(len(b))] for i in range(len(a))]


def scalar_product(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    result = []
    for row in a:
        line = []
        for j in range(len(b[0])):
            total = 0.0
            for k in range(len(b)):
                total += row[k] * b[k][j]
            line.append(total)
        result.append(line)
    return result


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book, cpu = lab.Notebook(CLAIM, preset), lab.machine("cpu")
    for level, count, chip in (("scalar", 25, "CPU"), ("vector", 5, "GPU"), ("matrix", 1, "TPU")):
        yield book.cited("H9", f"{level} operations on a 5x5 matrix", count, "operations", f"the slide's {chip}", lab.LECTURE)

    progress("5x5 additions", 0)
    yield from _levels(book, cpu, "5x5 addition", 25 / 1e9, _additions(5), "G additions/s")
    sides = SIDES[preset]
    for index, n in enumerate(sides):
        progress(f"{n}x{n} products", (index + 1) / (len(sides) + 2))
        yield from _levels(book, cpu, f"{n}x{n} product", 2 * n**3 / 1e9, _products(n), "GFLOP/s", n)
    if device != "cuda":
        yield book.no_gpu("H9", "matrix product on the vector units and on the matrix units of a GPU")
        return
    progress("matrix units", 0.9)
    yield from _units(book, lab.machine("cuda"))


Levels = dict[str, tuple[Callable[[], object], float]]  # level -> (call, how many calls make the whole)


def _additions(n: int) -> Levels:
    rows, others = ([[random.random() for _ in range(n)] for _ in range(n)] for _ in range(2))
    a, b = torch.tensor(rows), torch.tensor(others)
    out = torch.empty_like(a)
    lines = list(zip(a, b, out, strict=True))

    def vector() -> None:
        for x, y, line in lines:
            torch.add(x, y, out=line)

    return {
        "scalar": (lambda: scalar_add(rows, others), 1),
        "vector": (vector, 1),
        "matrix": (lambda: torch.add(a, b, out=out), 1),
    }


def _products(n: int) -> Levels:
    a, b = torch.rand(2, n, n)
    out = torch.empty_like(a)
    transposed, lines = b.T, list(zip(a, out, strict=True))
    part = min(n, SCALAR_ROWS)
    rows, others = a[:part].tolist(), b.tolist()

    def vector() -> None:
        for row, line in lines:
            torch.mv(transposed, row, out=line)

    return {
        "scalar": (lambda: scalar_product(rows, others), n / part),
        "vector": (vector, 1),
        "matrix": (lambda: torch.mm(a, b, out=out), 1),
    }


def _levels(
    book: lab.Notebook, on: lab.Machine, what: str, amount: float, levels: Levels, unit: str, n: int = 5
) -> Iterator[Row]:
    scalar: Row | None = None
    for level, (call, parts) in levels.items():
        spread = on.time(_repeated(call, 100), seconds=0.1) if n <= 16 else on.time(call, seconds=0.2, least=3)
        calls = 100 if n <= 16 else 1
        rate = spread.per(amount * calls / parts)
        note = f"{lab.readable(1e6 * spread.median * parts / calls)} us"
        row = book.measured(
            "H9", f"{what}, {level}", rate, unit, on, note=note, series={"side": [float(n)]},
            baseline=lab.baseline(scalar, f"{what}, scalar") if scalar else None,
        )  # fmt: skip
        scalar = scalar or row
        yield row


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """A call too short for the clock, many times."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def _units(book: lab.Notebook, on: lab.Machine, n: int = 4096) -> Iterator[Row]:
    """fp32 products run on a GPU's vector units, tf32 and bf16 products on its matrix units. Not yet run on a GPU."""
    vector: Row | None = None
    for name, dtype, precision in (
        ("fp32, vector units", torch.float32, "ieee"),
        ("tf32, matrix units", torch.float32, "tf32"),
        ("bf16, matrix units", torch.bfloat16, "ieee"),
    ):
        x, y = (torch.randn(n, n, device=on.device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        with lab.float32_products(precision):
            rate = on.time(lambda: torch.mm(x, y, out=out)).per(2 * n**3 / 1e9)
        row = book.measured(
            "H9", f"{n}x{n} product, {name}", rate, "GFLOP/s", on, precision=precision, series={"side": [float(n)]},
            baseline=lab.baseline(vector, "its vector units") if vector else None,
        )  # fmt: skip
        vector = vector or row
        yield row


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    products = [row for row in rows if row.status == "measured" and "product" in row.quantity and row.hardware == "cpu"]
    products = [row for row in products if row.series.get("side")]
    if not products:
        return []
    path = out / "claim4_operations.png"
    with plot.figure(path) as (_, ax):
        for level in ("scalar", "vector", "matrix"):
            line = [(row.series["side"][0], row.value) for row in products if row.quantity.endswith(level)]
            ax.plot(*zip(*line, strict=True), marker="o", label=level)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("side of the matrices")
        ax.set_ylabel("GFLOP/s")
        ax.set_title(f"A product as scalar, vector and matrix operations\n{products[0].device}, measured", fontsize=10)
        ax.legend()
        ax.grid(alpha=0.3)
    return [path]
