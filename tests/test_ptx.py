"""Kernels as Triton compiles them, run from their PTX (tests/ptx): every op's samples, what only larger sizes start, the rules.

The ops' own tests run in the same way under DLACCEL_EMULATE=sm_90.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit import DEVICE, check, with_gradients

pytest.importorskip("triton", reason="Triton is not installed")
if DEVICE != "cpu":
    pytest.skip("kernels run on a GPU here", allow_module_level=True)

import triton
import triton.language as tl

import dlaccel
import dlaccel.functional as F
from dlaccel.bench.case import Case, families, implementation
from dlaccel.kernels import batch_norm, separable_conv
from dlaccel.kernels.launch import Launch
from tests.ptx import Fault, emulated
from tests.ptx.instructions import steps
from tests.ptx.launches import execute, run
from tests.ptx.machine import Launched
from tests.ptx.memory import GLOBAL, Tensors
from tests.ptx.program import parse

# ---- ops ------------------------------------------------------------------------------------------------------------

SAMPLES: list[Case] = [sample for family in families().values() for sample in family.SAMPLES]


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("sm_90", torch.float32),
        ("sm_90", torch.bfloat16),
        ("sm_90", torch.float16),
        ("sm_80", torch.bfloat16),
        pytest.param("sm_80", torch.float32, marks=pytest.mark.slow),
        pytest.param("sm_100", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("sm_120", torch.float32, marks=pytest.mark.slow),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_samples(sample: Case, target: str, dtype: torch.dtype) -> None:
    family = families()[sample.op]
    with dlaccel.use_backend("triton"), emulated(target):
        check(
            lambda *t: sample.call(implementation(sample.op), *t),
            lambda *t: sample.call(family.eager, *t),
            sample.inputs(dtype),
            reference=lambda *t: sample.call(family.reference, *t),
            state=sample.state,
        )


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False) -> torch.Tensor:
    t = torch.randn(shape).to(dtype)
    return (t.to(memory_format=torch.channels_last) if channels_last else t).requires_grad_()


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


# What the samples are too small for: inputs, the call, the same in plain torch, the kernels that have to run, multiprocessors.
Torch: Any = torch.nn.functional
LARGER: dict[str, tuple[Callable[[], list[torch.Tensor]], Callable[..., Any], Callable[..., Any], str, int]] = {
    "descriptors, several tiles a program, halved": (
        lambda: [normal(384, 200), normal(520, 200), normal(520)],
        F.linear_relu,
        lambda x, w, b: torch.relu(x @ w.t() + b),
        "linear_relu_tma_kernel relu_backward_kernel",
        2,
    ),
    "descriptors, one tile a program, ragged": (
        lambda: [normal(130, 72), normal(136, 72)],
        F.linear_relu,
        lambda x, w: torch.relu(x @ w.t()),
        "linear_relu_tma_kernel relu_backward_kernel",
        132,
    ),
    "rows in slices": (
        lambda: [normal(2, 9000)],
        lambda x: F.cross_entropy(x, torch.tensor([1, 8999]), label_smoothing=0.1),
        lambda x: Torch.cross_entropy(x, torch.tensor([1, 8999]), label_smoothing=0.1),
        "slice_kernel cross_entropy_kernel sum_kernel cross_entropy_backward_kernel",
        132,
    ),
    "aligned rows": (
        lambda: [normal(12, 2048)],
        lambda x: F.cross_entropy(x, torch.arange(12) * 170),
        lambda x: Torch.cross_entropy(x, torch.arange(12) * 170),
        "cross_entropy_kernel sum_kernel cross_entropy_backward_kernel",
        2,
    ),
    "fused gradient": (
        lambda: [normal(12, 1000)],
        lambda x: F.cross_entropy(x, torch.arange(12), fused=True),
        lambda x: Torch.cross_entropy(x, torch.arange(12)),
        "divisor_kernel cross_entropy_kernel sum_kernel",
        132,
    ),
    "batch_norm in 16 bytes, contiguous": (
        lambda: [normal(4, 6, 16, 16), normal(6), normal(6)],
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True, activation="relu"),
        lambda x, w, b: torch.relu(Torch.batch_norm(x, None, None, w, b, True)),
        "statistics_kernel normalise_kernel reduce_kernel gradient_kernel",
        2,
    ),
    "batch_norm in 16 bytes, channels_last": (
        lambda: [normal(4, 72, 8, 8, channels_last=True), normal(72), normal(72)],
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True, activation="relu"),
        lambda x, w, b: torch.relu(Torch.batch_norm(x, None, None, w, b, True)),
        "statistics_kernel normalise_kernel reduce_kernel gradient_kernel",
        4,
    ),
    "depthwise in 16 bytes, contiguous": (
        lambda: [normal(2, 3, 24, 32), normal(3, 1, 5, 5)],
        lambda x, w: F.depthwise_conv2d(x, w, padding=2),
        lambda x, w: Torch.conv2d(x, w, padding=2, groups=3),
        "depthwise_planes_kernel depthwise_planes_wgrad_kernel",
        2,
    ),
    "depthwise 7x7 of 14 pixels, stride 2": (
        lambda: [normal(1, 2, 14, 14), normal(2, 1, 7, 7)],
        lambda x, w: F.depthwise_conv2d(x, w, stride=2, padding=3),
        lambda x, w: Torch.conv2d(x, w, stride=2, padding=3, groups=2),
        "depthwise_planes_kernel depthwise_dgrad_kernel depthwise_planes_wgrad_kernel",
        132,
    ),
    "depthwise in 16 bytes, channels_last": (
        lambda: [normal(2, 72, 9, 10, channels_last=True), normal(72, 1, 3, 3)],
        lambda x, w: F.depthwise_conv2d(x, w, stride=2, padding=1),
        lambda x, w: Torch.conv2d(x, w, stride=2, padding=1, groups=72),
        "depthwise_forward_kernel depthwise_dgrad_kernel depthwise_wgrad_kernel",
        2,
    ),
}


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LARGER)
def test_larger(name: str, target: str) -> None:
    make, call, plain, kernels, sms = LARGER[name]
    given = make()
    with dlaccel.use_backend("triton"), emulated(target, sms=sms) as ran:
        got = with_gradients(call, given)
    if target == "sm_90":
        assert set(ran) == set(kernels.split())
    exact = with_gradients(plain, double(*given))
    for p, q in zip(got, exact, strict=True):
        assert p is not None and q is not None
        error, scale = (p.double() - q).abs().max().item(), q.abs().max().item()
        assert error <= 2.0**-7 * scale, f"{error} of {scale}"  # one rounding to bfloat16 of masks and sums at their largest


@pytest.mark.parametrize("channels_last", [False, True])
def test_both_passes_in_one_launch(channels_last: bool) -> None:
    """The programs run at the same time here: some wait for others. In the interpreter none does."""
    x = normal(6, 40, 9, 9, dtype=torch.float32, channels_last=channels_last)
    results = []
    with dlaccel.use_backend("triton"), emulated("sm_90", sms=8) as ran:
        for tiles in (0, 2):
            forward, backward = (
                choice.using(choice(x.device, x.dtype, 6, 40, 81) | {"TICKET": tiles})
                for choice in (batch_norm.forward_config, batch_norm.backward_config)
            )
            with forward, backward:
                results.append(with_gradients(lambda x: F.batch_norm(x, None, None, None, None, True, activation="relu"), [x]))
    assert {"statistics_kernel", "forward_kernel", "backward_kernel"} <= set(ran)
    torch.testing.assert_close(results[1], results[0])


@triton.jit
def count(out, rows, S):
    tl.store(out, batch_norm.values_in(rows, S))


@pytest.mark.parametrize("rows, size, vec", [(2**20, 2**13, 16), (1, 2**31 + 16, 1)])
def test_batch_norm_counts_beyond_32_bits(rows: int, size: int, vec: int) -> None:
    """The values of a channel; and where its rows are as long, the kernels multiply no size by `vec`."""
    out = torch.zeros(1, dtype=torch.int64)
    run(Launch(count, (1,), (out, rows, size), {}), "sm_90")
    assert out.item() == rows * size
    x = torch.empty(rows, 1 if rows == 1 else 2, size, device="meta")
    assert batch_norm.Walk.of(x.shape, x.stride(), x.stride()).vec == vec


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_separable_conv_in_one_kernel(dtype: torch.dtype) -> None:
    x, w, p = (
        normal(2, 64, 12, 8, dtype=dtype, channels_last=True),
        normal(64, 1, 3, 3, dtype=dtype),
        normal(72, 64, 1, 1, dtype=dtype),
    )
    config = separable_conv._blocks(dtype, 64)
    precision, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    try:
        with (
            dlaccel.use_backend("triton"),
            emulated("sm_90") as ran,
            torch.no_grad(),
            separable_conv.forward_config.using(config),
        ):
            y = F.separable_conv2d(x, w, p, padding=1)
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision
    assert ran == ["separable_forward_kernel"]
    exact = Torch.conv2d(Torch.conv2d(x.double(), w.double(), padding=1, groups=64), p.double())
    assert (y.double() - exact).abs().max() <= 2.0**-7 * exact.abs().max()


# ---- tensor cores against NumPy: where elements lie -----------------------------------------------------------------


@triton.jit
def product(
    a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """A, B: the operand is stored transposed."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + (m[:, None] + k[None, :] * M if A else m[:, None] * K + k[None, :]))
    right = tl.load(b + (k[:, None] + n[None, :] * K if B else k[:, None] * N + n[None, :]))
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision=PRECISION))


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "target, sizes", [("sm_80", (32, 32, 32)), ("sm_90", (64, 32, 128)), ("sm_90", (128, 64, 32))], ids=str
)
def test_products(target: str, sizes: tuple[int, int, int], dtype: torch.dtype, transposed: tuple[bool, bool]) -> None:
    m, n, k = sizes
    a, b = torch.randint(-8, 8, (m, k)).to(dtype), torch.randint(-8, 8, (k, n)).to(dtype)
    stored = [t.t().contiguous() if flip else t for t, flip in zip((a, b), transposed, strict=True)]
    c = torch.full((m, n), math.nan)
    constants = dict(zip("MNKAB", (*sizes, *transposed), strict=True)) | {"PRECISION": "tf32"}
    run(Launch(product, (1,), (*stored, c), constants | {"num_warps": 4}), target)
    assert torch.equal(c, a.float() @ b.float())


