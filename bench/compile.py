"""Compile what a launcher would start, for any GPU and without one, and read the machine code.

    launches("linear_relu", "8192x4096x4096", torch.bfloat16, "sm_90")   the launches of a call, forward and backward
    compile_launches([(launch, "sm_90"), ...])                           a Report for each

The launchers run on `meta` tensors under `launch.recording()`. Triton then specialises the recorded arguments itself, under a
driver that only names the target, so what is compiled is what a GPU would be given. Spawned processes that never interpret
do it, and reports are cached by source, target, configuration and Triton version in DLACCEL_CACHE_DIR.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dlaccel.backend import use_backend
from dlaccel.bench.case import Case, families, implementation

# dlaccel.kernels is imported inside functions: a worker clears TRITON_INTERPRET first.
if TYPE_CHECKING:
    from dlaccel.kernels.launch import Launch


# --- from a case to launches ---


class NoKernel(Exception):
    """The Triton kernels do not take this call."""


class _OnKernels(TorchDispatchMode):
    """Runs every dlaccel operator by the launchers of its Triton kernels, whatever the device, and notes what it ran.

    A tensor that an operator writes is replaced by a copy: calls that are noted may be repeated.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        from dlaccel.ops._register import NAMESPACE, REGISTRY

        if func.namespace == NAMESPACE:
            op = REGISTRY[func.__name__.partition(".")[0]]
            args = op.filled(args)
            problem = None if op.has_kernel else "it has no Triton kernel"
            if problem is None and op.unsupported is not None:
                problem = op.unsupported(*args)
            if problem is not None:
                raise NoKernel(f"{op.name}: {problem}")
            function, declared = getattr(op.floor("triton"), op.name), func._schema.arguments
            args = tuple(a.clone() if d.alias_info and a is not None else a for d, a in zip(declared, args, strict=True))
            self.calls.append((function, args))
            return function(*args)
        return func(*args, **(kwargs or {}))


def operator_calls(call: Callable[[], Any]) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The functions of kernels/<op>.py that `call` comes down to, each with its arguments. Raises NoKernel."""
    mode = _OnKernels()
    with use_backend("triton"), mode:  # in "auto" small CPU tensors would go to aten, past the operator
        call()
    return mode.calls


def find_case(op: str, name: str) -> Case:
    module = families()[op]
    for case in itertools.chain(module.CASES, module.SAMPLES):
        if case.name == name:
            return case  # type: ignore[no-any-return]
    raise ValueError(f"case: {op} has no case {name!r}")


def meta_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors of one call without their storage: shapes, strides, offsets and dtypes as `case.inputs` makes them."""
    with FakeTensorMode():
        tensors = case.make(torch.Generator().manual_seed(0), dtype)
    metas = tuple(_meta(*_described(t)) for t in tensors)
    for i in case.differentiable(metas):
        metas[i].requires_grad_()
    return metas


def launches(op: str, case: Case | str, dtype: torch.dtype, target: str, backward: bool = True) -> list[Launch]:
    """What the Triton kernels would start for a call on `target` ("sm_90"): the forward, the backward for all gradients, and
    those kernels that only a call without gradients starts.

    op: a function of dlaccel.functional. case: of bench/cases/<op>.py, or its name. Raises NoKernel where they do not take it.
    """
    from dlaccel.kernels import config, launch

    if isinstance(case, str):
        case = find_case(op, case)
    tensors = meta_inputs(case, dtype)
    on_target = config.assume(config.TARGETS[target])
    with on_target, use_backend("triton"), launch.recording() as recorded, _OnKernels():
        y = case.call(implementation(op), *tensors)
        wanted = [t for t in tensors if t.requires_grad]
        if backward and wanted:
            torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)
            known, end = {x.name for x in recorded}, len(recorded)
            with torch.no_grad():
                case.call(implementation(op), *tensors)
            recorded[end:] = [x for x in recorded[end:] if x.name not in known]
    return recorded


# --- reports ---


