"""The conformance runner accepts torch itself and refuses planted faults."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from tests import conformance
from tests.conformance import DTYPES

NAMES = {
    "nn.functional.linear": (F.linear, 100),
    "nn.functional.cross_entropy": (F.cross_entropy, 120),
    "nn.functional.batch_norm": (F.batch_norm, 60),
    "nn.functional.conv1d": (F.conv1d, 50),
    "nn.functional.conv2d": (F.conv2d, 150),
}
MODULES = {"nn.Linear": 18, "nn.CrossEntropyLoss": 300, "nn.BatchNorm2d": 36, "nn.Conv2d": 20}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_torch_conforms_to_itself(name, dtype):
    function, at_least = NAMES[name]
    conformance.check_function(name, function, dtype, at_least=at_least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_torch_modules_conform_to_themselves(name, dtype):
    conformance.check_module(name, getattr(torch.nn, name[3:]), dtype, at_least=MODULES[name])


def test_torch_errors():
    conformance.check_errors("nn.functional.conv2d", F.conv2d, at_least=8)
    conformance.check_module_errors("nn.BatchNorm2d", torch.nn.BatchNorm2d, at_least=2)


def without_ignored_rows(*args, ignore_index=-100, **kwargs):
    x, target = args[:2]
    if not target.is_floating_point():
        target = target.clamp(0, x.shape[min(1, x.dim() - 1)] - 1)
    return F.cross_entropy(x, target, *args[2:], **kwargs)


class _LosesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.flatten(0, -2).mT @ x.flatten(0, -2) if g.dim() > 1 else g[:, None] * x, None


def no_bias_gradient(x, weight, bias=None):
    return _LosesGradient.apply(x, weight, bias)


def other_momentum(x, mean, var, *args, momentum=0.1, **kwargs):
    return F.batch_norm(x, mean, var, *args, momentum=momentum * 1.01, **kwargs)


class _CutsTheSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.detach()


def writes_its_input(x, weight, bias=None):
    y = F.linear(x, weight, bias)
    weight.data.mul_(2)  # unseen by autograd, as a kernel's write would be
    return y


PLANTED = [
    ("nn.functional.cross_entropy", without_ignored_rows, "result error"),
    ("nn.functional.linear", no_bias_gradient, "gradient of input 2 is None"),
    ("nn.functional.batch_norm", other_momentum, "updated input 1 error"),
    ("nn.functional.linear", writes_its_input, "input 1 was changed"),
    ("nn.functional.linear", lambda *a: _CutsTheSecondDerivative.apply(F.linear(*a)), "second derivative"),
    ("nn.functional.linear", lambda *a: F.linear(*a).float(), "result has dtype"),
    ("nn.functional.linear", lambda *a: F.linear(*a).detach(), "requires_grad"),
    ("nn.functional.conv2d", lambda *a, **k: F.conv2d(*a, **{**k, "groups": 3}), "raised RuntimeError"),
]


@pytest.mark.parametrize("name, function, message", PLANTED)
def test_planted_fault(name, function, message):
    with pytest.raises(AssertionError, match=message):
        conformance.check_function(name, function, torch.float64, at_least=1)


def test_a_stride_fault_is_found():
    def takes_strides_for_granted(x, weight, bias=None):
        flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.detach().untyped_storage(), x.storage_offset(), x.shape)
        return F.linear(x + (flat - x).detach(), weight, bias)

    with pytest.raises(AssertionError, match="result"):
        conformance.check_function("nn.functional.linear", takes_strides_for_granted, torch.float32, at_least=1)


def test_few_cases_are_noticed():
    with pytest.raises(AssertionError, match="0 cases ran"):
        conformance.check_function("nn.functional.linear", F.linear, torch.float32, at_least=1, adapt=lambda a, k: None)
    with pytest.raises(AssertionError, match="0 cases ran"):
        conformance.check_errors("nn.functional.linear", F.linear, at_least=1)


def test_missing_errors_are_noticed():
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        conformance.check_errors("nn.functional.conv2d", lambda *a, **k: None, at_least=1)


class OtherState(torch.nn.BatchNorm2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("extra", torch.zeros(1))


class ForgetsTheCounter(torch.nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()
        return y


@pytest.mark.parametrize("module, message", [(OtherState, "extra"), (ForgetsTheCounter, "num_batches_tracked differs")])
def test_planted_fault_in_a_module(module, message):
    with pytest.raises(AssertionError, match=message):
        conformance.check_module("nn.BatchNorm2d", module, torch.float32, at_least=1)


def test_torchs_helpers_leave_the_process_alone():
    """torch.testing._internal loads a Hypothesis profile and freezes torch.backends.* when it is imported."""
    conformance._tables()
    assert not torch.backends.flags_frozen()
    if (hypothesis := sys.modules.get("hypothesis")) is not None:
        assert hypothesis.settings.get_current_profile_name() in ("ci", "deep")


def test_which_backend_ran_is_checked():
    import dlaccel

    with dlaccel.use_backend("torch"), pytest.raises(AssertionError, match="operators that ran"):
        conformance.check_function("nn.functional.linear", F.linear, torch.float32, at_least=1)