# ---- arithmetic -----------------------------------------------------------------------------------------------------

THREADS = 64


def ran(body: str, *given: Any, kinds: tuple[str, ...] = ("b32", "b32", "b32"), result: str = "b32") -> Any:
    """%r of every thread after `body`; %a, %b, %c: its values of the given arrays (bits)."""
    width = {"b16": 2, "b32": 4, "b64": 8, "pred": 4}
    arrays = [torch.from_numpy(np.resize(np.asarray(g), THREADS).copy()) for g in given]
    out = torch.zeros(THREADS, dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[width[result]])
    loads = ""
    for name, kind, k in zip("abc", kinds, range(len(arrays)), strict=False):
        loads += f"ld.param.b64 %rd{k}, [p{k}]; mad.wide.u32 %rd{k}, %t, {width[kind]}, %rd{k};"
        loads += f"ld.global.{kind} %{name}, [%rd{k}];"
    registers = "".join(f".reg .{kind} %{name};" for name, kind in zip("abc", kinds, strict=False))
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(arrays) + 1))
    stored = "selp.b32 %t, 1, 0, %r; st.global.b32 [%o], %t;" if result == "pred" else f"st.global.{result} [%o], %r;"
    program = parse(
        f""".entry test({parameters}) {{ .reg .b64 %rd<4>; .reg .b64 %o; .reg .b32 %t; .reg .{result} %r; {registers}
        mov.u32 %t, %tid.x; {loads} {body}
        ld.param.b64 %o, [p{len(arrays)}]; mov.u32 %t, %tid.x; mad.wide.u32 %o, %t, {width[result]}, %o; {stored} ret; }}"""
    )
    memory = Tensors([*arrays, out])
    named = {f"p{k}": np.uint64(memory.address(t)) for k, t in enumerate([*arrays, out])}
    execute(Launched(program, memory, named, (1, 1, 1), THREADS, 1024))
    memory.copy_back()
    return out.numpy()


