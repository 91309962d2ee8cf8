"""What every registered op must do. The tests loop over the registry and the samples of bench/cases; none names an op."""

from __future__ import annotations

import functools
import gc
import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd_ad
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dlaccel
from dlaccel.bench.accuracy import close_enough
from dlaccel.bench.case import Case, families, implementation
from dlaccel.ops._register import LAUNCHES, NAMESPACE, REGISTRY
from tests.kit import COTANGENTS, DEVICE, LAYOUTS, poisoned, unchanged

FAMILIES = families()
SAMPLES: list[Case] = [sample for family in FAMILIES.values() for sample in family.SAMPLES]
FIRST = [family.SAMPLES[0] for family in FAMILIES.values()]
BACKENDS = ("torch", "triton")


def id_of(value: Any) -> str | None:
    return f"{value.op}: {value.name}" if isinstance(value, Case) else None


def has_kernel(op: str) -> bool:
    return op not in REGISTRY or REGISTRY[op].has_kernel  # a function of several operators is in no registry


def over(samples: list[Case], *backends: str) -> Callable[..., Any]:
    pairs = [(s, b) for s in samples for b in backends or BACKENDS if b == "torch" or has_kernel(s.op)]
    return pytest.mark.parametrize("sample, backend", pairs, ids=[f"{id_of(s)} {b}" for s, b in pairs])


def empty(sample: Case) -> bool:
    return any(t.numel() == 0 for t in sample.inputs(torch.float64))


def large(sample: Case) -> bool:
    return sum(t.numel() for t in sample.inputs(torch.float64)) > 500


NONEMPTY = [s for s in SAMPLES if not empty(s)]
SMALL = [s for s in SAMPLES if not large(s)]  # numerical and higher derivatives cost one call per element
SMALL_NONEMPTY = [s for s in NONEMPTY if s in SMALL]


@pytest.fixture(autouse=True)
def chosen_backend(request: pytest.FixtureRequest) -> Any:
    named = "backend" in request.fixturenames
    with dlaccel.use_backend(request.getfixturevalue("backend") if named else "auto"):
        yield


