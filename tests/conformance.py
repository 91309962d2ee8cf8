"""torch's own tables of samples (OpInfo, ModuleInfo), run on a function or module of ours in place of torch's.

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_conformance(backend, dtype):
        conformance.check_function("nn.functional.cross_entropy", F.cross_entropy, dtype, at_least=100)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_module_conformance(backend, dtype):
        conformance.check_module("nn.CrossEntropyLoss", nn.CrossEntropyLoss, dtype, at_least=300)

    def test_errors(backend):
        conformance.check_errors("nn.functional.conv2d", F.depthwise_conv2d, at_least=5, adapt=...)
        conformance.check_module_errors("nn.BatchNorm2d", nn.BatchNorm2d, at_least=2)

Each sample runs as the table has it and with non-contiguous tensors, for three seeds: torch reseeds before every sample unless
told not to, and then no sample of cross_entropy ignores a row. Compared, by `close_enough` against float64: the result, the
gradient of every input that wants one (and its dtype, or that it is None), in float64 the second derivatives, what the call did
to its inputs (running statistics change as torch's do, everything else stays), and the type of any exception. With the backend
forced, our operators must have run on it and on no other.

The tables are the net for semantics. They are too small to be the net for strides and block edges: that is strategies.py.

Arguments the four share:
    at_least    how many cases must have run, so that a table that shrank or a filter that dropped all is noticed. Never an
                exact number: counts differ between versions of torch.
    eager       torch's side where it is more than the table's function or module: linear_relu's is relu(F.linear(...)).
                For modules: a function of (torch's module, *inputs).
    adapt       (args, kwargs) -> (args, kwargs) for both sides, or None to leave a sample out
    terms       see close_enough: for samples whose results are small sums of large terms

Private API of torch, used here alone: tests that need a name torch no longer has are skipped, saying which.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dlaccel.bench.accuracy import close_enough
from tests.kit import DEVICE

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEEDS = (0, 1, 2)

Call = tuple[tuple[Any, ...], dict[str, Any]]
Adapt = Callable[[tuple[Any, ...], dict[str, Any]], Call | None]


@functools.cache
def _tables() -> Any:
    """Imported at the first use, which takes seconds. torch's helpers load a Hypothesis profile of their own: put back."""
    profile = sys.modules["hypothesis"].settings.get_current_profile_name() if "hypothesis" in sys.modules else None
    try:
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
    except ImportError as e:
        pytest.skip(f"torch's tables are not where they were: {e}")
    finally:
        if profile is not None:
            sys.modules["hypothesis"].settings.load_profile(profile)
    return SimpleNamespace(op_db=op_db, module_db=module_db, at_construction=ModuleErrorEnum.CONSTRUCTION_ERROR)