INTEGERS = np.array([0, 1, 2, 5, 31, 32, 33, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 7, 2**32 - 1], np.uint32).view(np.int32)
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.1415927, 65504.0, 1e-40, -7e-39, 1e30, np.inf, -np.inf, np.nan, 0.1, 2**-24], np.float32
)
PAIRS = [np.repeat(v, len(v)) for v in (INTEGERS, FLOATS)], [np.tile(v, len(v)) for v in (INTEGERS, FLOATS)]


def signed(x: int, bits: int = 32) -> int:
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def quotient(x: int, y: int) -> int:
    return (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1) if y else -1


@pytest.mark.parametrize(
    "instruction, formula",
    [
        ("add.s32", lambda x, y: x + y),
        ("sub.s32", lambda x, y: x - y),
        ("mul.lo.s32", lambda x, y: x * y),
        ("mul.hi.s32", lambda x, y: x * y >> 32),
        ("mul.hi.u32", lambda x, y: (x % 2**32) * (y % 2**32) >> 32),
        ("div.s32", quotient),
        ("rem.s32", lambda x, y: x - quotient(x, y) * y),
        ("min.s32", min),
        ("max.u32", lambda x, y: max(x % 2**32, y % 2**32)),
        ("shl.b32", lambda x, y: x << (y % 2**32) if y % 2**32 < 32 else 0),
        ("shr.s32", lambda x, y: x >> min(y % 2**32, 31)),
        ("shr.u32", lambda x, y: x % 2**32 >> (y % 2**32) if y % 2**32 < 32 else 0),
        ("xor.b32", lambda x, y: x ^ y),
    ],
)
def test_integers(instruction: str, formula: Callable[[int, int], int]) -> None:
    for first in range(0, len(INTEGERS) ** 2, THREADS):
        a, b = (np.resize(p[0][first : first + THREADS], THREADS) for p in PAIRS)
        want = [signed(formula(int(x), int(y))) for x, y in zip(a, b, strict=True)]
        np.testing.assert_array_equal(ran(f"{instruction} %r, %a, %b;", a, b), want)


