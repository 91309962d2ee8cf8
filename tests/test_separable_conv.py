"""separable_conv2d, depthwise_separable_block and their modules: what the contract tests do not cover."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import dlaccel
import dlaccel.functional as F
from dlaccel.bench.cases import depthwise_conv2d
from dlaccel.bench.cases.separable_conv2d import eager, pointwise, reference
from dlaccel.nn import DepthwiseConv2d, DepthwiseSeparableBlock, SeparableConv2d, SyncBatchNorm
from dlaccel.ops._register import LAUNCHES
from tests.kit import DEVICE, LAYOUTS, check, poisoned, sparse
from tests.strategies import given, st
from tests.strategies import tensors as drawn_tensors

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ACTIVATIONS: dict[Any, Any] = {None: lambda t: t, "relu": torch.relu, "relu6": torch.nn.functional.relu6}


def torchs_block(channels: int, out: int, kernel: int = 3, stride: int = 1, dilation: int = 1, act: Any = torch.relu) -> Any:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = torch.nn.Conv2d(
                channels, channels, kernel, stride, dilation * (kernel // 2), dilation, channels, bias=False
            )
            self.bn1 = torch.nn.BatchNorm2d(channels)
            self.pointwise = torch.nn.Conv2d(channels, out, 1, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(out)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = act(self.bn2(self.pointwise(act(self.bn1(self.depthwise(x))))))
            return result

    return Block().to(DEVICE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "column slice"])
@pytest.mark.parametrize("options", [(1, 1, 1), (2, 0, 1), (1, 2, 2)], ids=str)
def test_separable_conv2d(backend: str, options: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 5, 7, 6, device=DEVICE))
    weights = [torch.randn(s, device=DEVICE) / 3 for s in ((10, 1, 3, 3), (7, 10, 1, 1), (7,))]
    check(
        lambda *t: F.separable_conv2d(*t, *options), lambda *t: eager(*t, *options),
        [t.requires_grad_() for t in (x, *weights)], reference=lambda *t: reference(*t, *options),
        terms=[32.0, 600.0, 600.0, 3000.0, 300.0],
    )  # fmt: skip


def test_separable_module_is_torchs_two(backend: str) -> None:
    ours = SeparableConv2d(4, 6, 3, stride=2, padding=1, depth_multiplier=2, device=DEVICE)
    theirs = torch.nn.Sequential()
    theirs.depthwise = torch.nn.Conv2d(4, 8, 3, 2, 1, groups=4, bias=False, device=DEVICE)
    theirs.pointwise = torch.nn.Conv2d(8, 6, 1, device=DEVICE)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for shape in ((2, 4, 7, 6), (4, 7, 6)):
        x = torch.randn(shape, device=DEVICE)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_block_trains_as_torchs(layout: str, activation: str) -> None:
    """Three steps of SGD, then evaluation: losses, parameters, statistics and counters."""
    torch.manual_seed(0)
    act = torch.relu if activation == "relu" else torch.nn.functional.relu6
    theirs = torchs_block(6, 9, 5, 2, act=act)
    ours = DepthwiseSeparableBlock(6, 9, 5, 2, activation=activation, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = LAYOUTS[layout](torch.randn(4, 6, 11, 9, device=DEVICE) * 3)
    losses: list[list[float]] = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0])
    for (name, p), q in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, msg=name)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("affine", [True, False])
def test_folded_evaluation(affine: bool) -> None:
    """Without a gradient the batch norms are folded into the convolutions; with one they are not. Same numbers."""
    torch.manual_seed(0)
    block = DepthwiseSeparableBlock(5, 7, dilation=2).to(DEVICE)
    for bn in (block.bn1, block.bn2):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        if affine:
            torch.nn.init.normal_(bn.weight)
            torch.nn.init.normal_(bn.bias)
        else:
            bn.weight = bn.bias = None
    block.eval()
    x = torch.randn(2, 5, 8, 7, device=DEVICE)
    with mock.patch.object(F, "depthwise_separable_block", wraps=F.depthwise_separable_block) as folded:
        with torch.no_grad():
            inferred = block(x)
        assert folded.call_count == 1
        torch.testing.assert_close(inferred, block(x))
        assert folded.call_count == 1


class LowRank(torch.nn.Module):
    """A layer with an adapter around it, which shows the layer's weight."""

    def __init__(self, layer: torch.nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Conv2d(layer.in_channels, 1, 1, bias=False, device=DEVICE)
        self.up = torch.nn.Conv2d(1, layer.out_channels, 1, bias=False, device=DEVICE)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(x))
        return y


