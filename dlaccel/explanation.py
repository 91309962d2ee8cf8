"""`explain`: what a call would run on, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dlaccel import functional
from dlaccel.backend import decide
from dlaccel.ops._common import Explaining
from dlaccel.ops._register import NAMESPACE, REGISTRY, Op

_read: Any = torch.ops.aten._local_scalar_dense.default  # Tensor.item and bool(tensor); 0 says that no value is special


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is one sentence."""

    op: str
    backend: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} runs on {self.backend} ({self.kernel}), because {self.reason}"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend and kernel would run `op(*args, **kwargs)`, and why; nothing is computed.

    The tensors' values are not looked at: what runs instead where they are NaN or infinite is not told.

    op: a function of `dlaccel.functional`, or its name; or the name of a registered operator `torch.ops.dlaccel.<name>` with
    that operator's positional arguments, of which missing ones take their defaults. A function that calls several operators
    is explained in the order of the calls.

    >>> str(explain("linear_relu", x, weight))
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name in functional.__all__:
        found = _explained(getattr(functional, name), args, kwargs)
    elif name in REGISTRY:
        declaration = REGISTRY[name]
        declaration.check(*declaration.filled(args))
        found = [_explanation(declaration, args)]
    else:
        raise ValueError(f"op: expected one of {', '.join(sorted({*REGISTRY, *functional.__all__}))}, got {name!r}")
    if not found:
        return Explanation(name, "torch", "aten", "on the CPU, aten is as fast for this call")
    if len(found) == 1:
        return Explanation(name, found[0].backend, found[0].kernel, found[0].reason)
    backends = " and ".join(dict.fromkeys(e.backend for e in found))
    return Explanation(
        name, backends, "; ".join(f"{e.op}: {e.kernel}" for e in found), "; ".join(dict.fromkeys(e.reason for e in found))
    )


def _explanation(op: Op, args: tuple[Any, ...]) -> Explanation:
    args = op.filled(args)
    backend, reason = decide(op, args)
    return Explanation(op.name, backend, op.floor(backend).explain(op.name, *args), reason)


def _explained(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Explanation]:
    """What the operators of one call would run on. The first sees the caller's tensors, later ones fake results of it."""
    from torch._subclasses import FakeTensor, FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    callers = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    found: list[Explanation] = []

    class Recorder(Explaining):
        plain = (Tensor, FakeTensor)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # Other real tensors belong to probes, which must run, for their answers are kept.
            ours = tree_map_only(Tensor, lambda t: fake.from_tensor(t) if id(t) in callers else t, (args, kwargs or {}))
            if func is _read and isinstance(ours[0][0], FakeTensor):
                return 0
            outputs = func(*ours[0], **ours[1])
            if func.namespace == NAMESPACE:
                found.append(_explanation(REGISTRY[func._opname], args))
            return outputs

    with Recorder():  # type: ignore[no-untyped-call]
        function(*args, **kwargs)
    return found
