"""Hypothesis strategies for tensors: sizes at the edges of a block, layouts drawn for each tensor on its own, special values.

    from tests.strategies import given, sizes, st, tensors, DTYPES

    @given(st.data())
    def test_fuzz(backend, data):
        m, n, dtype = data.draw(sizes()), data.draw(sizes()), data.draw(st.sampled_from(DTYPES))
        x = data.draw(tensors((m, n), dtype)).requires_grad_()
        g = data.draw(tensors((m, n), dtype))
        with poisoned():
            check(ours, eager, [x], g, reference=reference)

What is drawn is a seed, a layout and a class of values, never numbers: examples shrink to small shapes and plain layouts. Use a
composite strategy where a failing example should print its parts. The profile (`ci` or `deep`, conftest.py) sets the number of
examples; do not lower it: the mutants need 100 (60 miss one). Without Hypothesis, decorated tests skip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit import DEVICE, LAYOUTS

try:
    from hypothesis import assume, example, given, note, settings
    from hypothesis import strategies as st
except ImportError:

    class _Nothing:
        """Stands for any strategy, so that modules which define some can be imported."""

        def __getattr__(self, name: str) -> _Nothing:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
            return self

    def given(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return pytest.mark.skip(reason="Hypothesis is not installed")

    def settings(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return lambda test: test

    example = settings
    assume = note = st = _Nothing()

__all__ = ["DTYPES", "assume", "example", "given", "note", "settings", "sizes", "st", "tensors"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if DEVICE == "cpu" else []))
_SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e4, -1e4, 1.0)


def sizes(block: int = 32, smallest: int = 0) -> Any:
    """0 to 5, and up to two blocks, each a little less, exactly and a little more. `block`: the interpreter's."""
    edges = (block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1)
    return st.sampled_from([n for n in (0, 1, 2, 3, 4, 5, *edges) if n >= smallest])


@st.composite
def tensors(
    draw: Any,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layouts: Sequence[str] = tuple(LAYOUTS),
    special: bool = False,
) -> Tensor:
    """Standard normal numbers in one of `layouts`; with `special`, half of the tensors have zeros of both signs, infinities,
    NaN, large and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    t = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
    if special and draw(st.booleans()):
        values = torch.tensor([*_SPECIAL, torch.finfo(dtype).tiny / 2], dtype=torch.float64).to(dtype)
        chosen = values[torch.randint(len(values), t.shape, generator=generator)]
        t = torch.where(torch.rand(t.shape, generator=generator) < 0.3, chosen, t)
    return LAYOUTS[draw(st.sampled_from(list(layouts)))](t.to(DEVICE))