def change_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) + 1


def hooked_everywhere(module: Any) -> Any:
    return torch.nn.modules.module.register_module_forward_hook(lambda m, args, y: y + 1 if type(m) is torch.nn.Conv2d else y)


CHANGES: dict[str, Any] = {
    "weight_norm": lambda m: torch.nn.utils.weight_norm(m.pointwise),
    "spectral_norm": lambda m: torch.nn.utils.spectral_norm(m.depthwise),
    "prune": lambda m: prune.l1_unstructured(m.depthwise, "weight", 0.5),
    "parametrizations": lambda m: torch.nn.utils.parametrizations.weight_norm(m.pointwise),
    "hook": lambda m: m.pointwise.register_forward_hook(lambda module, args, y: y + 1) and None,
    "pre-hook": lambda m: m.depthwise.register_forward_pre_hook(lambda module, args: (args[0] + 1,)) and None,
    "global hook": hooked_everywhere,
    "adapter": lambda m: setattr(m, "pointwise", LowRank(m.pointwise)),
    "forward": lambda m: change_forward(m.pointwise),
    "bias": lambda m: setattr(m.depthwise, "bias", torch.nn.Parameter(torch.ones(4, device=DEVICE))),
    "stride": lambda m: setattr(m, "pointwise", torch.nn.Conv2d(4, 6, 1, 2, bias=False, device=DEVICE)),
    "padding_mode": lambda m: setattr(m, "depthwise", DepthwiseConv2d(4, 4, 3, padding=1, bias=False, padding_mode="reflect")),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", [SeparableConv2d, DepthwiseSeparableBlock])
def test_changed_submodules_are_called(cls: Any, change: str) -> None:
    """Without gradients too, and after their parameters have moved: torch's utilities make the weight when called."""
    module = cls(4, 6, 3, padding=1).to(DEVICE)
    with mock.patch.dict(torch.nn.modules.module._global_forward_hooks):
        CHANGES[change](module)
        module.to(DEVICE).eval()
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(2).add_(0.1)
            x = torch.randn(2, 4, 6, 6, device=DEVICE)
            inferred = module(x)
        torch.testing.assert_close(inferred, module(x))


@pytest.mark.parametrize("name", ["pointwise.bias", "bn1.eps", "bn1.activation"])
def test_blocks_that_do_not_fold_are_not_folded(name: str) -> None:
    block = DepthwiseSeparableBlock(4, 6).to(DEVICE).eval()
    x = torch.randn(2, 4, 6, 6, device=DEVICE) * 5
    if name == "pointwise.bias":
        block.pointwise.bias = torch.nn.Parameter(torch.ones(6, device=DEVICE))
    elif name == "bn1.eps":
        block.bn1.eps = 1.0
    else:
        block.bn1.activation = "relu6"
        block.bn2.weight.data.fill_(90)
    with torch.no_grad():
        inferred = block(x)
    torch.testing.assert_close(inferred, block(x))


def test_converted_blocks() -> None:
    """By ours the block is the same; torch's conversion loses the activation, and the block says so."""
    block = DepthwiseSeparableBlock(4, 6).eval()
    ours: Any = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    theirs = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    x = torch.randn(2, 4, 6, 6)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(x), block(x))
            with pytest.raises(TypeError, match=r"torch.nn.SyncBatchNorm has no activation.* convert with dlaccel"):
                theirs(x)


