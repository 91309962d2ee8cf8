"""batch_norm with both passes in one launch (TICKET in the configuration): to the bit what two launches give.

Programs are interpreted one after another, so none ever waits. A second pass that does not acquire what it reads, and a slice
that counts before its sums are stored, are races to the checked interpreter. Compiled, the kernels add up in an order that is
the compiler's to choose, so they agree but for rounding; how fast they are only a GPU shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

import dlaccel
import dlaccel.functional as F
from dlaccel.kernels import batch_norm as kernels
from dlaccel.kernels import config
from dlaccel.kernels.batch_norm import backward_config, draw, explain, forward_config, tiled
from dlaccel.kernels.config import cdiv
from dlaccel.kernels.launch import COUNTS
from tests.gpu_tools import busy_stream
from tests.kit import COTANGENTS, DEVICE, INTERPRET, LAYOUTS, constants, poisoned, with_gradients
from tests.test_batch_norm import ALL, SHAPES, Call, tensors


@contextlib.contextmanager
def in_one_launch(x: Tensor) -> Iterator[None]:
    """With the slices that two launches have for x."""
    with contextlib.ExitStack() as stack:
        for choice in (forward_config, backward_config):
            tiling = tiled(choice, x.device, x.dtype, x.shape, x.stride())
            chosen = choice(x.device, x.dtype, tiling.view.R, tiling.view.C, tiling.view.S)
            stack.enter_context(choice.using(chosen | {"TICKET": tiling.tiles[1]}))
        yield


def check_one_launch(
    given: list[Tensor],
    g: Tensor | None = None,
    names: str = ALL,
    launched: str = "forward_kernel backward_kernel",
    **options: Any,
) -> None:
    """What two launches give: result, gradients, running statistics and counter."""
    counter = torch.tensor(2, device=DEVICE)
    call = Call(given[0].shape[1], given[0].dtype, names, **options)
    results = []
    for context in (contextlib.nullcontext(), in_one_launch(given[0].detach())):
        call.options["num_batches_tracked"] = counter.clone()
        COUNTS.clear()
        with dlaccel.use_backend("triton"), poisoned(), context:
            outputs = with_gradients(partial(call, F.batch_norm), given, g)
        results.append([*outputs, *call.after, call.options["num_batches_tracked"]])
    assert COUNTS.keys() == set(launched.split())
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None
        exactly = {"rtol": 0, "atol": 0} if INTERPRET else {}
        torch.testing.assert_close(one, other, **exactly, equal_nan=True)


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, torch.float32) for shape in (*SHAPES, (290, 5))), ((5, 3, 31), torch.float16), ((33, 17), torch.bfloat16)],
    ids=str,
)
def test_one_launch_gives_what_two_give(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_one_launch(tensors(shape, dtype, ALL))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize("names", ["input", "input weight", "input weight bias", ALL])
def test_options_of_one_launch(names: str, activation: str | None, momentum: float | None) -> None:
    check_one_launch(tensors((40, 35), names=names), names=names, activation=activation, momentum=momentum)


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last slice", "column slice"])
def test_layouts_of_one_launch(layout: str, cotangent: str) -> None:
    given = tensors((3, 6, 5, 3), names=ALL)
    given[0] = LAYOUTS[layout](given[0])
    check_one_launch(given, COTANGENTS[cotangent](given[0].detach()))


@pytest.mark.parametrize(
    "wanted, launched",
    [
        ("input", "forward_kernel backward_kernel"),
        ("input residual", "forward_kernel backward_kernel"),
        ("weight bias", "forward_kernel reduce_kernel gradient_kernel"),  # nothing of x's size is read twice
    ],
)
def test_subsets_of_gradients_in_one_launch(wanted: str, launched: str) -> None:
    given = tensors((5, 3, 31), names=ALL)
    for name, t in zip(ALL.split(), given, strict=True):
        t.requires_grad_(name in wanted.split())
    check_one_launch(given, launched=launched)


@pytest.mark.skipif(not INTERPRET, reason="changes constants of the launchers")
@pytest.mark.parametrize("lag", [1, 3, 9])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_groups_of_one_launch(group: int, lag: int) -> None:
    given = tensors((5, 7, 31), names=ALL)
    l2 = 2 * (lag + 1) * group * (2 * 5 * 31 * 4)  # for so many channels of x and dy
    x = given[0].detach()
    with constants(config, INTERPRETER=dataclasses.replace(config.INTERPRETER, l2=l2)), constants(kernels, LAG=lag):
        with in_one_launch(x):
            assert tiled(backward_config, x.device, x.dtype, x.shape, x.stride(), twice=2).group == group
        check_one_launch(given)


@triton.jit
def drawing_kernel(tickets, drawn, BLOCKS, PARTS, GROUP, LAG: tl.constexpr):
    from_draw = draw(tickets, BLOCKS, PARTS, GROUP, LAG)
    at = drawn + 3 * tl.program_id(0)
    tl.store(at, from_draw[0].to(tl.int32))
    tl.store(at + 1, from_draw[1])
    tl.store(at + 2, from_draw[2])


@pytest.mark.skipif(not INTERPRET, reason="programs that run one after another draw in their order")
@pytest.mark.parametrize("blocks, parts, group", [(1, 1, 1), (7, 1, 1), (7, 3, 2), (6, 2, 3), (5, 4, 5)])
@pytest.mark.parametrize("lag", [1, 2, 3, 9])
def test_what_a_program_waits_for_was_drawn_before(blocks: int, parts: int, group: int, lag: int) -> None:
    groups = cdiv(blocks, group)
    drawn = torch.full((2 * groups * group * parts, 3), -1, dtype=torch.int32)
    drawing_kernel[(len(drawn),)](torch.zeros(1, dtype=torch.int32), drawn, blocks, parts, group, LAG=lag)
    order = [(bool(second), block, part) for second, block, part in drawn.tolist() if block < blocks]
    slices = [(block, part) for block in range(blocks) for part in range(parts)]
    assert sorted(order) == sorted((second, *one) for second in (False, True) for one in slices)
    for second, block, _ in order:
        if second:  # all first passes of the block are done, and those over the next groups, but no more
            first = max(order.index((False, block, part)) for part in range(parts))
            now = order.index((True, block, 0))
            assert first < now
            begun = {b // group for s, b, _ in order[:now] if not s}
            assert max(begun) == min(block // group + lag - 1, groups - 1)


def test_only_what_fits_the_cache_is_offered_one_launch() -> None:
    def offered(choice: config.Choice, target: str, *sizes: int) -> bool:
        found = choice.alternatives(config.TARGETS[target], torch.bfloat16, *sizes)
        assert "TICKET" not in found[0]
        return any("TICKET" in one for one in found)

    image = (256, 64, 112 * 112)  # 6.4 MB a channel
    assert offered(forward_config, "sm_90", *image) and not offered(backward_config, "sm_90", *image)
    assert not offered(forward_config, "sm_80", 2 * 256, *image[1:])
    assert offered(backward_config, "sm_90", 256, 256, 56 * 56)
    assert not offered(forward_config, "sm_90", 256 * 56 * 56, 256, 1)  # channels_last: 64 channels of 1.6 MB
    assert not offered(forward_config, "gfx942", 256, 256, 56 * 56)  # whose barrier does not order stores


def test_explain_names_the_one_launch() -> None:
    x = torch.randn(8, 5, device=DEVICE)
    args = (x, None, None, None, None, None, None, 0.1, 1e-5, None)
    with in_one_launch(x):
        kernels.batch_norm(*args)
        assert explain("batch_norm", *args).startswith("forward_kernel, BLOCK_R=")


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("sm_90", torch.bfloat16),
        *(
            pytest.param(target, dtype, marks=pytest.mark.slow)
            for target in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ],
    ids=str,
)
def test_one_launch_compiles_without_spills(target: str, dtype: torch.dtype) -> None:
    from dlaccel.bench.compile import compile_launches, launches

    found = []
    for name in ("256x256x56x56 add+relu", "256x512x7x7 relu", "8x256x28x28 relu channels_last"):
        with config.consulting() as consulted:
            launches("batch_norm", name, dtype, target)
        sizes = consulted[0][3]
        *_, candidate = backward_config.alternatives(config.TARGETS[target], dtype, *sizes)
        with forward_config.using(candidate), backward_config.using(candidate):
            both = launches("batch_norm", name, dtype, target)
        assert [x.name for x in both] == ["forward_kernel", "backward_kernel"]
        found += both
    for launch, report in zip(found, compile_launches([(launch, target) for launch in found]), strict=True):
        assert report.status == "ok" and report.stack_bytes == 0, (launch.options, report)
        assert launch.options["VEC"] < 8 or (report.vector_loads and report.vector_stores), (launch.options, report)


@pytest.mark.gpu
def test_one_launch_under_load() -> None:
    """Waiting programs, and reads of what another multiprocessor wrote."""
    given = tensors((32, 256, 28, 28), names=ALL)
    with busy_stream():
        for _ in range(50):
            check_one_launch(given)