@dataclass(frozen=True)
class Report:
    """What the compiler made of one launch on one target. Counts are of instructions in the code, not of executions."""

    kernel: str
    target: str
    triton: str
    status: str = "ok"  # ok | spills | too_large (shared memory beyond the device's) | failed
    reason: str = ""
    registers: int = 0  # per thread; AMD: VGPRs, accumulator registers included
    spills: int = 0  # local loads and stores (NVIDIA), spilled VGPRs (AMD)
    stack_bytes: int = 0  # per thread
    shared_bytes: int = 0  # per block
    warps: int = 0  # per block
    stages: int = 0
    blocks_per_sm: int = 0  # resident blocks that registers, shared memory and warps allow
    dots: int = 0  # tl.dot in the source, as Triton sees it
    tensor_core_ops: int = 0
    tf32_ops: int = 0  # those of them that round float32 operands (TF32, AMD's XF32)
    tma_loads: int = 0
    tma_stores: int = 0
    async_copies: int = 0  # global to shared memory without registers (cp.async)
    vector_loads: int = 0  # global, 16 bytes a thread; async copies included, TMA not
    vector_stores: int = 0
    half_vector_accesses: int = 0  # global, 8 bytes a thread
    scalar_accesses: int = 0  # global, at most 4 bytes a thread
    atomics: int = 0  # floating-point or integer, global
    instructions: int = 0
    loop_instructions: int = 0  # those inside loops
    nan_dropping: int = 0  # maxima and minima that lose a NaN operand
    unused: str = ""  # parameters that this specialisation does not read, comma-separated

    @property
    def warps_per_sm(self) -> int:
        return self.blocks_per_sm * self.warps


def compile_launch(launch: Launch, target: str) -> Report:
    """The report of one launch; see compile_launches."""
    return compile_launches([(launch, target)])[0]


def compile_launches(jobs: Sequence[tuple[Launch, str]], processes: int | None = None, *, keep: bool = False) -> list[Report]:
    """Compile each launch for its target in spawned processes (default: one per usable core) and read the result.

    Launches that Triton would compile to the same code are compiled once. A failed compilation is a Report too.
    keep: what was compiled goes to Triton's own cache, so that a GPU of this target need not compile it; where there is a CUDA
    driver, with the C code by which Triton 3.6 starts it.
    """
    keys = [identity(launch, target) for launch, target in jobs]
    found: dict[str, Report] = {}
    missing: dict[str, tuple[bytes, str, str]] = {}
    for key, (launch, target) in zip(keys, jobs, strict=True):
        if key in found or key in missing:
            continue
        cached = None if keep else _read(key)
        if cached is not None:
            found[key] = cached
        else:
            missing[key] = (pickled(launch), launch.name, target)
    if missing:
        with contextlib.nullcontext() if _workers and not keep else workers(processes, len(missing), keep=keep):
            for key, report in _compile_all(missing):
                found[key] = report
                if report.reason != ABORTED:  # it may have been killed, or never have started
                    _write(key, report)
    return [found[key] for key in keys]


ABORTED = "the compiler aborted"
_workers: list[Callable[[int], ProcessPoolExecutor]] = []  # of the innermost `with workers()`: a new pool of so many
_pools: list[ProcessPoolExecutor] = []  # and the pool in use


@contextlib.contextmanager
def workers(processes: int | None = None, most: int | None = None, *, keep: bool = False) -> Iterator[None]:
    """Keep the compiling processes for all compile_launches within: each takes some seconds to start.

    keep: see compile_launches.
    """
    count = min(processes or len(os.sched_getaffinity(0)), most or 1 << 30)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="dlaccel-triton-") as folder:

        def pool(n: int) -> ProcessPoolExecutor:
            return ProcessPoolExecutor(n, mp_context=context, initializer=start_worker, initargs=("" if keep else folder,))

        _workers.append(pool)
        _pools.append(pool(count))
        try:
            yield
        finally:
            _workers.pop()
            _pools.pop().shutdown()