@pytest.mark.parametrize("options", [{"kernel_size": (3, 5)}, {"kernel_size": (5, 3), "dilation": (1, 2), "stride": (2, 1)}])
def test_block_takes_pairs(options: dict[str, Any]) -> None:
    ours = DepthwiseSeparableBlock(4, 6, **options).to(DEVICE)
    theirs = torchs_block(4, 6)
    dilation = options.get("dilation", (1, 1))
    padding = tuple(d * (k // 2) for d, k in zip(dilation, options["kernel_size"], strict=True))
    theirs.depthwise = torch.nn.Conv2d(4, 4, padding=padding, groups=4, bias=False, device=DEVICE, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 9, device=DEVICE)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_separable_module_pads_as_the_depthwise_one(mode: str) -> None:
    ours = SeparableConv2d(4, 6, 3, padding=1, padding_mode=mode, device=DEVICE)
    theirs = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, padding_mode=mode, device=DEVICE)
    theirs.load_state_dict(ours.depthwise.state_dict())
    x = torch.randn(2, 4, 6, 6, device=DEVICE)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(x), ours.pointwise(theirs(x)))


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    """bn1 in evaluation inside a block that trains: its own flag decides."""
    theirs, ours = torchs_block(4, 5), DepthwiseSeparableBlock(4, 5).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 6, 6, device=DEVICE)
    for model in (theirs, ours):
        model.bn1.eval()
        with torch.no_grad():
            model(x)
    for (name, p), q in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, msg=name)


def test_functional_block_updates_statistics_and_counters() -> None:
    block = DepthwiseSeparableBlock(4, 6, stride=2).to(DEVICE)
    state = {k: v.clone() for k, v in block.state_dict().items()}
    x = torch.randn(3, 4, 7, 7, device=DEVICE)
    y = block(x)
    bn = [[state[f"bn{i}.{n}"] for n in ("weight", "bias", "running_mean", "running_var")] for i in (1, 2)]
    counters = {f"bn{i}_num_batches_tracked": state[f"bn{i}.num_batches_tracked"] for i in (1, 2)}
    got = F.depthwise_separable_block(
        x, state["depthwise.weight"], *bn[0], state["pointwise.weight"], *bn[1], 2, training=True, **counters
    )
    torch.testing.assert_close(got, y)
    for name, p in block.state_dict().items():
        torch.testing.assert_close(state[name], p, msg=name)


def test_deepcopy_shares_nothing() -> None:
    block, x = DepthwiseSeparableBlock(4, 5), torch.randn(2, 4, 6, 6)
    other = copy.deepcopy(block)
    other(x)
    assert int(block.bn1.num_batches_tracked) == 0 and int(other.bn1.num_batches_tracked) == 1


def test_explain_names_every_operator() -> None:
    x, dw, pw = torch.ones(2, 4, 6, 6), torch.ones(4, 1, 3, 3), torch.ones(5, 4, 1, 1)
    bn = [[torch.ones(c) for _ in range(4)] for c in (4, 5)]
    with dlaccel.use_backend("torch"):
        found = dlaccel.explain(F.depthwise_separable_block, x, dw, *bn[0], pw, *bn[1], training=True)
    assert found.backend == "torch" and found.kernel.startswith("depthwise_conv2d: aten")
    assert found.kernel.count("; batch_norm") == 2


# ---- the operator of inference --------------------------------------------------------------------------------------


def operator(
    x: Tensor, dw: Tensor, b1: Tensor | None, pw: Tensor, b2: Tensor | None, stride: Any = (1, 1), padding: Any = (1, 1),
    dilation: Any = (1, 1), activation: str | None = None,
) -> Tensor:  # fmt: skip
    pads = [padding[0], padding[0], padding[1], padding[1]]
    y: Tensor = torch.ops.dlaccel.separable_conv2d(x, dw, b1, pw, b2, stride, pads, dilation, activation)
    return y


