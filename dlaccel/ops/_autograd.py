"""The kernel of an op at the Autograd dispatch key.

torch.library.register_autograd would be shorter, but it fails under torch.func.grad, gives a silent zero in forward-mode
differentiation when no input requires grad, refuses mutable schemas, and costs more per call (pytorch issues 168393, 170834,
179652). The private names below exist in torch 2.11 to 2.13; should one go, the import fails: better than a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import _C
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

if TYPE_CHECKING:
    from dlaccel.ops._register import Op

_below: Any = _C._AutoDispatchBelowAutograd
_after: Any = _C._after_autograd_keyset
_functorch_active = _C._are_functorch_transforms_active
_any_requires_grad: Any = _C._any_requires_grad
# Nothing but a dense tensor's kernel is left to be called: what the dispatcher would do, without its 2 us.
_DENSE = {_C.DispatchKeySet(getattr(_C.DispatchKey, device)).raw_repr() for device in ("CPU", "CUDA")}


def transformed() -> bool:
    """Whether a torch.func transform or a forward-mode level is active."""
    return _functorch_active() or forward_ad._current_level >= 0


def kernel(declaration: Op, overload: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    redispatch, arguments, filled = overload.redispatch, overload._schema.arguments, declaration.filled
    options = [i for i, a in enumerate(arguments) if "Tensor" not in str(a.type)]
    no_gradients = (None,) * (1 + len(arguments))  # the first is the key set's

    def below(keyset: Any, *args: Any) -> Any:
        rest = keyset & _after
        with _below():
            return implementation(*args) if rest.raw_repr() in _DENSE else redispatch(rest, *args)

    class Node(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            if _functorch_active():  # Function has switched these modes off: the level below would see constants
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    outputs = below(keyset, *args)
            else:
                outputs = below(keyset, *args)
            tensors = declaration.saved(args, outputs)
            ctx.save_for_backward(*tensors)
            if transformed():
                ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)
            ctx.options = [args[i] for i in options]
            ctx.owned = None if declaration.owned is None else outputs[declaration.owned]
            if declaration.non_differentiable:
                ctx.mark_non_differentiable(*[outputs[i] for i in declaration.non_differentiable])
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if grads[0] is None and all(g is None for g in grads):
                return no_gradients
            ctx.wanted = ctx.needs_input_grad[1:]
            gradients = declaration.backward(ctx, *grads)
            return None, *gradients, *no_gradients[1 + len(gradients) :]

        @staticmethod
        def _compiled_autograd_key(ctx: Any) -> tuple[int]:
            return (ctx._autograd_function_id,)

        @staticmethod
        def jvp(ctx: Any, _keyset: Any, *tangents: Any) -> Any:
            if declaration.jvp is None:
                raise NotImplementedError(f"{declaration.name} has no forward-mode derivative")
            return declaration.jvp(ctx, *tangents)

    for cls in (Node, Node._backward_cls):  # type: ignore[attr-defined]  # grad_fn and the profiler show these names
        cls.__name__ = cls.__qualname__ = f"{declaration.name}Backward"
    apply: Any = Node.apply  # type: ignore[attr-defined]

    def call(keyset: Any, *args: Any) -> Any:
        if _functorch_active():
            with enable_single_level_autograd_function():
                return apply(keyset, *filled(args))
        if (torch.is_grad_enabled() and _any_requires_grad(*args)) or forward_ad._current_level >= 0:
            return apply(keyset, *filled(args))
        return below(keyset, *args)

    return call