def _compile_all(missing: dict[str, tuple[bytes, str, str]]) -> Iterator[tuple[str, Report]]:
    """Yields each report when it is there. A compiler that aborts takes its pool along: what is left runs one to a pool."""
    left = dict(missing)
    try:
        futures: dict[str, Future[Report]] = {key: _pools[-1].submit(_compile, *job) for key, job in missing.items()}
        for key, future in futures.items():
            report = future.result()
            del left[key]
            yield key, report
    except BrokenProcessPool:
        for key, job in left.items():
            with _workers[-1](1) as alone:
                try:
                    yield key, alone.submit(_compile, *job).result()
                except BrokenProcessPool:
                    yield key, Report(job[1], job[2], _triton_version(), "failed", ABORTED)
        _pools[-1] = _workers[-1](len(os.sched_getaffinity(0)))


# --- what identifies the compiled code ---

_VERSION = 3  # of Report and of the reading below


def identity(launch: Launch, target: str) -> str:
    """Equal for two launches only if the same code is compiled for both."""
    arguments = [_specialised(a) for a in launch.args]
    options = sorted((name, repr(_specialised(v)) if isinstance(v, Tensor) else str(v)) for name, v in launch.options.items())
    function = launch.kernel.fn
    source = _source_hash(function.__code__.co_filename), function.__module__, function.__name__
    parts = (_VERSION, *source, _triton_version(), target, arguments, options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _specialised(value: Any) -> Any:
    """What the compiled code may depend on in an argument: a refinement of Triton's own rules."""
    if isinstance(value, Tensor):
        small = value.untyped_storage().nbytes() < 2**31  # AMD: 32-bit offsets
        return str(value.dtype), value.data_ptr() % 16 == 0, small
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, int):
        return "one" if value == 1 else ("int", value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63)
    if isinstance(value, float):
        return "float"
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return str(value.base.dtype), [
            getattr(value, f.name) for f in fields(value) if f.name not in ("base", "shape", "strides")
        ]
    return repr(value)


@functools.cache
def _source_hash(file: str) -> str:
    """Of what is compiled from the kernel's file and from those with kernels that it imports from its folder.

    Launchers, choices of configuration and comments do not count: what they decide is in the launch.
    """
    digest, folder = hashlib.sha256(), Path(file).parent
    waiting, seen = [Path(file)], {Path(file)}
    while waiting:
        tree = ast.parse(waiting.pop().read_text())
        digest.update(ast.dump(ast.Module([node for node in tree.body if not _is_host_code(node)], [])).encode())
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {name for node in imported for name in [(node.module or "").split(".")[-1], *(a.name for a in node.names)]}
        siblings = {folder / f"{name}.py" for name in names if name} - seen
        waiting += sorted(path for path in siblings if path.exists() and "@triton.jit" in path.read_text())
        seen |= siblings
    return digest.hexdigest()


def _is_host_code(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    if isinstance(node, ast.Assign):  # of a choice of configurations, or to its attributes
        return "config.choice" in ast.unparse(node.value) or all(isinstance(target, ast.Attribute) for target in node.targets)
    return isinstance(node, ast.ClassDef | ast.Import | ast.ImportFrom) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


@functools.cache
def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _cache_file(key: str) -> Path:
    from dlaccel.kernels.measured import cache_directory

    return cache_directory() / "inspect" / f"{key}.json"


def _read(key: str) -> Report | None:
    try:
        return Report(**json.loads(_cache_file(key).read_text()))
    except (OSError, ValueError, TypeError):  # absent, damaged, or of another version
        return None


def _write(key: str, report: Report) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        path = _cache_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(report)))
        scratch.replace(path)


# --- to the workers: kernels by name, tensors without storage ---


def _described(t: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int, int]:
    return t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset()), t.untyped_storage().nbytes() // t.element_size()


def _meta(dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], offset: int, elements: int) -> Tensor:
    return torch.empty(elements, dtype=dtype, device="meta").as_strided(size, stride, offset)


