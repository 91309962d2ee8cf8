"""Memory bandwidth: 20 GB/s for a CPU, 288 GB/s for a GPU; sparse data needs random access."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Baseline, Row

CLAIM = 3
TITLE = "A GPU's memory is 14 times as fast as a CPU's"
SAYS = (
    "CPU: 20 GB/s to memory, 16 to other devices. GPU: 288 and 20. TPU: 20 and 16. Dense data is read in sequence, sparse "
    "data at random."
)
COMPARES = (
    "DARPA's table for its HIVE programme (2017). 288 GB/s is the board of a Tesla K40; 20 GB/s is about one channel of "
    "DDR4, a third of what the socket beside that K40 had (59.7 GB/s, calculated). 16 is a PCIe 3.0 x16 slot, 20 one "
    "NVLink."
)
READING = (
    "Right for a GPU of 2013, low for a server CPU of the same year. The last line is the one that matters: the same "
    "machine reads a few per cent of its bandwidth when the order is random. Bandwidth counts bytes read plus bytes "
    "written, once each."
)
HEADLINES = ("copy", "gather in order", "gather at random")
MIB = {"quick": 128, "default": 128, "full": 256}
GPU_MIB = 1024  # far beyond the L2 cache


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book, table = lab.Notebook(CLAIM, preset), lab.devices()
    slide_cpu = Baseline(what="the slide's CPU", value=20, status="cited")
    for id in ("darpa_cpu", "darpa_gpu", "darpa_tpu"):
        chip = table[id]
        more = {"hardware": chip["hardware"], "note": chip.get("note", "")}
        yield book.cited("H8", "memory", chip["gbps"], "GB/s", chip["name"], chip["source"], baseline=slide_cpu, **more)
        yield book.cited("H8", "link to other devices", chip["link_gbps"], "GB/s", chip["name"], chip["source"], **more)
    for id in ("k40", "titan_x", "h100_sxm"):
        chip = table[id]
        yield book.cited("H8", "memory", chip["gbps"], "GB/s", chip["name"], chip["source"], hardware="gpu", baseline=slide_cpu)
    chip = table["e5_2697v2"]
    yield book.projected(
        "H5", "memory", chip["gbps"], "GB/s", chip["name"], "4 channels x 1.866 GT/s x 8 B", "upper bound", baseline=slide_cpu
    )

    machines = lab.machines(device)
    for index, on in enumerate(machines):
        mib = GPU_MIB if on.device == "cuda" else MIB[preset]
        yield from _traffic(book, on, mib, lambda note, done: progress(note, (index + done) / len(machines)))
    if device == "cuda":
        yield from _link(book, machines[1])
    else:
        yield book.no_gpu("H8", "copy, triad, gather and pinned host-device copy on a GPU")


def _traffic(book: lab.Notebook, on: lab.Machine, mib: int, progress: lab.Progress) -> Iterator[Row]:
    count = mib * 2**20 // 4
    a, b = (torch.randn(count, device=on.device) for _ in range(2))
    out = torch.zeros_like(a)
    random, in_order = torch.randperm(count, device=on.device), torch.arange(count, device=on.device)
    # A gather reads and writes 4 bytes an element, and reads its 8-byte index.
    kinds = [
        ("copy", 8, lambda: out.copy_(a)),
        ("triad (a + 3 b)", 12, lambda: torch.add(a, b, alpha=3.0, out=out)),
        ("gather in order", 16, lambda: torch.index_select(a, 0, in_order, out=out)),
        ("gather at random", 16, lambda: torch.index_select(a, 0, random, out=out)),
    ]
    slide = Baseline(what="the slide's GPU" if on.device == "cuda" else "the slide's CPU", status="cited",
                     value=288 if on.device == "cuda" else 20)  # fmt: skip
    ordered: Row | None = None
    for index, (name, size, call) in enumerate(kinds):
        progress(name, index / len(kinds))
        rate = on.time(call, seconds=0.5).per(size * count / 1e9)
        random_access = name == "gather at random"
        against = lab.baseline(ordered, "the same gather in order") if random_access and ordered else slide
        row = book.measured(
            "H10" if "gather" in name else "H8", f"{name}, arrays of {mib} MiB", rate, "GB/s", on, baseline=against,
        )  # fmt: skip
        if name == "gather in order":
            ordered = row
        yield row


def _link(book: lab.Notebook, on: lab.Machine) -> Iterator[Row]:
    """Copies between pinned host memory and the device. Not yet run on a GPU."""
    count = 64 * 2**20
    host, device = torch.randn(count).pin_memory(), torch.empty(count, device=on.device)
    slide = Baseline(what="the slide's GPU link", value=20, status="cited")
    for name, call in (("host to device", lambda: device.copy_(host)), ("device to host", lambda: host.copy_(device))):
        yield book.measured("H8", f"pinned copy, {name}", on.time(call).per(4 * count / 1e9), "GB/s", on, baseline=slide)


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    return [plot.dots([r for r in rows if r.unit == "GB/s"], out / "claim3_bandwidth.png", "Memory bandwidth", "GB/s")]
