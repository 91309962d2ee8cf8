"""Deep learning scales: mini-batches of a data set of any size, on parallel hardware."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dlaccel.bench.claims import lab
from dlaccel.bench.claims.row import Row
from dlaccel.functional import cross_entropy
from dlaccel.nn import LinearReLU

CLAIM = 8
TITLE = "Data of any size, on parallel hardware"
SAYS = (
    "Training in mini-batches takes a data set of any size, and is highly parallel, so that the only bottleneck is the "
    "parallel arithmetic one can buy."
)
COMPARES = (
    "Images a second against the size of the batch; memory against the size of the data set, at one batch size; one "
    "process against two that exchange gradients (gloo), with the same number of images a step."
)
READING = (
    "Memory is flat: only the batch is in it. Throughput grows with the batch until the machine is full. The last part is "
    "wrong for most layers: normalization, activations, the loss and depthwise convolutions wait for memory, not "
    "arithmetic. What two processes show is that the weights agree; on two cores no speed-up is claimed."
)
HEADLINES = (
    "training throughput, batch 1",
    "training throughput, batch 256",
    "peak memory, one epoch of 80",
    "peak memory, one epoch of 640",
)
BATCHES = {"quick": (1, 16, 256), "default": (1, 4, 16, 64, 128, 256), "full": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
GPU_BATCHES = (1, 16, 256, 1024, 4096, 16384)
IMAGES = {"quick": (10_000, 80_000), "default": (10_000, 40_000, 160_000, 640_000), "full": (10_000, 40_000, 160_000, 640_000)}
PIXELS, BATCH, STEPS = 784, 128, 60


def network() -> nn.Sequential:
    return nn.Sequential(LinearReLU(PIXELS, 512), LinearReLU(512, 256), nn.Linear(256, 10))


def run(preset: str, device: str, progress: lab.Progress) -> Iterator[Row]:
    book = lab.Notebook(CLAIM, preset)
    machines = lab.machines(device)
    for index, on in enumerate(machines):
        progress("batch sizes", 0.1 * index)
        yield from _batches(book, on, GPU_BATCHES if on.device == "cuda" else BATCHES[preset])
    if device != "cuda":
        yield book.no_gpu("A6", "images a second against batch size on a GPU")
    sizes, cpu = IMAGES[preset], machines[0]
    smallest: Row | None = None
    for index, images in enumerate(sizes):
        progress(f"a data set of {images:,} images", 0.3 + 0.4 * index / len(sizes))
        peak, loaded = _in_process(_peak_memory, images)
        row = book.measured(
            "A6", f"peak memory, one epoch of {images:,} images", peak / 1e6, "MB", cpu,
            baseline=lab.baseline(smallest, f"{sizes[0]:,} images") if smallest else None,
            note=f"data set {images * PIXELS / 1e6:,.0f} MB; {loaded / 1e6:.0f} MB before it",
            series={"images": [float(images)]},
        )  # fmt: skip
        smallest = smallest or row
        yield row
    progress("two processes", 0.75)
    yield from _parallel(book)
    if device == "cuda":
        count = torch.cuda.device_count()
        yield book.not_measured(
            "A6", "data-parallel training over several GPUs", f"not written yet; {count} here", hardware="gpu"
        )


def _batches(book: lab.Notebook, on: lab.Machine, sizes: Sequence[int]) -> Iterator[Row]:
    smallest: Row | None = None
    torch.manual_seed(0)
    model = network().to(on.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for size in sizes:
        x = torch.randn(size, PIXELS, device=on.device)
        y = torch.randint(0, 10, (size,), device=on.device)
        if on.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spread = on.time(lambda x=x, y=y: _step(model, optimizer, x, y), seconds=0.5)  # type: ignore[misc]
        note = f"{1e3 * spread.median:.3g} ms a step"
        if on.device == "cuda":
            note += f", {torch.cuda.max_memory_allocated() / 1e6:.0f} MB"
        row = book.measured(
            "A6", f"training throughput, batch {size}", spread.per(size), "images/s", on, note=note,
            baseline=lab.baseline(smallest, f"batch {sizes[0]}") if smallest else None, series={"batch": [float(size)]},
        )  # fmt: skip
        smallest = smallest or row
        yield row


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _in_process(function: object, *args: object) -> tuple[float, float]:
    """Runs it in a fresh interpreter: a process never forgets its peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)  # type: ignore[arg-type, no-any-return]