def _kernel(module: str, file: str, name: str) -> Any:
    """A kernel by name; of the user's file, if it is none of an importable module."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        found = load_file(file)
    return jit_function(getattr(found, name))


def jit_function(kernel: Any) -> Any:
    """What @triton.autotune and @triton.heuristics wrap."""
    from triton.runtime import KernelInterface

    while isinstance(getattr(kernel, "fn", None), KernelInterface):
        kernel = kernel.fn
    return kernel


def load_file(file: str) -> ModuleType:
    """The module that a Python file holds; it may import what lies beside it."""
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"_dlaccel_file_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        from triton.runtime import KernelInterface

        if isinstance(value, Tensor):
            return _meta, _described(value)
        if isinstance(value, KernelInterface):
            return _kernel, (value.fn.__module__, value.fn.__code__.co_filename, value.fn.__name__)
        return NotImplemented


def pickled(launch: Launch) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump((launch.kernel, launch.grid, launch.args, launch.options))
    return buffer.getvalue()


# --- in a worker ---


class NamesATarget:
    """A driver that answers what Triton asks before it compiles, and can launch nothing."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return str(self.target)  # keys the compiled kernels of a JITFunction

    def get_current_stream(self, device: Any) -> int:
        return 0


_keeps = False  # this worker's code goes to the user's own cache


def start_worker(folder: str) -> None:
    """folder: Triton's cache; empty: the user's own, with keys as in any other process."""
    global _keeps
    _keeps = not folder
    os.environ.pop("TRITON_INTERPRET", None)
    if folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default of every version so far; 3.9 warns when it is not said
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing:  # ptxas and LLVM print whole programs when they fail
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)


def _compile(pickled: bytes, name: str, target: str) -> Report:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from dlaccel.kernels.config import TARGETS

    device = TARGETS[target]
    driver.set_active(NamesATarget(GPUTarget(device.backend, device.arch, device.warp)))
    try:
        kernel, grid, args, options = pickle.loads(pickled)
        compiled = kernel.warmup(*args, grid=grid, **options)
        found = _read_nvidia(compiled) if device.backend == "cuda" else _read_amd(compiled)
        if _keeps and device.backend == "cuda":
            from triton.backends.nvidia.driver import CudaLauncher

            with contextlib.suppress(Exception):  # no driver; later versions have one for all kernels
                CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:
        lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        return Report(name, target, _triton_version(), "failed", " ".join(lines)[:300])
    metadata, ir = compiled.metadata, str(compiled.asm["ttir"])
    found |= {
        "shared_bytes": metadata.shared,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "dots": len(re.findall(r"\btt\.dot\b", ir)),
        "nan_dropping": len(re.findall(r"arith\.(?:max|min)numf|propagateNan = none", ir)),
    }
    unused = ",".join(p for p in kernel.arg_names if len(re.findall(rf"%{p}(?!\w)", ir)) == 1)
    status, reason = "ok", ""
    if metadata.shared > device.shared:
        status, reason = "too_large", f"{metadata.shared} bytes of shared memory, {target} has {device.shared}"
    elif found["spills"] or found["stack_bytes"]:
        status, reason = "spills", f"{found['spills']} spills, {found['stack_bytes']} bytes of stack"
    blocks = blocks_per_sm(target, found["registers"], metadata.num_warps, metadata.shared)
    return Report(name, target, _triton_version(), status, reason, blocks_per_sm=blocks, unused=unused, **found)


_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)(?:.*?0x([0-9a-f]+))?")


def _read_nvidia(compiled: Any) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, "cuobjdump printed no resource usage"
    code = [
        (int(a, 16), op, int(t, 16) if t and op.startswith("BRA") else None) for a, op, t in _SASS.findall(text) if op != "NOP"
    ]
    accesses = [_nvidia_access(op) for _, op, _ in code]
    ops = Counter(op.partition(".")[0] for _, op, _ in code)
    loops = [(to, at) for at, _, to in code if to is not None and to < at]
    return {
        "registers": int(usage[1]),
        "stack_bytes": int(usage[2]),
        "spills": ops["STL"] + ops["LDL"],
        "tensor_core_ops": sum(n for op, n in ops.items() if op.endswith("MMA") and op != "HFMA2"),
        "tf32_ops": sum("TF32" in op for _, op, _ in code if "MMA" in op),
        "tma_loads": ops["UTMALDG"],
        "tma_stores": ops["UTMASTG"],
        "async_copies": ops["LDGSTS"],
        "atomics": ops["ATOMG"] + ops["RED"] + ops["ATOM"],
        "instructions": len(code),
        "loop_instructions": sum(any(first <= at <= last for first, last in loops) for at, _, _ in code),
        **_by_width(accesses),
    }


