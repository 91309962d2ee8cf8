"""dlaccel's own functions, on the backend that DLACCEL_BACKEND names (the command line's --backend)."""

import importlib

from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.case import implementation as public
from dlaccel.bench.provider import Unavailable

NAME = "dlaccel"
DISTRIBUTION = "dlaccel"


def available() -> str | None:
    return None


def implementation(case: Case) -> Function:
    try:
        return public(case.op)
    except AttributeError:
        raise Unavailable(f"dlaccel.functional has no {case.op}") from None


def backend(case: Case, tensors: tuple[Tensor, ...]) -> str:
    explain = importlib.import_module("dlaccel").explain
    return str(case.call(lambda *args, **_: explain(case.op, *args).backend, *tensors))
