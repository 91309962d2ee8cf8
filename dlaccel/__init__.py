"""dlaccel: hand-written Triton kernels for the layers that made deep networks trainable, as PyTorch operators.

    from dlaccel import functional as F, nn

`import dlaccel` imports neither Triton nor CUDA state; both wait for the first tensor that needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dlaccel import functional as functional
from dlaccel import nn as nn
from dlaccel._version import __version__ as __version__
from dlaccel.backend import use_backend as use_backend
from dlaccel.explanation import explain as explain

if TYPE_CHECKING:
    from dlaccel import convert as convert
    from dlaccel.bench.tune import tune as tune

__all__ = ["__version__", "convert", "explain", "functional", "nn", "tune", "use_backend"]


def __getattr__(name: str) -> Any:
    if name == "convert":
        return importlib.import_module("dlaccel.convert")
    if name == "tune":  # the one name that needs the benchmarks
        from dlaccel.bench.tune import tune

        return tune
    raise AttributeError(f"module 'dlaccel' has no attribute {name!r}")