def _nvidia_access(op: str) -> tuple[str, int]:
    """("load" | "store" | "", bytes) of a global access."""
    head, *parts = op.split(".")
    kind = {"LDG": "load", "LDGSTS": "load", "LD": "load", "STG": "store", "ST": "store"}.get(head, "")
    width = next((int(p) // 8 for p in parts if p in ("256", "128", "64")), 4)
    return kind, width


_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8}


def _read_amd(compiled: Any) -> dict[str, int]:
    text = str(compiled.asm["amdgcn"])

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    lines: list[str] = []  # instructions
    labels: dict[str, int] = {}  # index of the next instruction
    loops: list[tuple[int, int]] = []  # first and last
    for line in text.splitlines():
        label, op = re.match(r"(\.LBB\w+):", line), re.match(r"\s+([a-z]\w+)(.*)", line)
        if label:
            labels[label[1]] = len(lines)
        elif op and not op[1].startswith(("s_nop", "s_code_end")):
            if op[1].startswith(("s_cbranch", "s_branch")) and op[2].strip() in labels:
                loops.append((labels[op[2].strip()], len(lines)))
            lines.append(op[1])
    accesses = [(m[1], _AMD_WIDTHS.get(m[2].split("_")[0], 4)) for m in map(_AMD_ACCESS.match, lines) if m]
    return {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count"),
        "tensor_core_ops": sum(op.startswith(("v_mfma", "v_smfmac", "v_wmma", "v_swmmac")) for op in lines),
        "tf32_ops": sum(op.startswith("v_mfma") and "xf32" in op for op in lines),
        "atomics": sum("_atomic_" in op for op in lines),
        "instructions": len(lines),
        "loop_instructions": sum(any(first <= i <= last for first, last in loops) for i in range(len(lines))),
        **_by_width(accesses),
    }


def _by_width(accesses: list[tuple[str, int]]) -> dict[str, int]:
    return {
        "vector_loads": sum(kind == "load" and width >= 16 for kind, width in accesses),
        "vector_stores": sum(kind == "store" and width >= 16 for kind, width in accesses),
        "half_vector_accesses": sum(kind != "" and 4 < width < 16 for kind, width in accesses),
        "scalar_accesses": sum(kind != "" and width <= 4 for kind, width in accesses),
    }


# --- occupancy ---

# Per multiprocessor: warps, blocks, bytes of shared memory (CUDA programming guide, table of compute capabilities).
_NVIDIA_SM = {
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}


def blocks_per_sm(target: str, registers: int, warps: int, shared: int) -> int:
    """Blocks of `warps` warps that a multiprocessor holds at once."""
    from dlaccel.kernels.config import TARGETS

    device = TARGETS[target]
    if device.backend == "cuda":
        assert isinstance(device.arch, int)
        most_warps, most_blocks, kilobytes = _NVIDIA_SM[device.arch]
        by_registers = 65536 // (-(-max(registers, 1) // 8) * 8 * 32) // warps  # allocated in units of 8 a thread
        by_shared = kilobytes * 1024 // (shared + 1024)  # 1 KB of each block is the system's
        return min(by_registers, by_shared, most_blocks, most_warps // warps)
    # AMD: SIMDs of a compute unit; registers a SIMD has for each lane, their granule; waves of a SIMD (CDNA3, RDNA3 ISA).
    simds, file, granule, waves = (4, 512, 8, 8) if device.warp == 64 else (2, 1536, 24, 16)
    per_simd = min(file // (-(-max(registers, 1) // granule) * granule), waves)
    by_shared = device.shared // shared if shared else 32
    return min(per_simd * simds // warps, by_shared, 32)
