"""SyncBatchNorm over two processes equals batch norm on the joined batch."""

from __future__ import annotations

import copy
import importlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dlaccel import nn
from tests.kit import DEVICE

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
LAYER: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "cumulative, relu6": {"activation": "relu6", "momentum": None},
    "no parameters, no statistics": {"affine": False, "track_running_stats": False},
}
CASES = [
    (layer, split, residual, dtype)
    for layer in LAYER
    for split in ((5, 2), (7, 0), (0, 7))
    for residual in (False, True)
    for dtype in (torch.float64, torch.float32)
    if dtype == torch.float64 or (layer == "relu" and split == (5, 2))
]


def run_layer(m: torch.nn.Module, x: Tensor, residual: Tensor | None, g: Tensor) -> dict[str, Tensor]:
    """Two steps: result, gradients and buffers."""
    results: dict[str, Tensor] = {}
    for step in range(2):
        leaves = [(t * (step + 1)).detach().requires_grad_() for t in (x, residual) if t is not None]
        m.zero_grad()
        y = m(*leaves)
        y.backward(g)
        results |= {f"y {step}": y.detach()}
        results |= {f"gradient of input {i} {step}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
        results |= {f"gradient of {n} {step}": p.grad for n, p in m.named_parameters() if p.grad is not None}
    return results | {n: b.clone() for n, b in m.named_buffers()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for i, (layer, split, with_residual, dtype) in enumerate(CASES):
        torch.manual_seed(i)
        x, z, g = (torch.randn(7, 3, 4, 5, dtype=dtype) * 2 + 1 for _ in range(3))
        here = slice(0, split[0]) if rank == 0 else slice(split[0], 7)
        theirs = torch.nn.BatchNorm2d(3, **{k: v for k, v in LAYER[layer].items() if k != "activation"}).to(dtype)
        for p in theirs.parameters():
            torch.nn.init.normal_(p)
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(theirs))
        ours.activation = LAYER[layer].get("activation")
        found[i] = run_layer(ours, x[here], z[here] if with_residual else None, g[here])
        if rank == 0:
            activation = {None: torch.nn.Identity(), "relu": torch.nn.ReLU(), "relu6": torch.nn.ReLU6()}[ours.activation]

            class Joined(torch.nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.norm = theirs

                def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
                    y = self.norm(x)
                    return activation(y if residual is None else y + residual)  # type: ignore[no-any-return]

            found[-1 - i] = {
                k.replace("norm.", ""): v for k, v in run_layer(Joined(), x, z if with_residual else None, g).items()
            }
    torch.save(found, Path(folder) / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=2)
        yield [torch.load(Path(folder) / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{a} {b} {'residual ' * c}{d}" for a, b, c, d in CASES])
def test_equals_batch_norm_on_the_joined_batch(results: Any, i: int) -> None:
    first, second, joined = results[0][i], results[1][i], results[0][-1 - i]
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if CASES[i][3] == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    assert first.keys() == joined.keys()
    for name, want in joined.items():
        if name.startswith(("y", "gradient of input")):
            got = torch.cat([first[name], second[name]])
        elif name.startswith("gradient"):
            got = first[name] + second[name]
        else:
            got = first[name]
            assert torch.equal(got, second[name]), f"{name} differs between the processes"
        torch.testing.assert_close(got, want, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_without_a_process_group_it_is_batch_norm() -> None:
    theirs = torch.nn.BatchNorm2d(3)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 5, 5)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_conversion_keeps_the_objects() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.Sequential(nn.BatchNormReLU2d(3, eps=1e-3)), torch.nn.BatchNorm2d(3).eval()
    )
    before, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    converted: Any = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert all(p is before[n] for n, p in converted.named_parameters()) and len(before) == 6
    assert all(b is buffers[n] for n, b in converted.named_buffers()) and len(buffers) == 6
    fused, plain = converted[1][0], converted[2]
    assert type(fused) is type(plain) is nn.SyncBatchNorm
    assert fused.activation == "relu" and fused.eps == 1e-3 and fused.training
    assert plain.activation is None and not plain.training
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(2))) is nn.SyncBatchNorm


def test_statistics_of_both_backends(backend: str) -> None:
    floor = importlib.import_module(f"dlaccel.{'kernels' if backend == 'triton' else 'fallback'}.batch_norm")
    for shape in ((5, 3, 4, 5), (40, 20), (0, 3, 2, 2)):
        x = torch.randn(shape, device=DEVICE) + 2
        mean, deviations = floor.statistics(x)
        assert mean.dtype == deviations.dtype == torch.float64
        over = [d for d in range(x.dim()) if d != 1]
        if x.numel():
            torch.testing.assert_close(mean, x.double().mean(over), rtol=1e-6, atol=1e-6)
            want = x.double().var(over, correction=0) * (x.numel() // shape[1])
            torch.testing.assert_close(deviations, want, rtol=1e-5, atol=0)
        else:
            assert not mean.any() and not deviations.any()


@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_with_given_sums_of_both_backends(backend: str, layout: str, activation: str | None) -> None:
    floor = importlib.import_module(f"dlaccel.{'kernels' if backend == 'triton' else 'fallback'}.batch_norm")
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (torch.randn(5, 3, 4, 7, device=DEVICE).contiguous(memory_format=format) for _ in range(2))
    weight, bias, mean, of_mean, of_x_hat = torch.randn(5, 3, device=DEVICE)
    var, eps = torch.rand(3, device=DEVICE) + 0.5, 1e-5

    def of_channel(v: Tensor) -> Tensor:
        return v.view(1, 3, 1, 1)

    rstd = of_channel((var + eps).rsqrt())
    x_hat = (x - of_channel(mean)) * rstd
    z = x_hat * of_channel(weight) + of_channel(bias)
    g = dy if activation is None else torch.where((z > 0) & (z < 6), dy, 0)
    want = of_channel(weight) * rstd * (g - of_channel(of_mean) - x_hat * of_channel(of_x_hat))
    y = None if activation is None else z.clamp(0, 6)
    recomputed = bias if activation is not None else None
    dx = floor.projected(dy, x, weight, recomputed, mean, var, y, of_mean, of_x_hat, eps, activation)
    assert dx.stride() == x.stride()
    torch.testing.assert_close(dx, want, rtol=1e-5, atol=1e-5)
    assert not floor.projected(dy[:0], x[:0], weight, recomputed, mean, var, y, of_mean, of_x_hat, eps, activation).numel()
