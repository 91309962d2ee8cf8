"""One declaration per operator: `Op(...).register()` makes it known to every PyTorch subsystem.

An op takes positional arguments, no Tensor[], and returns fresh tensors; its first argument decides the backend. The
dispatcher drops trailing arguments equal to their defaults; here they are put back, so every declared function gets all.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.compiler.config
from torch import _C, Tensor

from dlaccel import backend
from dlaccel._version import __version__
from dlaccel.ops import _autograd

NAMESPACE = "dlaccel"
LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # its registrations die with this object
REGISTRY: dict[str, Op] = {}  # by operator name; the contract tests loop over it
LAUNCHES: Counter[tuple[str, str]] = Counter()  # (op, backend): how often it ran there

# Subsystems that are slow to import get their rules when somebody imports them. Without its rule FlopCounterMode counts 0
# and DTensor raises.
FLOPS, SHARDING = "torch.utils.flop_counter", "torch.distributed.tensor"
_waiting: dict[str, list[Callable[[], object]]] = {FLOPS: [], SHARDING: []}

# aten's three autocast lists: (active autocast dtype, dtypes of the arguments) -> the dtype to cast to.
_AUTOCAST: dict[str, Callable[[torch.dtype, list[torch.dtype]], torch.dtype]] = {
    "lower": lambda lower, dtypes: lower,
    "fp32": lambda lower, dtypes: torch.float32,
    "promote": lambda lower, dtypes: torch.float32 if torch.float32 in dtypes else lower,
}

# AOTAutograd's on-disk cache does not hash our formulas: without the tag a new version gets the old one's gradients.
torch.compiler.config.cache_key_tag += f";{NAMESPACE}-{__version__}"


@dataclass(eq=False, kw_only=True)
class Op:
    """A differentiable operator. See docs/architecture.md, contract 1."""

    module: str  # __name__ of the declaring file: its last part names the file on every floor
    schema: str
    check: Callable[..., None]  # plain `if bad: raise`, on real and fake tensors alike
    fake: Callable[..., Any]  # uninitialised outputs with the shapes, dtypes and strides of the real ones
    saved: Callable[[tuple[Any, ...], Any], Sequence[Tensor | None]]  # (args, outputs) -> ctx.saved_tensors
    backward: Callable[..., Sequence[Tensor | None]]  # (ctx, *grads) -> gradients of the leading arguments; see ctx.wanted
    jvp: Callable[..., Any] | None = None  # (ctx, *tangents) -> a tangent per output; ctx.options: non-tensor arguments
    non_differentiable: tuple[int, ...] = ()  # outputs without a gradient
    vmap: Callable[..., tuple[Any, Any]] | None = None  # as for torch.library.register_vmap; default: a call per sample
    owned: int | None = None  # the output that backward may write to: ctx.owned, of which the caller must keep nothing
    # "lower", "fp32", "promote", or a function from the arguments to those to run with; None: the dtypes that come
    autocast: str | Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    flops: Callable[..., int] | None = None  # (*arguments, a shape for each tensor) -> FLOPs
    sharding: Callable[..., list[Any]] | None = None  # as for torch.distributed.tensor.experimental.register_sharding
    unsupported: Callable[..., str | None] | None = None  # why the Triton kernel cannot take a call
    prefers_torch: Callable[..., str | None] | None = None  # why `auto` keeps torch although the kernel could run
    has_kernel: bool = True
    name: str = field(init=False)
    filled: Callable[[tuple[Any, ...]], tuple[Any, ...]] = field(init=False)  # args with trailing defaults put back

    def floor(self, backend_name: str) -> Any:
        """The module of this op's kernels on a backend, imported when first needed."""
        return _floor("kernels" if backend_name == "triton" else "fallback", self.module.rpartition(".")[2])

    def register(self) -> Any:
        """Define torch.ops.dlaccel.<name>; returns the overload, for the public function to call."""
        self.name = name = self.schema.partition("(")[0]
        LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        defaults = tuple(a.default_value for a in op._schema.arguments)
        mutated = [i for i, a in enumerate(op._schema.arguments) if a.alias_info]

        def filled(args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args if len(args) == len(defaults) else (*args, *defaults[len(args) :])

        self.filled = filled

        def checked(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                args = filled(args)
                self.check(*args)
                return function(*args)

            return call

        def padded(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **_: function(*filled(args))

        implementation = checked(self._launcher(mutated))
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")  # every device
        LIBRARY.impl(name, _autograd.kernel(self, op, implementation), "Autograd", with_keyset=True)
        torch.library.register_fake(op, checked(self.fake), lib=LIBRARY)
        torch.library.register_vmap(op, self.vmap or _one_call_per_sample(op, mutated), lib=LIBRARY)
        if self.autocast is not None:
            for device in ("cpu", "cuda", "xpu"):
                _register_autocast(op, self.autocast, filled, device)
        if self.flops is not None:
            flops = padded(self.flops)
            _waiting[FLOPS].append(lambda: _attribute(FLOPS, "register_flop_formula")(op.overloadpacket)(flops))
        if self.sharding is not None:
            sharding = padded(self.sharding)
            _waiting[SHARDING].append(lambda: _register_sharding(op, sharding))
        for subsystem in _waiting.keys() & sys.modules.keys():
            _activate(subsystem)
        REGISTRY[name] = self
        return op

    def _launcher(self, mutated: list[int]) -> Callable[..., Any]:
        @functools.cache
        def function(backend_name: str) -> Callable[..., Any]:
            f: Callable[..., Any] = getattr(self.floor(backend_name), self.name)
            return f

        def launch(*args: Any) -> Any:
            chosen = backend.choose(self, args)
            outputs = function(chosen)(*args)
            LAUNCHES[self.name, chosen] += 1
            if mutated:  # autograd sees no write through a pointer: it would use an overwritten saved tensor
                written = [args[i] for i in mutated if args[i] is not None and not args[i].is_inference()]
                torch.autograd.graph.increment_version(written)
            return outputs

        return launch


@functools.cache
def _floor(room: str, name: str) -> Any:
    return importlib.import_module(f"dlaccel.{room}.{name}")


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _activate(subsystem: str) -> None:
    """Hand an imported subsystem the rules that wait for it."""
    while _waiting[subsystem]:
        _waiting[subsystem].pop()()


def _register_sharding(op: Any, rule: Callable[..., Any]) -> None:
    """Register the rule, and that its answers depend on the options behind the tensors: DTensor caches them by its key."""
    _attribute(f"{SHARDING}.experimental", "register_sharding")(op)(rule)
    first = next((i for i, a in enumerate(op._schema.arguments) if "Tensor" not in str(a.type)), len(op._schema.arguments))
    info = _attribute(f"{SHARDING}._op_schema", "RuntimeSchemaInfo")(first, needs_pytree=True)
    _attribute(SHARDING, "DTensor")._op_dispatcher.sharding_propagator.op_to_schema_info[op] = info


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds a subsystem as the finders behind it do, and activates it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in _waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec: Any = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_activate(module: Any) -> None:
                load(module)
                _activate(name)

            spec.loader.exec_module = load_and_activate
        return spec


sys.meta_path.insert(0, _AfterImport())


def _register_autocast(op: Any, rule: str | Callable[..., Any], filled: Callable[..., Any], device: str) -> None:
    key = f"Autocast{_C._dispatch_key_for_device(device)}"
    excluded = _C.DispatchKeySet(getattr(_C.DispatchKey, key))
    guard: Any = _C._ExcludeDispatchKeyGuard

    def eligible(a: Any) -> bool:  # as in aten: float64 and tensors of other devices are left alone
        return isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 and a.device.type == device

    def cast(args: tuple[Any, ...]) -> Any:
        dtype = _AUTOCAST[str(rule)](torch.get_autocast_dtype(device), [a.dtype for a in args if eligible(a)])
        return [a.to(dtype) if eligible(a) else a for a in args]

    def kernel(*args: Any) -> Any:
        with guard(excluded):
            return op(*(rule(filled(args)) if callable(rule) else cast(args)))

    LIBRARY.impl(op._opname, kernel, key)


def _one_call_per_sample(op: Any, mutated: list[int]) -> Callable[..., tuple[Any, Any]]:
    """The default vmap rule: right for every op, slow for many samples."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        batched = [isinstance(d, int) for d in in_dims]
        if any(args[i] is not None and not batched[i] for i in mutated):
            raise RuntimeError(f"vmap: {op} would write every sample to the same tensor: batch it too")
        slices = [a.unbind(d) if b else (a,) * info.batch_size for a, d, b in zip(args, in_dims, batched, strict=True)]
        results = [op(*sample) for sample in zip(*slices, strict=True)]
        if not isinstance(results[0], tuple):
            return torch.stack(results), 0
        outputs = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True))
        return outputs, tuple(None if o is None else 0 for o in outputs)

    return rule