def by_two(convolutions: Any, *args: Any) -> Tensor:
    x, dw, b1, pw, b2, stride, padding, dilation, activation = (*args, *((1, 1), (1, 1), (1, 1), None)[len(args) - 5 :])
    act, (depthwise, mix) = ACTIVATIONS[activation], convolutions
    y: Tensor = act(mix(act(depthwise(x, dw, b1, stride, padding, dilation)), pw, b2))
    return y


PLAIN = depthwise_conv2d.eager, torch.nn.functional.conv2d
EXACT = depthwise_conv2d.reference, pointwise


def arguments(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], filters: int, multiplier: int = 1, layout: str = "contiguous",
    dtype: torch.dtype = torch.float32, biases: bool = True,
) -> list[Any]:  # fmt: skip
    mid = shape[1] * multiplier
    made = [torch.randn(shape), torch.randn(mid, 1, *kernel) / 3, torch.randn(mid), torch.randn(filters, mid, 1, 1) / mid**0.5]
    made = [t.to(DEVICE, dtype) for t in (*made, torch.randn(filters))]
    x = made[0].contiguous(memory_format=FORMATS[layout])
    return [x, made[1], made[2] if biases else None, made[3], made[4] if biases else None]


def compare(tensors: list[Any], *options: Any) -> None:
    present = [t for t in tensors if t is not None]

    def with_none(f: Any) -> Any:
        def call(*given_tensors: Tensor) -> Any:
            left = iter(given_tensors)
            return f(*[None if t is None else next(left) for t in tensors], *options)

        return call

    terms = float(present[0].abs().double().amax()) if present[0].numel() else 1.0
    weight = float(tensors[1].abs().double().sum((1, 2, 3)).amax() * tensors[3].abs().double().sum(1).amax())
    check(
        with_none(operator), with_none(lambda *a: by_two(PLAIN, *a)), present,
        reference=with_none(lambda *a: by_two(EXACT, *a)), terms=[terms * weight],
    )  # fmt: skip