def _peak_memory(images: int) -> tuple[float, float]:
    """Peak bytes of a process that trains one epoch on a file of that many images, and bytes before it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryFile() as file:
        random = np.random.default_rng(0)
        for start in range(0, images, 10_000):
            count = min(10_000, images - start)
            file.write(random.integers(0, 256, count * PIXELS, dtype=np.uint8).tobytes())
        file.flush()
        model = nn.Sequential(LinearReLU(PIXELS, 64), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        before = _status("VmRSS")
        for batch in range(images // BATCH):
            pixels = os.pread(file.fileno(), BATCH * PIXELS, batch * BATCH * PIXELS)
            x = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(BATCH, PIXELS) / 255
            _step(model, optimizer, x, torch.randint(0, 10, (BATCH,)))
    return _status("VmHWM"), before


def _status(name: str) -> float:
    """Bytes of one line of /proc/self/status. (ru_maxrss would include the parent's peak.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def _parallel(book: lab.Notebook) -> Iterator[Row]:
    """The same images a step, by one process with two threads and by two processes with one thread each."""
    if (cores := len(os.sched_getaffinity(0))) < 2:
        yield book.not_measured("A6", "two processes against two threads", f"{cores} core here")
        return
    with tempfile.TemporaryDirectory() as folder:
        for function, processes in ((_train_shared, 2), (_train_alone, 1)):
            torch.multiprocessing.start_processes(function, (folder,), processes, start_method="spawn")  # type: ignore
        two, alone = (torch.load(f"{folder}/{name}.pt", weights_only=True) for name in ("two", "one"))
    on, now = lab.Machine("cpu", "wall", 2), lab.machine("cpu")
    if now.clock != "wall":
        reason = f"load {now.environment()['load']}: threads and processes that wait for each other wait for the other work"
        yield book.not_measured("A6", "training throughput of 2 threads, and of 2 processes", reason)
    for name, run in (("1 process x 2 threads", alone), ("2 processes x 1 thread, gloo", two)) if now.clock == "wall" else ():
        rate = lab.Spread(run["seconds"]).per(2 * BATCH)
        yield book.measured("A6", f"training throughput, {name}", rate, "images/s", on, note="wall clock")
    difference = max(float((two["model"][name] - weight).abs().max()) for name, weight in alone["model"].items())
    moved = max(float((weight - alone["before"][name]).abs().max()) for name, weight in alone["model"].items())
    note = f"after {STEPS} steps of {2 * BATCH} images; training moved weights by up to {moved:.2g}"
    yield book.measured("A6", "largest difference of a weight, 2 processes against 1", difference, "", on, note=note)


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2 * BATCH, PIXELS, generator=generator), torch.randint(0, 10, (2 * BATCH,), generator=generator)


def _train(model: nn.Module, rank: int, world: int) -> list[float]:
    """Seconds of each step on this process's share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    times = []
    for step in range(STEPS):
        x, y = (t.chunk(world)[rank] for t in _batch(step))
        begin = time.perf_counter()
        _step(model, optimizer, x, y)
        times.append(time.perf_counter() - begin)
    return times


def _start(threads: int) -> tuple[nn.Sequential, dict[str, Tensor]]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = network()
    return model, {name: weight.clone() for name, weight in model.state_dict().items()}


def _train_alone(rank: int, folder: str) -> None:
    model, before = _start(threads=2)
    seconds = _train(model, 0, 1)
    torch.save({"seconds": seconds, "model": model.state_dict(), "before": before}, f"{folder}/one.pt")


def _train_shared(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model, _ = _start(threads=1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    seconds = _train(DistributedDataParallel(model), rank, 2)
    dist.destroy_process_group()
    if rank == 0:
        torch.save({"seconds": seconds, "model": model.state_dict()}, f"{folder}/two.pt")


def figures(rows: Sequence[Row], out: Path) -> list[Path]:
    from dlaccel.bench.claims import plot

    path = out / "claim8_scaling.png"
    with plot.figure(path, 9, 3.2, ncols=2) as (_, (left, right)):
        for device in dict.fromkeys(row.device for row in rows if "batch" in row.series):
            line = sorted((row.series["batch"][0], row.value) for row in rows if row.device == device and "batch" in row.series)
            left.plot(*zip(*line, strict=True), marker="o", label=device)
        left.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title="Throughput of training")
        left.legend(fontsize=7)
        memory = sorted((row.series["images"][0] * PIXELS / 1e6, row.value or 0) for row in rows if "images" in row.series)
        if memory:
            right.plot(*zip(*memory, strict=True), marker="o", label="peak of the process")
            right.plot(*zip(*((mb, mb) for mb, _ in memory), strict=True), ls=":", color="0.5", label="the data set itself")
            right.set(xscale="log", ylim=(0, 2 * max(value for _, value in memory)), xlabel="data set, MB", ylabel="MB",
                      title="Memory of training")  # fmt: skip
            right.legend(fontsize=7)
        for ax in (left, right):
            ax.grid(alpha=0.3)
    return [path]
