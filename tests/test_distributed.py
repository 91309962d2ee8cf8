"""DTensor: the sharding rules of the declarations, on two gloo processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

WORLD = 2


def linear_relu_inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(4, 6, 8, dtype=torch.float64),
        torch.randn(10, 8, dtype=torch.float64),
        torch.randn(10, dtype=torch.float64),
    ]


def placements() -> dict[str, tuple[Any, ...]]:
    """What a user shards: (x, weight, bias)."""
    from torch.distributed.tensor import Replicate, Shard

    return {
        "replicated": (Replicate(), Replicate(), Replicate()),
        "data parallel": (Shard(0), Replicate(), Replicate()),
        "sequence parallel": (Shard(1), Replicate(), Replicate()),
        "column parallel": (Replicate(), Shard(0), Shard(0)),
        "row parallel": (Shard(2), Shard(1), Replicate()),
    }


def check_linear_relu(rank: int, store: str) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    import dlaccel.functional as F

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        mesh = dist.init_device_mesh("cpu", (WORLD,))
        whole = [t.requires_grad_() for t in linear_relu_inputs()]
        want = F.linear_relu(*whole)
        want.square().sum().backward()
        for name, placement in placements().items():
            parts = [distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip(whole, placement, strict=True)]
            y = F.linear_relu(*parts)
            y.square().sum().backward()
            torch.testing.assert_close(y.full_tensor(), want, msg=lambda m, name=name: f"{name}: {m}")
            for part, t in zip(parts, whole, strict=True):
                torch.testing.assert_close(part.grad.full_tensor(), t.grad, msg=lambda m, name=name: f"{name} gradient: {m}")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_sharded_linear_relu_equals_the_whole() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(check_linear_relu, (str(Path(folder) / "store"),), nprocs=WORLD)


def check_separable_inference(rank: int, store: str) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import dlaccel
    import dlaccel.functional as F

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        mesh, generator = dist.init_device_mesh("cpu", (WORLD,)), torch.Generator().manual_seed(0)
        whole = [torch.randn(s, generator=generator) for s in ((4, 3, 6, 5), (6, 1, 3, 3), (4, 6, 1, 1), (4,))]
        with torch.no_grad(), dlaccel.use_backend("torch"):
            for tensors in (whole, whole[:3]):
                want = F.separable_conv2d(*tensors, padding=1)
                for x, filters in ((Shard(0), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate())):
                    placements = (x, Replicate(), filters, filters)
                    parts = [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=False)]
                    torch.testing.assert_close(F.separable_conv2d(*parts, padding=1).full_tensor(), want)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_sharded_separable_inference_equals_the_whole() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(check_separable_inference, (str(Path(folder) / "store"),), nprocs=WORLD)