class Bound:
    """A sample's call as a function of the tensors that get a gradient; the others, and fresh state, are filled in."""

    def __init__(self, sample: Case, f: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> None:
        tensors = sample.inputs(dtype, DEVICE)
        self.sample, self.f, self.all = sample, f, [t.detach() for t in tensors]
        self.indices = sample.differentiable(tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """Fresh leaves that require grad."""
        return [self.all[i].clone().requires_grad_() for i in self.indices]

    def __call__(self, *tensors: Tensor) -> Tensor:
        filled = [t.clone() if i in self.sample.state else t for i, t in enumerate(self.all)]
        for i, t in zip(self.indices, tensors, strict=True):
            filled[i] = t
        result: Tensor = self.sample.call(self.f, *filled)
        return result


def ours(sample: Case, dtype: torch.dtype = torch.float64) -> Bound:
    return Bound(sample, implementation(sample.op), dtype)


def reference(sample: Case, dtype: torch.dtype = torch.float64) -> Bound:
    return Bound(sample, FAMILIES[sample.op].reference, dtype)


def eager(sample: Case, dtype: torch.dtype = torch.float64) -> Bound:
    return Bound(sample, FAMILIES[sample.op].eager, dtype)


class Calls(TorchDispatchMode):
    """The calls of our operators, as the kernels see them: forward and backward alike."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(f: Bound, tensors: list[Tensor], g: Tensor | None = None) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators of a call and its gradients; then those that only a call without gradients uses."""
    with Calls() as calls:
        y = f(*tensors)
        g = torch.randn_like(y, requires_grad=True) if g is None else g
        torch.autograd.grad(y, tensors, g, create_graph=True, allow_unused=True)
    with Calls() as inference, torch.no_grad():
        f(*tensors)
    known = {op for op, _ in calls.seen}
    return calls.seen + [(op, args) for op, args in inference.seen if op not in known]


def leaves(tree: Any) -> list[Any]:
    """An op's outputs; a gradient that nobody wanted is None and left out."""
    return [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]


def metadata(t: Tensor) -> tuple[Any, ...]:  # an empty tensor's strides mean nothing, and fake tensors have others
    return t.shape, t.stride() if t.numel() else None, t.dtype, t.device


def close(got: Any, want: Any, **tolerance: float) -> None:
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(got) == len(want)
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def with_gradients(f: Callable[..., Tensor], tensors: list[Tensor], g: Any) -> tuple[Tensor, ...]:
    y = f(*tensors)
    return y, *torch.autograd.grad(y, tensors, g(y) if callable(g) else g)


# ---- values and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch"])  # auto calls aten directly for small tensors
def test_the_samples_reach_every_registered_op(backend: str) -> None:
    bounds = [ours(s) for s in SAMPLES]
    assert {op._opname for f in bounds for op, _ in calls_of(f, f.tensors)} == set(REGISTRY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@over(SAMPLES)
def test_values(sample: Case, backend: str, dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels do not take float64 on a GPU")
    f, e = ours(sample, dtype), eager(sample, dtype)
    exact = Bound(sample, FAMILIES[sample.op].reference, dtype)
    exact.all = [t.double() if t.is_floating_point() else t for t in exact.all]
    g = torch.randn(exact(*exact.tensors).shape, dtype=torch.float64, device=DEVICE).to(dtype)
    LAUNCHES.clear()
    got = with_gradients(f, f.tensors, g.to(f(*f.tensors).dtype))
    assert {b for _, b in LAUNCHES} == {backend}
    plain, want = with_gradients(e, e.tensors, g.to(e(*e.tensors).dtype)), with_gradients(exact, exact.tensors, g.double())
    for i, (p, q, r) in enumerate(zip(got, plain, want, strict=True)):
        assert (problem := close_enough(p, q, r)) is None, f"output and gradients [{i}] {problem}"


# Every layout of the inputs, each with one of the cotangents, for an op's first sample; the two that bite most for the others.
PAIRS = list(zip(LAYOUTS, itertools.cycle(COTANGENTS), strict=False))
LAID_OUT = [
    (s, b, layout, g)
    for s in SAMPLES
    for b in BACKENDS
    for layout, g in PAIRS
    if s in FIRST or layout in ("channels_last", "column slice")
]


@pytest.mark.parametrize("sample, backend, layout, g", LAID_OUT, ids=[f"{id_of(s)} {b} {x} {g}" for s, b, x, g in LAID_OUT])
def test_layouts(sample: Case, backend: str, layout: str, g: str) -> None:
    """Values; and for each op: the fake's strides, fresh outputs, every element written, inputs left alone."""
    dtype = torch.float32 if DEVICE == "cuda" and backend == "triton" else torch.float64
    f, r = ours(sample, dtype), reference(sample, dtype)
    tensors = [LAYOUTS[layout](t) for t in f.tensors]
    close(with_gradients(f, tensors, COTANGENTS[g]), with_gradients(r, tensors, COTANGENTS[g]))
    for op, args in calls_of(f, tensors, COTANGENTS[g](r(*tensors)).requires_grad_()):
        mutable = {i for i, a in enumerate(op._schema.arguments) if a.alias_info}
        args = pytree.tree_map_only(Tensor, Tensor.detach, args)

        def fresh_state(args: tuple[Any, ...] = args, mutable: set[int] = mutable) -> list[Any]:
            return [a.clone() if i in mutable and a is not None else a for i, a in enumerate(args)]

        inputs = [a for i, a in enumerate(args) if isinstance(a, Tensor) and i not in mutable]
        with torch.no_grad():
            with unchanged(*inputs):
                outputs = leaves(op(*fresh_state()))
            state = fresh_state()
            with FakeTensorMode() as mode:
                fakes = leaves(op(*pytree.tree_map_only(Tensor, mode.from_tensor, state)))
            with poisoned():
                again = leaves(op(*fresh_state()))
        close(again, outputs, rtol=0, atol=0, equal_nan=True)
        assert [metadata(o) for o in outputs] == [metadata(o) for o in fakes], op
        assert not any(o._is_view() for o in outputs)
        fresh, given = ([t.untyped_storage().data_ptr() for t in ts if t.numel()] for ts in (outputs, inputs))
        assert len({*fresh}) == len(fresh) and not {*fresh} & {*given}


@over(NONEMPTY)
def test_repeats_are_bitwise_equal(sample: Case, backend: str) -> None:
    f = ours(sample, torch.float32)
    first, second = (with_gradients(f, f.tensors, COTANGENTS["transposed"]) for _ in range(2))
    close(first, second, rtol=0, atol=0)


REFUSALS = [(op, *refused) for op, family in FAMILIES.items() for refused in family.REFUSED]


@pytest.mark.parametrize("op, call, error, match", REFUSALS, ids=[f"{op}: {match}" for op, _, _, match in REFUSALS])
def test_refused_by_real_and_fake_alike(op: str, call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    with FakeTensorMode(), pytest.raises(error, match=match):
        call()


# ---- derivatives ----------------------------------------------------------------------------------------------------


def float64_runs(backend: str) -> None:
    if DEVICE == "cuda" and backend == "triton":
        pytest.skip("numerical derivatives need float64, which the kernels take in the interpreter only")


@over(SMALL)
def test_gradcheck(sample: Case, backend: str) -> None:
    float64_runs(backend)
    interpreted = backend == "triton"
    f = ours(sample)
    assert gradcheck(f, f.tensors, fast_mode=interpreted, check_forward_ad=True, check_batched_grad=not interpreted)


@over(SMALL)
def test_gradgradcheck(sample: Case, backend: str) -> None:
    float64_runs(backend)
    interpreted = backend == "triton"
    f = ours(sample)
    g = torch.randn_like(f(*f.tensors)).requires_grad_()
    assert gradgradcheck(f, f.tensors, [g], fast_mode=interpreted, check_fwd_over_rev=not interpreted)


@over(SMALL)
def test_every_subset_of_requires_grad(sample: Case, backend: str) -> None:
    float64_runs(backend)
    f, r = ours(sample), reference(sample)
    for subset in itertools.product([False, True], repeat=len(f.indices)):
        results = []
        for function in (f, r):
            tensors = [t.requires_grad_(wanted) for t, wanted in zip(function.tensors, subset, strict=True)]
            y = function(*tensors)
            assert y.requires_grad == any(subset)
            if any(subset):
                y.square().sum().backward()
            results.append([t.grad for t in tensors])
        assert [t is None for t in results[0]] == [not wanted for wanted in subset]
        close([t for t in results[0] if t is not None], [t for t in results[1] if t is not None])


def square_sum(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: f(*tensors).square().sum()


def only_x(f: Callable[..., Tensor], rest: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x, *rest)


def dual(f: Any, x: Tensor, rest: list[Tensor], requires_grad: bool) -> tuple[Any, ...]:
    with fwd_ad.dual_level():
        return tuple(fwd_ad.unpack_dual(f(fwd_ad.make_dual(x.clone().requires_grad_(requires_grad), x.sin()), *rest)))


TRANSFORMS: dict[str, Callable[..., Any]] = {  # f(x, *rest); xs: a batch of x
    "grad": lambda f, x, rest, xs: grad(square_sum(f), tuple(range(1 + len(rest))))(x, *rest),
    "vjp": lambda f, x, rest, xs: vjp(f, x, *rest)[1](f(x, *rest).cos()),
    "jvp": lambda f, x, rest, xs: jvp(f, (x, *rest), (x.sin(), *[t.cos() for t in rest])),
    "jvp of x": lambda f, x, rest, xs: jvp(only_x(f, rest), (x,), (x.sin(),)),
    "jacrev": lambda f, x, rest, xs: jacrev(f, tuple(range(1 + len(rest))))(x, *rest),
    "jacfwd": lambda f, x, rest, xs: jacfwd(f, tuple(range(1 + len(rest))))(x, *rest),
    "hessian": lambda f, x, rest, xs: hessian(square_sum(f))(x, *rest),
    "jacrev(jacrev)": lambda f, x, rest, xs: jacrev(jacrev(square_sum(f)))(x, *rest),
    "jacrev(jacfwd)": lambda f, x, rest, xs: jacrev(jacfwd(square_sum(f)))(x, *rest),
    "grad(jvp)": lambda f, x, rest, xs: grad(lambda x: jvp(only_x(f, rest), (x,), (x.sin(),))[1].square().sum())(x),
    "third order": lambda f, x, rest, xs: grad(
        lambda x: grad(lambda x: grad(lambda x: f(x, *rest).pow(3).sum())(x).sin().sum())(x).sin().sum()
    )(x),
    "plain double backward": lambda f, x, rest, xs: torch.autograd.functional.hessian(only_x(square_sum(f), rest), x),
    "dual numbers": lambda f, x, rest, xs: dual(f, x, rest, False),
    "dual numbers, requires grad": lambda f, x, rest, xs: dual(f, x, rest, True),
    "vmap": lambda f, x, rest, xs: vmap(only_x(f, rest))(xs),
    "vmap, last dimension": lambda f, x, rest, xs: vmap(only_x(f, rest), -1, -1)(xs.movedim(0, -1)),
    "vmap of all": lambda f, x, rest, xs: vmap(f)(xs, *[torch.stack([t, t.sin(), t.cos()]) for t in rest]),
    "vmap(grad)": lambda f, x, rest, xs: vmap(lambda x: grad(square_sum(f), tuple(range(1 + len(rest))))(x, *rest))(xs),
    "vmap(jvp)": lambda f, x, rest, xs: vmap(lambda x: jvp(only_x(f, rest), (x,), (x.sin(),)))(xs),
    "grad(vmap)": lambda f, x, rest, xs: grad(lambda xs: vmap(only_x(f, rest))(xs).square().sum())(xs),
    "no_grad inside grad": lambda f, x, rest, xs: grad(lambda x: (f(x, *rest) * torch.no_grad()(f)(x, *rest)).sum())(x),
    "make_fx(grad)": lambda f, x, rest, xs: make_fx(grad(only_x(square_sum(f), rest)))(x)(x),
}


def run_transform(transform: Callable[..., Any], sample: Case, wrap: Any = lambda f: f) -> None:
    f, r = ours(sample), reference(sample)
    x, *rest = (t.detach() for t in f.tensors)
    xs = torch.stack([x, x.sin(), 2 * x.cos()])
    got = wrap(lambda x, rest, xs: transform(f, x, rest, xs))(x, rest, xs)
    close(got, transform(r, x, rest, xs))


def refused_under_vmap(sample: Case, name: str) -> bool:
    return bool(sample.state) and "vmap" in name


# Every transform of an op's first two samples; for the others those that reach each formula of the declaration once.
FEW = ("grad", "jvp", "jacrev(jacfwd)", "grad(jvp)", "third order", "vmap of all", "vmap(grad)")
FIRST_TWO = [s for family in FAMILIES.values() for s in [s for s in family.SAMPLES if s in SMALL_NONEMPTY][:2]]
TRANSFORMED = [(s, "torch", t) for s in SMALL_NONEMPTY for t in TRANSFORMS if s in FIRST_TWO or t in FEW]


@pytest.mark.parametrize("sample, backend, transform", TRANSFORMED, ids=[f"{id_of(s)} {t}" for s, _, t in TRANSFORMED])
def test_transforms(sample: Case, backend: str, transform: str) -> None:
    if refused_under_vmap(sample, transform):  # one state for many samples: aten refuses it too
        with pytest.raises(Exception, match=r"batched|batch it too|in-?place"):
            run_transform(TRANSFORMS[transform], sample)
    else:
        run_transform(TRANSFORMS[transform], sample)


def third_derivative(f: Callable[..., Any], x: Tensor, rest: list[Tensor]) -> Tensor:
    y = f(x.requires_grad_(), *rest).pow(3).sum()
    for _ in range(2):
        (dy,) = torch.autograd.grad(y, x, create_graph=True)
        y = dy.sin().sum()
    return torch.autograd.grad(y, x)[0]


@over(SMALL_NONEMPTY, "torch", "auto")
def test_third_derivative_by_autograd(sample: Case, backend: str) -> None:
    """Without torch.func, where `auto` calls aten itself on the CPU; aten's batch norm alone is wrong here."""
    f, r = ours(sample), reference(sample)
    x, *rest = (t.detach() for t in f.tensors)
    want = third_derivative(r, x.clone(), rest)
    close(third_derivative(f, x.clone(), rest), want)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, f, use_reentrant=False)
    close(third_derivative(checkpointed, x.clone(), rest), want)


@over(SMALL_NONEMPTY, "auto")
def test_derivative_of_a_vectorised_jacobian(sample: Case, backend: str) -> None:
    """There gradients are batched by vmap while somebody records them."""
    if refused_under_vmap(sample, "vmap"):
        pytest.skip("refused: test_transforms")
    f, r = ours(sample), reference(sample)
    x, *rest = (t.detach() for t in f.tensors)

    def derivative(f: Callable[..., Any], **options: Any) -> Tensor:
        at = x.clone().requires_grad_()
        j = torch.autograd.functional.jacobian(lambda x: f(x, *rest).sin().flatten()[:3], at, create_graph=True, **options)
        (dj,) = torch.autograd.grad(j.sin().sum(), at, create_graph=True)
        return torch.autograd.grad(dj.square().sum(), at)[0]

    close(derivative(f, vectorize=True), derivative(r))


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap(grad)", "third order"])
@over(FIRST, "triton")
def test_transforms_of_the_kernels(sample: Case, backend: str, transform: str) -> None:
    float64_runs(backend)
    if refused_under_vmap(sample, transform):
        pytest.skip("refused: test_transforms")
    run_transform(TRANSFORMS[transform], sample)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap(grad)"])
@over(FIRST, "torch")
def test_compiled_transforms(sample: Case, backend: str, transform: str) -> None:
    if refused_under_vmap(sample, transform):
        pytest.skip("refused: test_transforms")
    run_transform(TRANSFORMS[transform], sample, compiled)


def saved_bytes(f: Bound) -> int:
    """Without vectors of parameters, such as a bias, which live as long as their module anyway."""
    seen: dict[int, int] = {}
    tensors = f.tensors
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        f(*tensors)
    parameters = {t.data_ptr() for t in tensors if t.dim() == 1}
    return sum(size for pointer, size in seen.items() if pointer not in parameters)


@over(NONEMPTY, "torch")
def test_saved_tensors(sample: Case, backend: str) -> None:
    """No more bytes than eager, freed by backward, and guarded against being overwritten."""
    f, e = ours(sample, torch.float32), eager(sample, torch.float32)
    assert saved_bytes(f) <= saved_bytes(e)
    tensors = [t * 1 for t in f.tensors]
    references = [weakref.ref(t) for t in tensors]
    loss = f(*tensors).sum()
    del tensors
    loss.backward()
    deadline = time.monotonic() + 10  # on CUDA another thread runs backward, and may still be letting go of its last node
    gc.collect()
    while any(r() is not None for r in references):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    x, *rest = f.tensors
    x = x * 1
    loss = f(x, *rest).sum()
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


# ---- subsystems -----------------------------------------------------------------------------------------------------


@over(SAMPLES)
def test_opcheck(sample: Case, backend: str) -> None:
    f = ours(sample, torch.float32)
    for op, args in calls_of(f, f.tensors):
        fresh = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
        for argument, old, new in zip(op._schema.arguments, args, fresh, strict=False):
            if isinstance(old, Tensor) and old.is_floating_point() and not argument.alias_info:
                # Differentiate with respect to what a user can reach.
                new.requires_grad_(argument.name == "dy" or (old.is_leaf and old.requires_grad))
        torch.library.opcheck(op, fresh)


@over(FIRST, "torch")
def test_autocast(sample: Case, backend: str) -> None:
    f, e = ours(sample, torch.float32), eager(sample, torch.float32)
    tensors = f.tensors
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got, want = f(*tensors), e(*tensors)
        got_compiled = compiled(f)(*tensors)
    assert got.dtype == want.dtype == got_compiled.dtype
    close(got, want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got.float().sum(), tensors))


def check_compiled(sample: Case, compiler: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    bound = ours(sample, torch.float32)
    f = torch.compile(lambda *t: bound(*t).sin(), fullgraph=True, backend=compiler, dynamic=dynamic)
    for layout in ("contiguous", "channels_last"):
        tensors = [LAYOUTS[layout](t.detach()).requires_grad_() for t in bound.tensors]
        plain = bound(*tensors).sin()
        assert f(*tensors).stride() == plain.stride()
        close(
            with_gradients(f, tensors, COTANGENTS["stride 0"]),
            with_gradients(lambda *t: bound(*t).sin(), tensors, COTANGENTS["stride 0"]),
        )


@pytest.mark.parametrize("dynamic", [False, True])
@over(NONEMPTY, "torch")
def test_compile(sample: Case, backend: str, dynamic: bool) -> None:
    check_compiled(sample, "aot_eager", dynamic)


@over(FIRST, "torch")
def test_compile_with_inductor(sample: Case, backend: str) -> None:
    check_compiled(sample, "inductor", dynamic=False)


@over(FIRST, "triton")
def test_compile_around_the_kernels(sample: Case, backend: str) -> None:
    torch._dynamo.reset()
    bound = ours(sample, torch.float32)
    f = torch.compile(bound, fullgraph=True, backend="aot_eager")
    g = COTANGENTS["stride 0"]
    close(with_gradients(f, bound.tensors, g), with_gradients(bound, bound.tensors, g))


@over(FIRST, "torch")
def test_export(sample: Case, backend: str) -> None:
    bound = ours(sample, torch.float32)

    class Model(torch.nn.Module):
        def forward(self, tensors: tuple[Tensor, ...]) -> Tensor:
            return bound(*tensors)

    tensors = tuple(t.detach() for t in bound.tensors)
    program = torch.export.export(Model(), (tensors,))
    assert any(getattr(n.target, "namespace", "") == NAMESPACE for n in program.graph.nodes)
    close(program.module()(tensors), bound(*tensors))


@pytest.mark.parametrize("sample", FIRST, ids=id_of)
def test_compile_and_export_in_auto(sample: Case) -> None:
    """What a public function asks before it calls aten must not reach the tracer."""
    torch._dynamo.reset()
    bound = ours(sample, torch.float32)
    f = torch.compile(bound, fullgraph=True, backend="eager")
    g = COTANGENTS["stride 0"]
    close(with_gradients(f, bound.tensors, g), with_gradients(bound, bound.tensors, g))

    class Model(torch.nn.Module):
        def forward(self, tensors: tuple[Tensor, ...]) -> Tensor:
            return bound(*tensors)

    tensors = tuple(t.detach() for t in bound.tensors)
    program = torch.export.export(Model(), (tensors,), strict=True)
    close(program.module()(tensors), bound(*tensors))


@over(NONEMPTY, "torch")
def test_flops(sample: Case, backend: str) -> None:
    """As torch's formula counts them, or where a family says that it is wrong (COUNTER_DIFFERS), as the case's own."""
    counts = []
    for bound in (ours(sample, torch.float32), eager(sample, torch.float32)):
        with FlopCounterMode(display=False) as counter:
            bound(*bound.tensors).sum().backward()
        counts.append(counter.get_total_flops())
    if hasattr(FAMILIES[sample.op], "COUNTER_DIFFERS"):
        assert sample.flops is not None
        counts[1] = sample.flops("train", 4)
    assert counts[0] == counts[1]


@over(FIRST, "torch")
def test_modes(sample: Case, backend: str) -> None:
    f, r = ours(sample), reference(sample)
    tensors = f.tensors
    want = with_gradients(r, tensors, COTANGENTS["stride 0"])
    y = torch.utils.checkpoint.checkpoint(f, *tensors, use_reentrant=False)
    close((y, *torch.autograd.grad(y, tensors, COTANGENTS["stride 0"](y))), want)
    with torch.inference_mode():
        close(f(*tensors), want[0])
    y = f(*[t.detach() for t in tensors])
    y += 1  # a fresh tensor, not a view: users may write to it
    assert y.grad_fn is None
    assert type(f(*tensors).grad_fn).__name__.rstrip("0").endswith("Backward")  # aten counts its overloads


@over(FIRST, "torch")
def test_meta_tensors(sample: Case, backend: str) -> None:
    tensors = sample.inputs(torch.float32)
    on_meta = [t.detach().to("meta") for t in tensors]
    y, want = sample.call(implementation(sample.op), *on_meta), sample.call(implementation(sample.op), *tensors)
    assert y.is_meta and y.shape == want.shape and y.stride() == want.stride()


@over(FIRST, "triton")
def test_threads(sample: Case, backend: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    f = ours(sample, torch.float32)
    want = f(*f.tensors)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: f(*f.tensors), range(12)):
            close(got, want, rtol=0, atol=0)


def test_every_op_is_documented_and_explained() -> None:
    for op, family in FAMILIES.items():
        assert family.eager.__doc__ or family.CASES, op
        assert len(implementation(op).__doc__ or "") > 200
    for name, op in REGISTRY.items():
        assert callable(op.floor("torch").explain), name


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("sample", NONEMPTY, ids=id_of)
def test_explain_tells_what_auto_runs(sample: Case, with_gradients: bool) -> None:
    f = ours(sample, torch.float32)
    tensors = f.tensors if with_gradients else [t.detach() for t in f.tensors]
    explained = Bound(sample, functools.partial(dlaccel.explain, sample.op), torch.float32)
    kernel = explained(*tensors).kernel
    LAUNCHES.clear()
    f(*tensors)
    assert (kernel == "aten") == (not LAUNCHES)


@over(FIRST, "torch")
def test_compiled_autograd(sample: Case, backend: str) -> None:
    f = ours(sample, torch.float32)
    tensors = f.tensors
    want = with_gradients(f, tensors, COTANGENTS["stride 0"])
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        f(*tensors).backward(COTANGENTS["stride 0"](want[0]))
    close([t.grad for t in tensors], want[1:])
