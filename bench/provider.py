"""The libraries that are compared: one module each in bench/providers.

A module defines

    NAME                      as in the results
    available() -> str | None why the library cannot be used here, or None; never raises
    implementation(case)      a function with the signature of dlaccel.functional.<case.op>, or raises Unavailable(reason)

and may define

    DISTRIBUTION              the package whose version is recorded
    DTYPES, MODES, DEVICES    what it can do; default: everything
    OVERWRITES                the ops whose inputs the library documents to overwrite; elsewhere that is a failure
    TRITON                    True if it launches Triton kernels (without a GPU `verify` interprets them)
    context()                 a context manager around each call, forward and backward, outside the clock
    backend(case, tensors)    which of its backends the call takes, for the table

The library is imported inside the functions, so that one that is missing or broken disturbs nothing else. Any Python file that
defines these names can be compared: `--provider path/to/file.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.results import package_version

FOLDER = Path(__file__).parent / "providers"
NOT_HERE = "not here: "  # begins the reason of a row whose provider is not installed or cannot run on this machine


class Unavailable(Exception):
    """This provider has nothing for this case. May also be raised by the implementation when it sees the arguments."""


def need(condition: bool, reason: str) -> None:
    """Raises Unavailable(reason) unless the condition holds."""
    if not condition:
        raise Unavailable(reason)


def importable(*modules: str) -> str | None:
    """Why one of the modules cannot be imported, or None."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # libraries raise anything at import when no GPU is there
            return f"import {name}: {type(error).__name__}: {error}".splitlines()[0]
    return None


@contextmanager
def switched(settings: Any, **values: Any) -> Iterator[None]:
    """Settings of torch.backends.<library> for a while. Its own flags() also resets others, and fails beside fp32_precision."""
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def pick(case: Case, **functions: Function) -> Function:
    """The function of that name, or Unavailable."""
    need(case.op in functions, f"has no {case.op}")
    return functions[case.op]


class Provider:
    """A provider module, with the defaults filled in."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.name: str = module.NAME
        self.implementation: Callable[[Case], Function] = module.implementation

    def _get(self, name: str, default: Any) -> Any:
        return getattr(self.module, name, default)

    def available(self) -> str | None:
        try:
            reason: str | None = self.module.available()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return reason

    @property
    def version(self) -> str:
        return package_version(self._get("DISTRIBUTION", "")) if self._get("DISTRIBUTION", "") else ""

    def unsupported(self, mode: str, dtype: str, device: str) -> str | None:
        """Why it cannot do this, or None."""
        for what, value in (("MODES", mode), ("DTYPES", dtype), ("DEVICES", device)):
            known = self._get(what, (value,))
            if value not in known:
                return f"has no {value}, only {', '.join(known)}"
        return None

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(self._get("MODES", ("fwd", "bwd", "train", "dgrad", "wgrad")))

    @property
    def triton(self) -> bool:
        return bool(self._get("TRITON", False)) or (self.name == "dlaccel" and os.environ.get("DLACCEL_BACKEND") == "triton")

    def may_overwrite(self, op: str) -> bool:
        return op in self._get("OVERWRITES", ())

    def context(self) -> AbstractContextManager[Any]:
        return cast(AbstractContextManager[Any], self._get("context", nullcontext)())

    def backend(self, case: Case, tensors: tuple[Tensor, ...]) -> str:
        try:
            return str(self._get("backend", lambda *_: "")(case, tensors))
        except Exception as error:
            return f"unknown ({type(error).__name__})"


def names() -> list[str]:
    """The providers that come with dlaccel; ours and eager first."""
    found = {m.name for m in pkgutil.iter_modules([str(FOLDER)])}
    return [*(n for n in ("dlaccel", "eager") if n in found), *sorted(found - {"dlaccel", "eager"})]


def load(name: str) -> Provider:
    """The provider of that name, or of that file if it ends in .py. Raises ValueError for an unknown one."""
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"unknown provider {name!r}; known: {', '.join(names())}, or a path ending in .py")
    spec = importlib.util.spec_from_file_location(f"dlaccel.bench.providers.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Provider(module)