# shape, kernel, filters, multiplier, stride, padding, dilation; tiles have 16 rows, 2 columns, 16 channels and filters
GEOMETRIES: list[tuple[Any, ...]] = [
    ((2, 3, 8, 5), (3, 3), 5, 1, (1, 1), (1, 1), (1, 1)),
    ((1, 16, 17, 4), (3, 3), 16, 1, (2, 2), (1, 1), (1, 1)),
    ((3, 17, 5, 6), (5, 5), 17, 1, (1, 1), (2, 2), (1, 1)),
    ((2, 9, 6, 7), (3, 2), 33, 2, (2, 3), (0, 1), (1, 2)),
    ((2, 5, 9, 9), (1, 7), 4, 3, (1, 1), (0, 3), (2, 1)),
    ((1, 33, 1, 1), (3, 3), 1, 1, (1, 1), (2, 1), (1, 1)),
    ((2, 2, 9, 12), (3, 10), 3, 1, (1, 1), (1, 1), (1, 1)),  # too wide for one kernel
    ((0, 3, 4, 5), (3, 3), 2, 1, (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_operator(backend: str, geometry: tuple[Any, ...], layout: str) -> None:
    shape, kernel, filters, multiplier, *options = geometry
    with poisoned():
        compare(arguments(shape, kernel, filters, multiplier, layout), *options, "relu6" if kernel == (5, 5) else "relu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_dtypes(backend: str, dtype: torch.dtype, activation: str | None) -> None:
    if DEVICE == "cuda" and backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels do not take float64 on a GPU")
    options = (1, 1), (1, 1), (1, 1), activation
    compare(arguments((2, 20, 5, 6), (3, 3), 18, layout="channels_last", dtype=dtype, biases=activation is not None), *options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", range(5))
def test_operator_layouts_of_one_argument(backend: str, argument: int, layout: str) -> None:
    tensors = arguments((2, 3, 5, 6), (3, 3), 4)
    tensors[argument] = LAYOUTS[layout](tensors[argument])
    compare(tensors)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1)], ids=str)
def test_operator_memory_formats_are_torchs(backend: str, shape: tuple[int, ...]) -> None:
    for formats in itertools.product(FORMATS.values(), repeat=3):
        x, dw, _, pw, _ = arguments(shape, (3, 3), 4)
        x, dw, pw = (torch.empty_like(t, memory_format=f).copy_(t) for t, f in zip((x, dw, pw), formats, strict=True))
        y, want = operator(x, dw, None, pw, None), by_two(PLAIN, x, dw, None, pw, None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = operator(x, dw, None, pw, None)
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (y, want, fake)]
        assert strides[0] == strides[1] == strides[2], formats


def test_operator_rounds_the_middle_to_the_inputs_dtype(backend: str) -> None:
    """As two operators do: 1 + 2^-9 is 1 in bfloat16, and 256 times the difference from 1 is then 0."""
    x = torch.tensor([1.0, 2.0**-9], device=DEVICE, dtype=torch.bfloat16).view(1, 1, 1, 2)
    ones = torch.ones(2, 1, 1, 1, device=DEVICE, dtype=torch.bfloat16)
    dw = torch.cat([torch.ones(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])]).to(ones)
    pw = torch.tensor([256.0, -256.0], device=DEVICE, dtype=torch.bfloat16).view(1, 2, 1, 1)
    y = operator(x, dw, None, pw, None, padding=(0, 0))
    assert y.item() == 0


def test_operator_spreads_nan_to_the_outputs_that_see_it(backend: str) -> None:
    tensors = arguments((2, 3, 6, 7), (3, 3), 4, layout="channels_last")
    tensors[0][0, 0, 2, 3], tensors[0][1, 1, 5, 0] = float("nan"), float("inf")
    tensors[4][1] = float("nan")
    for activation in ACTIVATIONS:
        got, want = operator(*tensors, activation=activation), by_two(PLAIN, *tensors, (1, 1), (1, 1), (1, 1), activation)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isfinite(), want.isfinite()), activation


@given(st.data())
def test_operator_fuzz(backend: str, data: Any) -> None:
    draw, pick = data.draw, st.sampled_from
    dtype, n, channels, multiplier = (draw(pick(v)) for v in ([torch.float32, torch.float16], [1, 2], [1, 5, 17], [1, 1, 2]))
    kernel, stride, dilation = ((draw(pick([1, 2, 3])), draw(pick([1, 2, 3]))) for _ in range(3))
    padding = draw(pick([0, 1, 3])), draw(pick([0, 1, 2]))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(pick([0, 1, 2, 5])) for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    mid, filters = channels * multiplier, draw(pick([1, 3, 18]))
    shapes = [(n, channels, *size), (mid, 1, *kernel), (mid,), (filters, mid, 1, 1), (filters,)]
    biases = draw(st.booleans()), draw(st.booleans())
    tensors: list[Any] = [draw(drawn_tensors(shape, dtype)) for shape in shapes]
    tensors[2], tensors[4] = (t if wanted else None for t, wanted in zip((tensors[2], tensors[4]), biases, strict=True))
    with poisoned():
        compare(tensors, stride, padding, dilation, draw(pick([*ACTIVATIONS])))