def as_is(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    return args, kwargs


# ---- functions ------------------------------------------------------------------------------------------------------


def check_function(
    name: str,
    ours: Callable[..., Tensor],
    dtype: torch.dtype,
    *,
    at_least: int,
    eager: Callable[..., Tensor] | None = None,
    adapt: Adapt = as_is,
    terms: float = 0.0,
) -> None:
    """`ours` does what torch's function `name` does, on every sample of its OpInfo."""
    infos = [info for info in _tables().op_db if info.name == name and dtype in _dtypes(info)]
    if not infos:
        pytest.skip(f"torch's table has no {name} in {dtype} on {DEVICE}")
    with _ran_on_the_forced_backend():
        count = 0
        for info in infos:
            theirs = eager or info.op
            for index, (args, kwargs) in enumerate(_samples(info, dtype)):
                if (call := adapt(args, kwargs)) is not None:
                    _compare(
                        f"{name} sample {index}",
                        ours,
                        theirs,
                        theirs,
                        call,
                        _copy(call),
                        _copy(call, torch.float64),
                        dtype,
                        terms,
                    )
                    count += 1
    assert count >= at_least, f"{count} cases ran, expected at least {at_least}"


def check_errors(name: str, ours: Callable[..., Any], *, at_least: int, adapt: Adapt = as_is) -> None:
    """`ours` raises torch's type of error on every bad input of torch's function `name`."""
    count = 0
    for info in (info for info in _tables().op_db if info.name == name and info.error_inputs_func is not None):
        for error in info.error_inputs(DEVICE):
            sample = error.sample_input
            if (call := adapt((sample.input, *sample.args), sample.kwargs)) is not None:
                with pytest.raises(error.error_type):
                    ours(*call[0], **call[1])
                count += 1
    assert count >= at_least, f"{count} cases ran, expected at least {at_least}"


def _dtypes(info: Any) -> Any:
    return info.dtypes if DEVICE == "cpu" else info.dtypesIfCUDA


def _samples(info: Any, dtype: torch.dtype) -> Iterator[Call]:
    for seed in SEEDS:
        torch.manual_seed(seed)
        random.seed(seed)
        for sample in info.sample_inputs(DEVICE, dtype, requires_grad=True, set_seed=False):
            for s in (sample, sample.noncontiguous()):
                yield (s.input, *s.args), s.kwargs


# ---- modules --------------------------------------------------------------------------------------------------------


def check_module(
    name: str,
    ours: Callable[..., torch.nn.Module],
    dtype: torch.dtype,
    *,
    at_least: int,
    eager: Callable[..., Tensor] | None = None,
    adapt: Adapt = as_is,
    terms: float = 0.0,
) -> None:
    """`ours` does what torch's module `name` does, on every sample of its ModuleInfo, in training and evaluation.

    Same state_dict, loaded from torch's; result, gradients of inputs and parameters, and buffers afterwards. The samples are
    made in float32 where the table does not list `dtype`, then cast.
    """
    with _ran_on_the_forced_backend():
        count = 0
        for training, sample in _module_samples(name, dtype):
            made = [adapt(i.args, i.kwargs) for i in (sample.constructor_input, sample.forward_input)]
            if made[0] is None or made[1] is None:
                continue
            (args, kwargs), call = _copy(made[0], dtype), _copy(made[1], dtype)
            theirs = _module_class(name)(*args, **kwargs).to(DEVICE, dtype).train(training)
            mine, exact = ours(*args, **kwargs).to(DEVICE, dtype).train(training), _module_class(name)
            assert isinstance(mine, exact), f"{type(mine)} is no subclass of {exact}"
            exact = exact(*_copy((args, kwargs), torch.float64)[0], **_copy((args, kwargs), torch.float64)[1])
            exact = exact.to(DEVICE, torch.float64).train(training)
            names, expected = list(mine.state_dict()), list(theirs.state_dict())
            assert names == expected, f"state_dict has {names}, expected {expected}"
            mine.load_state_dict(theirs.state_dict())
            exact.load_state_dict(theirs.state_dict())
            what = f"{name}({args}, {kwargs}), {'training' if training else 'evaluation'}"
            _compare(
                what,
                mine,
                _bound(eager, theirs),
                _bound(eager, exact),
                call,
                _copy(call),
                _copy(call, torch.float64),
                dtype,
                terms,
                [dict(m.named_parameters()) | dict(m.named_buffers()) for m in (mine, theirs, exact)],
            )
            count += 1
    assert count >= at_least, f"{count} cases ran, expected at least {at_least}"


def check_module_errors(name: str, ours: Callable[..., torch.nn.Module], *, at_least: int) -> None:
    """`ours` raises torch's type of error, where torch's module `name` does: when it is made, or when it is called."""
    count = 0
    info = _module_info(name)
    if info.module_error_inputs_func is None:  # CrossEntropyLoss in torch 2.11
        pytest.skip(f"torch {torch.__version__} lists no errors of {name}")
    for training in (True, False):
        inputs = info.module_error_inputs_func(info, device=DEVICE, dtype=torch.float32, requires_grad=False, training=training)
        for error in inputs:
            made = error.module_error_input
            with pytest.raises(error.error_type):
                module = ours(*made.constructor_input.args, **made.constructor_input.kwargs)
                assert error.error_on != _tables().at_construction, f"{name} was made"
                module.to(DEVICE)(*made.forward_input.args, **made.forward_input.kwargs)
            count += 1
    assert count >= at_least, f"{count} cases ran, expected at least {at_least}"


def _module_info(name: str) -> Any:
    return next(info for info in _tables().module_db if info.module_cls is _module_class(name))


def _module_class(name: str) -> Any:
    return getattr(torch.nn, name.removeprefix("nn."))


def _module_samples(name: str, dtype: torch.dtype) -> Iterator[tuple[bool, Any]]:
    info = _module_info(name)
    listed = dtype if dtype in info.dtypes else torch.float32
    for seed in SEEDS:
        torch.manual_seed(seed)
        random.seed(seed)
        for training in (True, False):
            made = info.module_inputs_func(info, device=DEVICE, dtype=listed, requires_grad=True, training=training)
            for sample in made:
                yield training, sample


def _bound(eager: Callable[..., Tensor] | None, module: torch.nn.Module) -> Callable[..., Tensor]:
    return module if eager is None else lambda *args, **kwargs: eager(module, *args, **kwargs)


# ---- one case -------------------------------------------------------------------------------------------------------


def _compare(
    what: str,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    our_call: Call,
    eager_call: Call,
    exact_call: Call,
    dtype: torch.dtype,
    terms: float,
    states: list[dict[str, Tensor]] | None = None,
) -> None:
    """Run the three and compare all that they did."""
    sides = zip((ours, eager, exact), (our_call, eager_call, exact_call), states or [{}] * 3, strict=True)
    before = [t.detach().clone() for t in _tensors(our_call)]
    (e1, mine), (e2, theirs), (e3, truth) = (_outcome(*side, second_order=dtype == torch.float64) for side in sides)
    assert type(e1) is type(e2), f"{what}: raised {e1!r}, torch {e2!r}"
    assert type(e3) is type(e2), f"{what}: cannot be judged, in float64 torch raised {e3!r}"
    wrong = [f"{n} {w}" for n in truth if (w := close_enough(mine.get(n), theirs.get(n), truth[n], dtype, terms=terms))]
    for i, (old, t, u, v) in enumerate(zip(before, *map(_tensors, (our_call, eager_call, exact_call)), strict=True)):
        if _same(old, u):
            if not _same(old, t):
                wrong.append(f"input {i} was changed")
        elif w := close_enough(t, u, v, dtype, terms=terms):
            wrong.append(f"updated input {i} {w}")
    assert not wrong, f"{what}: " + "; ".join(wrong)


def _outcome(
    f: Callable[..., Tensor], call: Call, state: dict[str, Tensor], second_order: bool
) -> tuple[Exception | None, dict[str, Tensor | None]]:
    """The exception, or by name: result, gradients, in the end buffers."""
    args, kwargs = call
    leaves = {f"input {i}": t for i, t in enumerate(_tensors(call)) if t.requires_grad}
    leaves |= {n: t for n, t in state.items() if t.requires_grad}
    buffers = {n: t for n, t in state.items() if not t.requires_grad}
    try:
        y = f(*args, **kwargs)
    except Exception as error:
        return error, {}
    results: dict[str, Tensor | None] = {"result": y, "requires_grad": torch.tensor(y.requires_grad)}
    if y.requires_grad:
        g = _cotangent(y, 0).requires_grad_(second_order)
        first = torch.autograd.grad(y, [*leaves.values()], g, create_graph=second_order, allow_unused=True)
        results |= {f"gradient of {n}": d for n, d in zip(leaves, first, strict=True)}
        if second_order:
            leaves["the cotangent"] = g
            some = [d for d in first if d is not None and d.requires_grad]
            again = [_cotangent(d, i) for i, d in enumerate(some, 1)]
            second = torch.autograd.grad(some, [*leaves.values()], again, allow_unused=True, materialize_grads=True)
            results |= {f"second derivative by {n}": d for n, d in zip(leaves, second, strict=True)}
    return None, results | buffers


def _cotangent(y: Tensor, seed: int) -> Tensor:
    """The same numbers for every dtype, but for the rounding: bfloat16 numbers, exact in all."""
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return (g * 16).round().div(16).to(y.device, y.dtype)


def _tensors(call: Call) -> list[Tensor]:
    return [t for t in tree_leaves(call) if isinstance(t, Tensor)]


def _copy(call: Call, dtype: torch.dtype | None = None) -> Call:
    """The same call on leaves of its own with the same strides; floating-point tensors in `dtype`."""

    def copy(t: Tensor) -> Tensor:
        new = torch.empty(0, dtype=t.dtype, device=t.device)
        new.set_(t.untyped_storage().clone(), t.storage_offset(), t.size(), t.stride())  # clone() closes gaps
        return new.to(dtype if dtype is not None and t.is_floating_point() else t.dtype).requires_grad_(t.requires_grad)

    copied: Call = tree_map_only(Tensor, copy, call)
    return copied


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach()))


class _ran_on_the_forced_backend:
    """Fails unless the forced backend, and no other, ran our operators: a comparison of torch with torch proves nothing."""

    def __enter__(self) -> None:
        from dlaccel.ops._register import LAUNCHES

        LAUNCHES.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import dlaccel.backend
        from dlaccel.ops._register import LAUNCHES

        forced = dlaccel.backend.forced
        if kind is None and forced != "auto":
            assert {b for _, b in LAUNCHES} == {forced}, f"operators that ran: {dict(LAUNCHES)}"
