"""DTensor: the sharding rules of the declarations, on two gloo processes."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

import dlaccel
import dlaccel.functional as F

WORLD = 2
Check = Callable[[Any], None]  # of a device mesh


def linear_relu(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    shapes = (4, 6, 8), (10, 8), (10,)
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    want = F.linear_relu(*whole)
    want.square().sum().backward()
    for name, placements in {
        "replicated": (Replicate(), Replicate(), Replicate()),
        "data parallel": (Shard(0), Replicate(), Replicate()),
        "sequence parallel": (Shard(1), Replicate(), Replicate()),
        "column parallel": (Replicate(), Shard(0), Shard(0)),
        "row parallel": (Shard(2), Shard(1), Replicate()),
    }.items():
        for frozen in ({0, 1}, set(), {0}):  # the layouts that DTensor caches depend on the gradients wanted
            parts = [
                distribute_tensor(t.detach(), mesh, [p]).requires_grad_(i not in frozen)
                for i, (t, p) in enumerate(zip(whole, placements, strict=True))
            ]
            y = F.linear_relu(*parts)
            y.square().sum().backward()
            torch.testing.assert_close(y.full_tensor(), want, msg=lambda m, name=name: f"{name}: {m}")
            for i, (part, t) in enumerate(zip(parts, whole, strict=True)):
                if i not in frozen:
                    message = f"{name}, all but {frozen}: gradient {i}"
                    torch.testing.assert_close(part.grad.full_tensor(), t.grad, msg=lambda m, of=message: f"{of}: {m}")


NAMES = "input", "weight", "bias", "residual", "running_mean", "running_var"


def batch_norm(mesh: Any) -> None:
    """Values, gradients, running statistics, and where the result lies, under each placement of x and of the vectors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    whole = {n: torch.randn((4, 6, 3, 5) if n in ("input", "residual") else 6, dtype=torch.float64) for n in NAMES}
    whole["running_var"].abs_()
    g = torch.randn_like(whole["input"])

    def run(training: bool, activation: str | None, given: dict[str, Tensor], g: Tensor) -> dict[str, Tensor]:
        leaves = {n: t.clone() for n, t in given.items()}
        wanted = [leaves[n].requires_grad_() for n in NAMES[:4] if n in leaves]
        y = F.batch_norm(training=training, activation=activation, **leaves)
        gradients = torch.autograd.grad(y, wanted, g)
        return {
            "y": y,
            **{f"gradient {i}": t for i, t in enumerate(gradients)},
            **{n: leaves[n] for n in NAMES[4:] if n in leaves},
        }

    for of_x, of_vectors in (
        (Replicate(), Replicate()),
        (Shard(1), Shard(0)),
        (Shard(0), Replicate()),
        (Shard(3), Replicate()),
    ):
        for training in (False, True):
            for activation, left_out in ((None, ()), ("relu", ("residual",)), ("relu6", ("bias",))):
                given = {n: t for n, t in whole.items() if n not in left_out}
                placed = {n: [of_x if t.dim() > 1 else of_vectors] for n, t in given.items()}
                parts = {n: distribute_tensor(t, mesh, placed[n]) for n, t in given.items()}
                want = run(training, activation, given, g)
                got = run(training, activation, parts, distribute_tensor(g, mesh, [of_x]))
                what = f"x {of_x}, vectors {of_vectors}, training {training}, {activation}"
                for name, t in got.items():
                    assert isinstance(t, DTensor)
                    torch.testing.assert_close(t.full_tensor(), want[name], msg=lambda m, of=f"{what}: {name}": f"{of}: {m}")
                joined = training and isinstance(of_x, Shard) and of_x.dim != 1  # statistics are those of the whole batch
                assert got["y"].placements == ((Replicate() if joined else of_x),), what

    x = distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)])
    mean, var = (distribute_tensor(torch.ones(6), mesh, [p]) for p in (Replicate(), Shard(0)))
    with pytest.raises(RuntimeError, match="expected both replicated or both sharded by channel"):
        F.batch_norm(x, mean, var, training=True)


def cross_entropy(mesh: Any) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    x, weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64)
    targets = torch.tensor([0, 3, -100, 1, 2]), torch.rand(5, 4, dtype=torch.float64)
    options: list[tuple[dict[str, Any], Any]] = [
        ({"reduction": "none"}, Shard(0)),
        ({"reduction": "sum"}, Partial()),
        ({"num_items": 4, "label_smoothing": 0.1}, Partial()),
        ({"reduction": "mean"}, Replicate()),
    ]
    for given, of_loss in options:
        for target, w in itertools.product(targets, (None, weight)):
            want = F.cross_entropy(x, target, w, **given)
            (expected,) = torch.autograd.grad(want.square().sum(), x)
            parts = [distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in (x, target)]
            parts[0].requires_grad_()
            loss = F.cross_entropy(*parts, None if w is None else distribute_tensor(w, mesh, [Replicate()]), **given)
            (got,) = torch.autograd.grad(loss.square().sum(), parts[0])
            assert loss.placements == (of_loss,), given
            torch.testing.assert_close(loss.full_tensor(), want, msg=lambda m, of=given: f"{of}: {m}")
            torch.testing.assert_close(got.full_tensor(), expected, msg=lambda m, of=given: f"{of} gradient: {m}")


def separable_inference(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(s, generator=generator) for s in ((4, 3, 6, 5), (6, 1, 3, 3), (4, 6, 1, 1), (4,))]
    with torch.no_grad(), dlaccel.use_backend("torch"):
        for tensors in (whole, whole[:3]):
            want = F.separable_conv2d(*tensors, padding=1)
            for x, filters in ((Shard(0), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate())):
                placements = (x, Replicate(), filters, filters)
                parts = [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=False)]
                torch.testing.assert_close(F.separable_conv2d(*parts, padding=1).full_tensor(), want)


def on_a_mesh(rank: int, store: str, check: Check) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        check(dist.init_device_mesh("cpu", (WORLD,)))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("check", [linear_relu, batch_norm, cross_entropy, separable_inference], ids=lambda f: f.__name__)
def test_shards_equal_the_whole(check: Check) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_a_mesh, (str(Path(folder) / "store"), check), nprocs=WORLD)