@pytest.mark.skipif(DEVICE == "cuda", reason="maps address space of the CPU")
@pytest.mark.unchecked("memory", reason="the check holds a copy of the storage, which spans gigabytes")
@pytest.mark.parametrize("argument, axis", [*itertools.product([0], range(4)), (3, 0), (3, 1)])
def test_operator_offsets_beyond_32_bits(argument: int, axis: int) -> None:
    tensors = arguments((3, 3, 4, 4), (3, 3), 3)
    strides = list(tensors[argument].stride())
    strides[axis] = 2**30 + 8
    far = sparse(tensors[argument].shape, strides)
    far.copy_(tensors[argument])
    with dlaccel.use_backend("torch"):
        want = operator(*tensors)
    with dlaccel.use_backend("triton"):
        torch.testing.assert_close(operator(*tensors[:argument], far, *tensors[argument + 1 :]), want)


def double_arguments() -> list[Tensor]:
    tensors = arguments((2, 2, 3, 4), (2, 3), 3, 2, dtype=torch.float64)
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_derivatives(activation: str | None) -> None:
    """Public functions differentiate two operators; whoever calls this one gets its derivatives all the same."""
    options = (1, 2), (1, 1), (1, 1), activation
    with dlaccel.use_backend("torch"):
        tensors = double_arguments()
        assert gradcheck(lambda *t: operator(*t, *options), tensors, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(lambda *t: operator(*t, *options), tensors)
        for subset in itertools.product([False, True], repeat=5):
            wanted = [t.detach().requires_grad_(w) for t, w in zip(tensors, subset, strict=True)]
            leaves = [t for t in wanted if t.requires_grad]
            if leaves:
                got, want = (
                    torch.autograd.grad(f(*wanted, *options).square().sum(), leaves)
                    for f in (operator, lambda *a: by_two(EXACT, *a))
                )
                torch.testing.assert_close(got, want)


def test_operator_is_batched_and_counted() -> None:
    with dlaccel.use_backend("torch"):
        tensors = [t.detach() for t in double_arguments()]
        stacked = torch.stack([tensors[0], tensors[0].sin()])
        got = torch.vmap(lambda x: operator(x, *tensors[1:]))(stacked)
        torch.testing.assert_close(got, torch.stack([operator(x, *tensors[1:]) for x in stacked]))
        counts = []
        for f in (operator, lambda *t: by_two(PLAIN, *t)):
            with FlopCounterMode(display=False) as counter:
                f(*tensors)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_runs_one_operator(backend: str, dtype: torch.dtype) -> None:
    """Without a gradient one, with one two; and on the CPU, where `auto` gains nothing by an operator, aten's."""
    layer = SeparableConv2d(4, 6, 3, 2, 1, device=DEVICE, dtype=dtype)
    block = DepthwiseSeparableBlock(4, 6, activation="relu6", device=DEVICE, dtype=dtype).eval()
    x = torch.randn(2, 4, 7, 6, device=DEVICE, dtype=dtype)
    for module in (layer, block):
        with torch.no_grad():
            LAUNCHES.clear()
            inferred = module(x), module(x[0]) if module is layer else None
            assert dict(LAUNCHES) == {("separable_conv2d", backend): 1 + (module is layer)}
            torch.testing.assert_close(inferred[0], module(x.clone()))
        LAUNCHES.clear()
        y = module(x)
        assert ("separable_conv2d", backend) not in LAUNCHES and y.requires_grad
        if dtype == torch.float32:
            torch.testing.assert_close(inferred[0], y)
        if inferred[1] is not None:
            torch.testing.assert_close(inferred[1], inferred[0][0])
    frozen = [w.detach() for w in (layer.depthwise.weight, layer.pointwise.weight)]
    for tensors in (
        (x, layer.depthwise.weight, frozen[1]),
        (x, frozen[0], layer.pointwise.weight),
        (x.clone().requires_grad_(), *frozen),
    ):
        LAUNCHES.clear()
        assert F.separable_conv2d(*tensors).requires_grad and dict(LAUNCHES) == {("depthwise_conv2d", backend): 1}
    LAUNCHES.clear()
    F.separable_conv2d(x, *frozen)
    assert dict(LAUNCHES) == {("separable_conv2d", backend): 1}
    if DEVICE == "cpu":
        with dlaccel.use_backend("auto"), torch.no_grad():
            LAUNCHES.clear()
            layer(x)
            assert not LAUNCHES


@pytest.mark.parametrize("layout", FORMATS)
def test_two_kernels_where_one_does_not_pay(layout: str) -> None:
    from dlaccel.kernels import launch
    from dlaccel.kernels.separable_conv import TWO_KERNELS, forward_config

    tensors = arguments((2, 5, 6, 7), (3, 3), 4, 2, layout)
    results, started = [], []
    with dlaccel.use_backend("triton"):
        for context in (contextlib.nullcontext(), forward_config.using(TWO_KERNELS)):
            with context:
                launch.COUNTS.clear()
                results.append(operator(*tensors, activation="relu"))
                started.append(dict(launch.COUNTS))
    if DEVICE == "cpu":
        assert started[0] == {"separable_forward_kernel": 1}
    assert started[1] == {f"depthwise_{'forward' if layout == 'channels_last' else 'planes'}_kernel": 1}
    assert results[0].stride() == results[1].stride()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    "expected, dtype, direct, filters, kernel, images, size",
    [
        (True, torch.bfloat16, True, 128, 3, 128, 56),
        (True, torch.float16, True, 256, 3, 128, 56),
        (False, torch.bfloat16, True, 257, 3, 128, 56),  # the depthwise result twice
        (False, torch.bfloat16, True, 128, 5, 128, 56),
        (True, torch.float32, True, 128, 5, 128, 56),  # TF32
        (False, torch.float32, True, 128, 7, 128, 56),
        (False, torch.bfloat16, False, 128, 3, 128, 56),  # contiguous, or float32 without TF32
        (False, torch.bfloat16, True, 128, 3, 1, 28),  # 14 programs
        (False, torch.bfloat16, True, 128, 11, 128, 56),
    ],
)
def test_when_one_kernel_pays(
    expected: bool, dtype: torch.dtype, direct: bool, filters: int, kernel: int, images: int, size: int
) -> None:
    from dlaccel.kernels.config import TARGETS
    from dlaccel.kernels.separable_conv import forward_config

    sizes = direct, images * size, size, images * size * size * 128, 128, filters, kernel, kernel
    for target in ("sm_80", "sm_90", "gfx942"):
        if target == "gfx942" and images == 1:
            continue
        assert bool(forward_config.static(TARGETS[target], dtype, *sizes)) == expected, target