def rounded(exact: Fraction) -> float:
    """To float32, once: half to even."""
    if exact == 0:
        return 0.0
    exponent = max(math.frexp(float(exact))[1], -125) - 24
    scaled = exact / Fraction(2) ** exponent
    return float(round(scaled) * Fraction(2) ** exponent)


def test_fused_multiply_add_rounds_once() -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(THREADS).astype(np.float32) for _ in range(2))
    c = (-(a.astype(np.float64) * b)).astype(np.float32)  # what is left is the product's last bits
    got = ran("fma.rn.f32 %r, %a, %b, %c;", *(x.view(np.int32) for x in (a, b, c))).view(np.float32)
    want = [rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.float32))
    assert np.count_nonzero(got) > THREADS // 2


@pytest.mark.parametrize(
    "instruction, formula",
    [
        ("setp.lt.f32", lambda x, y: x < y),
        ("setp.neu.f32", lambda x, y: x != y),  # true of NaN
        ("setp.ne.f32", lambda x, y: x != y and x == x and y == y),
        ("setp.ltu.f32", lambda x, y: not x >= y),
        ("setp.nan.f32", lambda x, y: x != x or y != y),
    ],
)
def test_comparisons(instruction: str, formula: Callable[[float, float], bool]) -> None:
    a, b = (np.resize(p[1], 256) for p in PAIRS)
    for first in range(0, 256, THREADS):
        x, y = a[first : first + THREADS], b[first : first + THREADS]
        got = ran(f"{instruction} %r, %a, %b;", x.view(np.int32), y.view(np.int32), result="pred")
        np.testing.assert_array_equal(got.astype(bool), [formula(float(p), float(q)) for p, q in zip(x, y, strict=True)])


def test_maxima_lose_or_keep_a_nan() -> None:
    a, b = (
        np.array([np.nan, 1, np.nan, 2], np.float32).view(np.int32),
        np.array([1, np.nan, np.nan, 1], np.float32).view(np.int32),
    )
    lost, kept = (ran(f"max.{kind} %r, %a, %b;", a, b).view(np.float32)[:4] for kind in ("f32", "NaN.f32"))
    np.testing.assert_array_equal(lost, np.array([1, 1, np.nan, 2], np.float32))
    np.testing.assert_array_equal(kept, np.array([np.nan, np.nan, np.nan, 2], np.float32))


