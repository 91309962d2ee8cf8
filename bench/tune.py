"""`dlaccel.tune` and `python -m dlaccel.bench tune`: measure candidate configurations once, on the GPU at hand.

The winners go to a table (kernels/measured.py) that later calls of the same kernel, dtype, device, bucket of sizes, torch and
Triton use without measuring. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlaccel.bench.case import Case, families, implementation
from dlaccel.bench.compile import find_case, operator_calls
from dlaccel.bench.options import DTYPES, UsageError, add_lists, choose, named

if TYPE_CHECKING:
    from dlaccel.kernels.config import Choice, Config

Timer = Callable[[Callable[[], Any]], float]  # a call without arguments -> microseconds


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one kernel, dtype and sizes."""

    choice: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    config: dict[str, Any]
    us: float
    static_us: float
    tried: int
    failed: tuple[str, ...]  # candidates that raised or gave other values, and why

    def __str__(self) -> str:
        from dlaccel.kernels.config import written

        gain = f"{self.static_us / self.us:.2f}x the static choice" if self.us != self.static_us else "the static choice"
        sizes = "x".join(map(str, self.sizes))
        return f"{self.choice} {sizes} {self.dtype}: {written(self.config)}  {self.us:.1f} us, {gain}, of {self.tried} tried"


def tune(
    op: str | Callable[..., Any],
    shapes: Iterable[str | Case | Sequence[Any]] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    timer: Timer | None = None,
    path: Path | str | None = None,
    resume: bool = False,
    one_launch: bool = False,
) -> list[Tuned]:
    """Measure the candidate configurations of an op's kernels on the current GPU, and use the fastest from now on.

    Args:
        op: a function of `dlaccel.functional`, or its name.
        shapes: what to tune for. Each is a case of bench/cases/<op>.py or its name, or the positional arguments of one call,
            with tensors on the GPU. Default: the cases timed on GPUs. Sizes share a bucket with the next power of two.
        dtype: of the cases' inputs.
        timer: microseconds of a call; default: CUDA events around the call with a cold L2 cache, median.
        path: the table to write; default: this device's in DLACCEL_CACHE_DIR.
        resume: leave out what the table holds already.
        one_launch: try only the candidates that run both passes of batch_norm in one launch, against what is chosen now.
            Otherwise they are left out: their programs wait for each other, and have not yet run on a GPU.

    Returns:
        One Tuned for each kernel, dtype and sizes, also where the static choice won.

    Raises:
        RuntimeError: there is no GPU and no timer was given.

    >>> dlaccel.tune("linear_relu", [(x, weight, bias)])
    """
    from dlaccel.kernels import config, measured

    name = op if isinstance(op, str) else op.__name__
    if name not in families():
        raise ValueError(f"op: expected one of {', '.join(sorted(families()))}, got {name!r}")
    if timer is None:
        if not torch.cuda.is_available():
            raise RuntimeError("tune: no GPU to measure on (torch.cuda.is_available() is False)")
        timer = microseconds_on_gpu()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if shapes is None:
        shapes = [case for case in families()[name].CASES if "cuda" in case.devices]
    found: dict[Any, Tuned] = {}
    for shape in shapes:
        for function, args in operator_calls(_call(name, shape, dtype, device)):
            with config.consulting() as consulted:
                reference = _run(function, args)
            for choice, target, of, sizes in consulted:
                if choice.candidates is None or (choice.name, target, of, sizes) in found:
                    continue
                configs = choice.alternatives(target, of, *sizes)
                waiting = [candidate for candidate in configs if "TICKET" in candidate]
                if one_launch and not waiting:
                    continue
                configs = [c for c in configs if c not in waiting]
                if one_launch:
                    now = choice(torch.device(device), of, *sizes)
                    configs = [configs[0], *([] if now == configs[0] else [now]), *(c for c in waiting if c != now)]
                table = Path(path) if path is not None else measured.user_file(target.name)
                if resume and measured.holds(table, target.name, measured.key(choice.name, of, sizes)):
                    continue
                best = _fastest(choice, configs, lambda: _run(function, args), reference, timer)
                found[choice.name, target, of, sizes] = tuned = Tuned(choice.name, of, sizes, *best)
                entry = {"config": tuned.config, "us": tuned.us, "static_us": tuned.static_us, "time_utc": _now()}
                measured.save(table, target.name, {measured.key(choice.name, of, sizes): entry})
    config.forget_measured()
    return list(found.values())