def test_explain_says_which_kernels_run() -> None:
    from dlaccel.kernels.separable_conv import TWO_KERNELS, forward_config

    x, dw, _, pw, _ = arguments((2, 4, 6, 6), (3, 3), 5)
    with dlaccel.use_backend("triton"), torch.no_grad():
        one = dlaccel.explain(F.separable_conv2d, x, dw, pw, padding=1)
        with forward_config.using(TWO_KERNELS):
            two = dlaccel.explain(F.separable_conv2d, x, dw, pw, padding=1)
        with dlaccel.use_backend("torch"):
            plain = dlaccel.explain(F.separable_conv2d, x, dw, pw, padding=1)
    if DEVICE == "cpu":
        assert one.kernel.startswith("separable_forward_kernel, ROWS=")
    assert two.kernel.startswith("depthwise_planes_kernel, contiguous, then the vendor library's 1x1")
    assert plain.kernel.endswith("then aten.convolution 1x1")


REFUSALS: list[tuple[dict[int, Any], type[Exception], str]] = [
    ({4: torch.ones(3)}, RuntimeError, r"bias: expected \(5,\)"),
    ({3: torch.ones(5, 4, 1, 1).double()}, RuntimeError, "pointwise_weight: expected torch.float32"),
    ({4: torch.ones(5).double()}, RuntimeError, "bias: expected torch.float32"),
    ({2: torch.ones(3)}, RuntimeError, r"bias: expected \(4,\)"),
    ({8: "gelu"}, ValueError, "activation: expected None, 'relu' or 'relu6'"),
]