def test_conversions() -> None:
    x = np.resize(FLOATS, THREADS)
    bf16 = ran("cvt.rn.bf16.f32 %r, %a;", x.view(np.int32), result="b16")
    assert torch.equal(
        torch.from_numpy(bf16.copy()).view(torch.bfloat16).float().nan_to_num(7),
        torch.from_numpy(x).bfloat16().float().nan_to_num(7),
    )
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32).view(np.int32)  # half to even; to infinity
    assert [int(h) % 2**16 for h in ran("cvt.rn.bf16.f32 %r, %a;", ties, result="b16")[:4]] == [0x3F80, 0x3F82, 0x3F81, 0x7F80]
    integers = ran("cvt.rzi.s32.f32 %r, %a;", x.view(np.int32))
    want = [
        0 if math.isnan(v) else int(max(-(2**31), min(2**31 - 1, v if math.isinf(v) else math.trunc(v)))) for v in x.tolist()
    ]
    np.testing.assert_array_equal(integers, want)
    pair = ran("cvt.rn.f16x2.f32 %r, %a, %b;", np.float32([1.5]).view(np.int32), np.float32([-2.0]).view(np.int32))
    assert struct.unpack("<2e", struct.pack("<i", int(pair[0]))) == (-2.0, 1.5)
    tiny = np.float32([1e-40]).view(np.int32)
    assert ran("mul.ftz.f32 %r, %a, 0f3F800000;", tiny)[0] == 0 and ran("mul.f32 %r, %a, 0f3F800000;", tiny)[0] == tiny[0]


def test_shuffles() -> None:
    lanes = np.arange(THREADS, dtype=np.int32)
    warp, lane = lanes // 32 * 32, lanes % 32
    got = {mode: ran(f"shfl.sync.{mode} %r, %a, 5, {c}, -1;", lanes) for mode, c in
           (("bfly.b32", 31), ("up.b32", 0), ("down.b32", 31), ("idx.b32", 31))}  # fmt: skip
    np.testing.assert_array_equal(got["bfly.b32"], warp + (lane ^ 5))
    np.testing.assert_array_equal(got["up.b32"], warp + np.where(lane >= 5, lane - 5, lane))
    np.testing.assert_array_equal(got["down.b32"], warp + np.where(lane + 5 < 32, lane + 5, lane))
    np.testing.assert_array_equal(got["idx.b32"], warp + 5)


def test_threads_that_branch_differently_meet_again() -> None:
    body = """.reg .pred %p<2>; .reg .b32 %n; mov.u32 %n, 0; and.b32 %t, %t, 7; mov.b32 %r, 100;
    LOOP: setp.ge.u32 %p0, %n, %t; @%p0 bra DONE; add.u32 %n, %n, 1; add.u32 %r, %r, 2; bra LOOP;
    DONE: shfl.sync.bfly.b32 %r, %r, 1, 31, -1;"""
    np.testing.assert_array_equal(ran(body), 100 + 2 * ((np.arange(THREADS) ^ 1) % 8))


# ---- rules ----------------------------------------------------------------------------------------------------------


@triton.jit
def copies(x, y, n, B: tl.constexpr, HINT: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(tl.multiple_of(x + i, HINT), mask=i < n, other=0.0), mask=i < n)


def test_an_access_outside_the_tensors_is_a_fault() -> None:
    x, y = torch.randn(64), torch.zeros(64)
    run(Launch(copies, (1,), (x, y, 50), {"B": 64, "HINT": 1}), "sm_90")
    assert torch.equal(y[:50], x[:50]) and not y[50:].any()
    with pytest.raises(Fault, match=r"memory: .*not the kernel's.*ld.global"):
        run(Launch(copies, (1,), (x[:40], y, 50), {"B": 64, "HINT": 1}), "sm_90")
    with pytest.raises(Fault, match=r"memory: .*st.global"):  # what a strided view leaves out is not the kernel's
        run(Launch(copies, (1,), (x, y.view(32, 2)[:, 0], 50), {"B": 64, "HINT": 1}), "sm_90")


def test_a_hint_that_lies_is_a_fault() -> None:
    x, y = torch.randn(513)[1:], torch.zeros(512)
    run(Launch(copies, (1,), (x, y, 512), {"B": 512, "HINT": 1, "num_warps": 4}), "sm_90")
    assert torch.equal(x, y)
    with pytest.raises(Fault, match="alignment: 16 bytes of global"):
        run(Launch(copies, (1,), (x, y, 512), {"B": 512, "HINT": 16, "num_warps": 4}), "sm_90")


