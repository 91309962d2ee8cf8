"""What several declarations need."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from dlaccel.ops._autograd import transformed

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
is_compiling: Callable[[], bool] = torch.compiler.is_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


class Explaining(TorchDispatchMode):
    """The mode of `explain`, under which a public function decides as it does without."""

    plain: tuple[type, ...] = (Tensor,)  # types of the tensors that stand for plain ones


def plain(x: Tensor) -> bool:
    """Whether a public function may look at x and call aten instead of our operator: no subclass, transform, tracer or mode."""
    if is_compiling() or transformed():
        return False
    if not _dispatch_modes():
        return type(x) is Tensor
    mode = _get_current_dispatch_mode()
    return isinstance(mode, Explaining) and type(x) in mode.plain


def described(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not None, or None."""
    given = [t for t in terms if t is not None]
    return sum(given[1:], given[0]) if given else None


def as_2d(t: Tensor) -> Tensor:
    """(*, K) -> (prod(*), K); reshape(-1, K) fails for K = 0, and flatten has no rule for batched gradients."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def at_front(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """t with its vmap dimension first; a tensor that is not batched is expanded."""
    if t is None:
        return None
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