@pytest.mark.parametrize("changed, error, match", REFUSALS, ids=[match for *_, match in REFUSALS])
def test_operator_refuses(changed: dict[int, Any], error: type[Exception], match: str) -> None:
    args: list[Any] = [torch.ones(1, 4, 3, 3), torch.ones(4, 1, 3, 3), None, torch.ones(5, 4, 1, 1), None]
    args += [(1, 1), (1, 1), (1, 1), None]
    for i, value in changed.items():
        args[i] = value
    with pytest.raises(error, match=match):
        operator(*args)


BAD_BLOCKS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bn1_weight": torch.ones(1)}, RuntimeError, r"weight: expected \(4,\), a number for each channel, got \(1,\)"),
    ({"bn1_bias": torch.ones(3)}, RuntimeError, r"bias: expected \(4,\), a number for each channel, got \(3,\)"),
    (
        {"bn2_running_mean": torch.ones(1)},
        RuntimeError,
        r"running_mean: expected \(5,\), a number for each channel, got \(1,\)",
    ),
    ({"bn2_running_var": torch.ones(5, 1)}, RuntimeError, r"running_var: expected \(5,\), a number for each channel"),
    ({"bn2_bias": torch.ones(5).double()}, RuntimeError, "bias: expected torch.float32 on"),
    ({"eps": -2.0}, ValueError, "eps: expected a"),
    ({"input": torch.ones(4, 6, 6)}, RuntimeError, r"input: expected \(N, C, H, W\), got \(4, 6, 6\)"),
    ({"depthwise_weight": torch.ones(4, 1, 3, 3).double()}, RuntimeError, "depthwise_weight: expected torch.float32 on"),
    ({"pointwise_weight": torch.ones(5, 4, 1, 1).double()}, RuntimeError, "pointwise_weight: expected torch.float32 on"),
]


@pytest.mark.parametrize("mode", ["training", "evaluation", "folded"])
@pytest.mark.parametrize("changed, error, match", BAD_BLOCKS, ids=[match for *_, match in BAD_BLOCKS])
def test_block_refuses_the_same_in_every_mode(changed: dict[str, Any], error: type[Exception], match: str, mode: str) -> None:
    args: dict[str, Any] = {"depthwise_weight": torch.ones(4, 1, 3, 3), "pointwise_weight": torch.ones(5, 4, 1, 1)}
    for bn, channels in (("bn1", 4), ("bn2", 5)):
        args |= {f"{bn}_{name}": torch.ones(channels) for name in ("weight", "bias", "running_mean", "running_var")}
    args = {"input": torch.ones(2, 4, 6, 6)} | args | changed
    args = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in args.items()}
    args["input"].requires_grad_(mode == "evaluation")
    with pytest.raises(error, match=match):
        F.depthwise_separable_block(**args, training=mode == "training")


@pytest.mark.parametrize("argument", ["depthwise_weight", "pointwise_weight", "bias"])
def test_separable_conv2d_names_what_is_of_another_dtype(argument: str) -> None:
    args = {"depthwise_weight": torch.ones(4, 1, 3, 3), "pointwise_weight": torch.ones(5, 4, 1, 1), "bias": torch.ones(5)}
    args = {k: v.to(DEVICE, torch.float64 if k == argument else torch.float32) for k, v in args.items()}
    x = torch.ones(2, 4, 6, 6, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"^separable_conv2d: {argument}: expected torch.float32 on .* got .* torch.float64"):
        F.separable_conv2d(x, **args)
    with torch.autocast(DEVICE, torch.bfloat16):  # which leaves float64 alone
        args = {k: v.bfloat16() if k == argument else v for k, v in args.items()}
        assert F.separable_conv2d(x, **args).dtype == torch.bfloat16