SHARE = ".reg .b32 %s; shl.b32 %s, %t, 2; .reg .b32 %g; mov.b32 %g, global_smem; add.u32 %s, %s, %g; st.shared.b32 [%s], %t;"
FROM_OTHER_WARP = " xor.b32 %s, %s, 128; ld.shared.b32 %r, [%s];"


def test_shared_memory_without_a_barrier_is_a_fault() -> None:
    np.testing.assert_array_equal(ran(f"{SHARE} bar.sync 0; {FROM_OTHER_WARP}"), np.arange(THREADS) ^ 32)
    with pytest.raises(Fault, match="hazard: a warp reads"):
        ran(SHARE + FROM_OTHER_WARP)
    with pytest.raises(Fault, match="hazard: a warp writes"):
        ran(f"{SHARE} bar.sync 0; {FROM_OTHER_WARP} st.shared.b32 [%s], %t; xor.b32 %s, %s, 128; st.shared.b32 [%s], %t;")
    with pytest.raises(Fault, match="hazard: two warps"):
        first = ".reg .pred %p; setp.lt.u32 %p, %t, 32; .reg .b32 %g; mov.b32 %g, global_smem;"
        ran(f"{first} @%p st.shared.b32 [%g], 1; @!%p st.shared.b32 [%g], 2;")
    with pytest.raises(Fault, match="memory: threads of one store disagree"):
        ran(".reg .b32 %g; mov.b32 %g, global_smem; shr.u32 %t, %t, 5; st.shared.b32 [%g], %t;")
    with pytest.raises(Fault, match="memory: 4 bytes at 1024 of shared"):
        ran(".reg .b32 %g; mov.b32 %g, global_smem; ld.shared.b32 %r, [%g+1024];")


def test_a_barrier_that_some_never_reach_is_a_fault() -> None:
    with pytest.raises(Fault, match="barriers: only some of a block's"):
        ran(".reg .pred %p; setp.lt.u32 %p, %t, 40; @%p bar.sync 0; mov.b32 %r, 0;")
    with pytest.raises(Fault, match="barriers: only some of a warp's"):
        ran(".reg .pred %p; setp.lt.u32 %p, %t, 40; @%p shfl.sync.idx.b32 %r, %t, 0, 31, -1;")


def test_copies_are_there_when_they_are_waited_for() -> None:
    start = ".reg .b32 %s; shl.b32 %s, %t, 2; .reg .b32 %g; mov.b32 %g, global_smem; add.u32 %s, %s, %g; st.shared.b32 [%s], 7;"
    start += "cp.async.ca.shared.global [%s], [%rd0], 4; cp.async.commit_group;"
    given = np.arange(100, 100 + THREADS, dtype=np.int32)
    assert (ran(f"{start} ld.shared.b32 %r, [%s];", given) == 7).all()
    np.testing.assert_array_equal(ran(f"{start} cp.async.wait_group 0; ld.shared.b32 %r, [%s];", given), given)
    assert (ran(f"{start} cp.async.wait_group 1; ld.shared.b32 %r, [%s];", given) == 7).all()


def test_what_was_never_written_is_not_a_number() -> None:
    assert np.isnan(ran("mov.b32 %r, %q;".replace("%q", "%rd3").replace("mov.b32", "cvt.u32.u64")).view(np.float32)).all()
    with pytest.raises(Fault, match="registers: %p is read before"):
        ran(".reg .pred %p; selp.b32 %r, 1, 0, %p;")


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"this machine has no popc.b32 %r, %a"):
        steps(parse(".entry k(.param .u64 p0) { popc.b32 %r, %a; ret; }"))


def test_addresses_keep_the_alignment_of_their_tensors() -> None:
    x = torch.randn(100)
    memory = Tensors([x, x[3:], torch.empty(0), x[:1].expand(50)])
    for t in (x, x[3:]):
        assert memory.address(t) % 256 == t.data_ptr() % 256 and memory.address(t) > GLOBAL
    assert memory.address(x[3:]) - memory.address(x) == 12