def _call(op: str, shape: str | Case | Sequence[Any], dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """Forward and backward of one call of the public function."""
    if isinstance(shape, str):
        shape = find_case(op, shape)
    if isinstance(shape, Case):
        case, tensors = shape, shape.inputs(dtype, device)
        return lambda: _forward_backward(lambda: case.call(implementation(op), *tensors))
    args = tuple(a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in shape)
    return lambda: _forward_backward(lambda: implementation(op)(*args))


def _forward_backward(call: Callable[[], Tensor]) -> None:
    y = call()
    if y.requires_grad:
        y.backward(torch.ones_like(y))
        with torch.no_grad():  # which may use an operator of its own
            call()


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():  # as below autograd, where these functions are called
        outputs = function(*args)
    return [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(t, Tensor)]


def _fastest(
    choice: Choice, configs: Sequence[Config], call: Callable[[], list[Tensor]], reference: list[Tensor], timer: Timer
) -> tuple[Config, float, float, int, tuple[str, ...]]:
    """The fastest of `configs`, the first of which is the static choice, among those that give its values."""
    from dlaccel.kernels.config import written

    times, failed = [], []
    for config in configs:
        with choice.using(config):
            try:
                wrong = _differs(call(), reference)
                us = math.inf if wrong else timer(call)
            except Exception as error:  # shared memory, registers, a compiler's fault: not this one then
                wrong, us = f"{type(error).__name__}: {error}"[:200], math.inf
        times.append(us)
        if wrong:
            failed.append(f"{written(config)}: {wrong}")
    best = min(range(len(configs)), key=times.__getitem__)
    if times[best] == math.inf:
        raise RuntimeError(f"{choice.name}: no configuration ran: {failed}")
    return configs[best], times[best], times[0], len(configs), tuple(failed)


def _differs(outputs: list[Tensor], reference: list[Tensor]) -> str:
    """Why these are not the values of the static choice; other blocks may sum in another order."""
    for y, expected in zip(outputs, reference, strict=True):
        if y.is_meta or not y.is_floating_point():
            continue
        y, expected = y.double(), expected.double()
        tolerance = 8 * torch.finfo(outputs[0].dtype).eps
        bound = tolerance * expected.abs().nan_to_num(0.0, 0.0, 0.0).max() if expected.numel() else 0.0
        if not torch.allclose(y, expected, rtol=tolerance, atol=float(bound), equal_nan=True):
            return "other values than the static choice"
    return ""


def microseconds_on_gpu(rounds: int = 30) -> Timer:
    """The harness's stopwatch: the median of `rounds`, after as many microseconds of warm-up as it takes to compile."""
    from dlaccel.bench.timing import stopwatch

    watch = stopwatch("cuda")

    def microseconds(call: Callable[[], Any]) -> float:
        for _ in range(3):
            call()
        return statistics.median(watch.time(call) for _ in range(rounds)) * 1e6

    return microseconds


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_lists(parser, op="default: all", case="default: those timed on GPUs", dtype="of bf16, fp16, fp32 (default: bf16, fp32)")
    parser.add_argument("--resume", action="store_true", help="leave out what the table holds already")
    parser.add_argument("--one-launch", action="store_true", help="only batch_norm's candidates with both passes in one launch")
    parser.add_argument("--shipped", action="store_true", help="write kernels/tuned/<device>.json of this checkout")


def main(args: argparse.Namespace) -> int:
    from dlaccel.kernels import config, measured

    if not torch.cuda.is_available():
        raise UsageError("tune: no GPU to measure on (torch.cuda.is_available() is False)")
    device = config.target_of(torch.device("cuda", torch.cuda.current_device())).name
    path = measured.SHIPPED / measured.file_name(device) if args.shipped else measured.user_file(device)
    known = families()
    ops, dtypes = choose("op", args.op, known) or list(known), choose("dtype", args.dtype, DTYPES) or ["bf16", "fp32"]
    cases = [case for op in ops for case in known[op].CASES if args.case or "cuda" in case.devices]
    for case in named(args.case, cases) if args.case else cases:
        for dtype in dtypes:
            of = getattr(torch, DTYPES[dtype])
            for tuned in tune(case.op, [case], dtype=of, path=path, resume=args.resume, one_launch=args.one_launch):
                print(tuned, *tuned.failed, sep="\n    ", flush=True)
    print(f"wrote {os.fspath(path)}")
    return 0
