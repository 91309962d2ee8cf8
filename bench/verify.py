"""Who is right where: every sample, and every way to lay out, differentiate or repeat a call, x provider. Nothing is timed.

Each provider runs in a process of its own (`python -m dlaccel.bench.verify`, a job as JSON on standard input, findings as JSON
lines on standard output), so that one that crashes leaves the others alone. Without a GPU, Triton kernels are interpreted.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlaccel.bench import gate, results
from dlaccel.bench.accuracy import close_enough
from dlaccel.bench.case import Case, Function, families
from dlaccel.bench.provider import Provider, Unavailable, load
from dlaccel.bench.worker import set_precision

OK, WRONG, ABSENT = "ok", "WRONG", "-"
TIMEOUT = 3600.0  # seconds for one provider
KEEP_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One provider in one row."""

    op: str
    row: str
    sample: str
    provider: str
    outcome: str
    reason: str = ""
    device: str = "cpu"

    def reproduce(self) -> str:
        """A command that shows this finding alone."""
        name, backend = (*self.provider.split("/"),) if self.provider.startswith("dlaccel/") else (self.provider, "")
        words = ["python", "-m", "dlaccel.bench", "verify", "--device", self.device, "--op", self.op, "--row", self.row]
        words += ["--provider", name, *(("--backend", backend) if backend else ()), "--sample", self.sample]
        return shlex.join(words)


# ---- rows -----------------------------------------------------------------------------------------------------------

Check = Callable[["Subject"], str | None]


@dataclass(frozen=True)
class Subject:
    """What a check looks at: an implementation of a sample's op. `overwrites`: the library says that it does."""

    case: Case
    function: Function
    eager: Function
    reference: Function
    device: str
    modes: tuple[str, ...]  # of the provider
    interpreted: bool

    @property
    def differentiable(self) -> bool:
        return "train" in self.modes and bool(self.case.differentiable(self.case.inputs(torch.float32, self.device)))

    def values(self, dtype: torch.dtype = torch.float32) -> gate.Values:
        return gate.values_of(self.case, dtype, self.device, 0, eager=self.eager, reference=self.reference)

    def step(self, values: gate.Values, mode: str = "train", lay: Callable[[Tensor], Tensor] = gate.copy) -> gate.Step:
        mode = mode if self.differentiable else "fwd"
        return gate.Step(self.case, self.function, mode, tuple(map(lay, values.tensors)), gate.copy(values.dy))


def _values(dtype: torch.dtype) -> Check:
    def check(s: Subject) -> str | None:
        # It computes on the bit patterns (3.6 to 3.9).
        _applies(not (s.interpreted and dtype == torch.bfloat16), "Triton's interpreter has no bfloat16 arithmetic")
        values = s.values(dtype)
        return gate.check(s.step(values), values, may_overwrite=True)

    return check


def _inputs_unchanged(s: Subject) -> str | None:
    values = s.values()
    wrong = gate.check(s.step(values), values)
    return wrong if wrong and "overwritten" in wrong else None


def _changed(change: Callable[[Tensor], Tensor], scale: float = 0.0) -> Check:
    """Other values of the first input. A sample where torch itself gives no clear answer to them has nothing to say.

    scale: of numbers that must cancel; their rounding is allowed on top.
    """

    def check(s: Subject) -> str | None:
        drawn = s.values()
        _applies(drawn.tensors[0].numel() > 0)
        tensors = (change(drawn.tensors[0].clone()), *drawn.tensors[1:])
        values = gate.expected(s.case, tensors, drawn.dy, eager=s.eager, reference=s.reference)
        if not values.exact["output"].isfinite().all():
            # aten zeroes it in vectors of elements and passes it in the rest of the tensor.
            _applies("relu6" not in s.case.name + s.case.eager_form, "torch's gradient of relu6 at NaN is not one thing")
        _applies(gate.compare(values.eager, values) is None, "torch's own answer cannot be judged")
        return gate.check(s.step(values), values, may_overwrite=True, terms=scale)

    return check


def _last(value: float) -> Callable[[Tensor], Tensor]:
    """The last element becomes `value`: in cross-entropy's samples one of a row that counts."""

    def change(t: Tensor) -> Tensor:
        t[(-1,) * t.dim()] = value
        return t

    return change


def _laid_out(lay: Callable[[Tensor], Tensor], dimensions: int = 1) -> Check:
    """The inputs in other strides."""

    def check(s: Subject) -> str | None:
        values = s.values()
        _applies(any(t.dim() >= dimensions for t in values.tensors))
        step = s.step(values, lay=lambda t: lay(t) if t.dim() >= dimensions else gate.copy(t))
        return gate.check(step, values, may_overwrite=True)

    return check


def _gradient(lay: Callable[[Tensor], Tensor], dimensions: int) -> Check:
    """The gradient of the output in other strides."""

    def check(s: Subject) -> str | None:
        values = s.values()
        _applies(values.dy.dim() >= dimensions and s.differentiable)
        values = gate.expected(s.case, values.tensors, lay(values.dy), eager=s.eager, reference=s.reference)
        # Batch normalization's gradient of a constant is what is left of its terms when they cancel.
        terms = float(values.dy.abs().sum()) if 0 in values.dy.stride() else 0.0
        return gate.check(s.step(values), values, may_overwrite=True, terms=terms)

    return check


def _some_gradients(s: Subject) -> str | None:
    values = s.values()
    _applies(s.differentiable and len(s.case.differentiable(values.tensors)) > 1)
    for mode in ("dgrad", "wgrad"):
        if wrong := gate.check(s.step(values, mode), values, may_overwrite=True):
            return wrong
    return None


def _repeatable(s: Subject) -> str | None:
    values = s.values()
    first, second = (s.step(values).once(values) for _ in range(2))
    return next((f"{name} differs from run to run" for name in first if not gate.identical(first[name], second[name])), None)


def _double_backward(s: Subject) -> str | None:
    values = s.values()
    _applies(s.differentiable)

    def second(function: Function, dtype: torch.dtype) -> list[Tensor]:
        tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in map(gate.copy, values.tensors))
        inputs = [tensors[i].requires_grad_() for i in s.case.differentiable(tensors)]
        dy = values.dy.to(dtype, copy=True).requires_grad_()
        first = torch.autograd.grad(s.case.call(function, *tensors), inputs, dy, create_graph=True)
        total = torch.stack([(g * _ramp(g)).sum() for g in first]).sum()
        found = torch.autograd.grad(total, [*inputs, dy], allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, [*inputs, dy], strict=True)]

    # The yardstick is the reference in float32, not eager: aten's own second derivatives do not exist for every sample.
    got, eager = second(s.function, torch.float32), second(s.reference, torch.float32)
    exact = second(s.reference, torch.float64)
    # With one number as the result, the last derivative is the sum of all of `total`'s terms, which may cancel.
    terms = sum(float((g * _ramp(g)).abs().sum()) for name, g in values.exact.items() if name.startswith("grad"))
    for i, (g, e, x) in enumerate(zip(got, eager, exact, strict=True)):
        last = i == len(exact) - 1 and values.dy.dim() == 0
        if wrong := close_enough(g, e, x, terms=terms if last else 0.0):
            return f"second derivative {i}: {wrong}"
    return None


def _ramp(t: Tensor) -> Tensor:
    return torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)


class _DoesNotApply(Exception):
    pass


def _applies(condition: bool, otherwise: str = "") -> None:
    if not condition:
        raise _DoesNotApply(otherwise)


def _strided(t: Tensor) -> Tensor:
    """Every second entry of the last dimension, not from the start."""
    return torch.stack([t, t], -1).flatten(-2)[..., 1::2]


def _offset(t: Tensor) -> Tensor:
    """Contiguous, on an address that is aligned to the element only."""
    return torch.cat([t.new_ones(3), t.flatten()])[3:].view(t.shape)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


ROWS: dict[str, Check] = {  # "values" stands for one row a sample
    "values": _values(torch.float32),
    "values in bfloat16": _values(torch.bfloat16),
    "values in float16": _values(torch.float16),
    "large values": _changed(lambda t: t * 1e4),
    "large mean": _changed(lambda t: t + 1e3, scale=1e3),
    "an input of -inf": _changed(_last(-math.inf)),
    "an input of NaN": _changed(_last(math.nan)),
    "inputs unchanged": _inputs_unchanged,
    "strided inputs": _laid_out(_strided),
    "transposed inputs": _laid_out(lambda t: t.mT.contiguous().mT, 2),
    "misaligned inputs": _laid_out(_offset),
    "channels_last inputs": _laid_out(_channels_last, 3),
    "stride-0 gradient": _gradient(lambda dy: dy.new_full((), 0.75).expand(dy.shape), 1),
    "strided gradient": _gradient(_strided, 1),
    "channels_last gradient": _gradient(_channels_last, 3),
    "some gradients only": _some_gradients,
    "double backward": _double_backward,
    "bitwise repeatable": _repeatable,
}


# ---- one provider ---------------------------------------------------------------------------------------------------


def findings(
    label: str, provider: Provider, op: str, family: Any, rows: Sequence[str], device: str, sample: str | None = None
) -> Iterator[Finding]:
    """One finding per sample for "values"; in other rows that of the first sample that is wrong, else of one that is right.

    Samples whose plain values are wrong already have nothing to say in other rows.
    """

    def find(row: str, samples: Iterable[Case]) -> list[Finding]:
        return [Finding(op, row, s.name, label, *_outcome(s, provider, row, device, family), device) for s in samples]

    samples = [s for s in family.SAMPLES if sample in (None, s.name)]
    values = find("values", samples)
    if "values" in rows:
        yield from values
    samples = [s for s, f in zip(samples, values, strict=True) if f.outcome == OK]
    for row in rows:
        if row != "values" and (found := find(row, samples)):
            yield min(found, key=lambda f: (WRONG, OK, ABSENT).index(f.outcome))


def _outcome(case: Case, provider: Provider, row: str, device: str, family: Any) -> tuple[str, str]:
    interpreted = device == "cpu" and provider.triton
    try:
        function = provider.implementation(case)
        subject = Subject(case, function, family.eager, family.reference, device, provider.modes, interpreted)
        wrong = ROWS[row](subject)
    except (Unavailable, _DoesNotApply) as reason:
        return ABSENT, str(reason)
    except Exception as error:
        wrong = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if interpreted and "not compiled with CUDA" in wrong:
            return ABSENT, "it allocates on a CUDA device"
        if interpreted and "InterpreterError" in wrong and provider.name != "dlaccel":
            return ABSENT, f"Triton's interpreter cannot run it ({wrong})"
        if "backend 'triton' was chosen but" in wrong:  # dlaccel's refusal, with its reason
            return ABSENT, wrong
    return (WRONG, wrong) if wrong else (OK, "")


def main() -> None:
    """The process of one provider."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    set_precision("ieee")
    provider = load(job["provider"])
    if provider.name == "dlaccel":
        problem = importlib.import_module("dlaccel.backend").triton_problem()
        if problem and os.environ.get("DLACCEL_BACKEND") == "triton":
            print(json.dumps({"unavailable": problem}), file=answers, flush=True)
            return
    reason = provider.available() or provider.unsupported("fwd", "float32", job["device"])
    if reason:
        print(json.dumps({"unavailable": reason}), file=answers, flush=True)
        return
    known = families()
    for op in job["ops"]:
        for finding in findings(job["label"], provider, op, known[op], job["rows"], job["device"], job["sample"]):
            print(json.dumps(asdict(finding)), file=answers, flush=True)


# ---- all of them ----------------------------------------------------------------------------------------------------


def verify(
    providers: Sequence[tuple[str, str]],
    ops: Sequence[str],
    rows: Sequence[str],
    device: str,
    sample: str | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    timeout: float = TIMEOUT,
    keep: Callable[[list[Finding], dict[str, str]], None] = lambda found, absent: None,
) -> tuple[list[Finding], dict[str, str]]:
    """Findings of all (provider, backend), and for each that cannot be used here the reason.

    keep: called every few seconds with what there is so far.
    """
    found: list[Finding] = []
    absent: dict[str, str] = {}
    for name, backend in progress(providers):
        label = f"{name}/{backend}" if backend else name
        job = {"provider": name, "label": label, "device": device, "ops": ops, "rows": rows, "sample": sample}
        env = os.environ | ({"DLACCEL_BACKEND": backend} if backend else {})
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, (_root(), env.get("PYTHONPATH"))))}
        env |= {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "dlaccel.bench.verify"]
        answers: list[dict[str, Any]] = []
        with tempfile.TemporaryFile("w+") as log:
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)
            assert process.stdin is not None and process.stdout is not None
            late = threading.Event()

            def kill(process: subprocess.Popen[str] = process, late: threading.Event = late) -> None:
                late.set()
                process.kill()

            timer = threading.Timer(timeout, kill)
            timer.start()
            kept = time.monotonic()
            with process:
                try:
                    with contextlib.suppress(BrokenPipeError):  # it has ended already
                        process.stdin.write(json.dumps(job))
                        process.stdin.close()
                    for line in process.stdout:
                        if line.endswith("}\n"):  # else it was killed in mid-word
                            answers.append(json.loads(line))
                        if time.monotonic() >= kept + KEEP_EVERY:
                            keep([*found, *(Finding(**a) for a in answers if "unavailable" not in a)], absent)
                            kept = time.monotonic()
                finally:
                    timer.cancel()
            ending = f"no answer within {timeout:.0f} s" if late.is_set() else ""
            if process.returncode and not ending:
                ending = f"the process ended with {process.returncode}"
            log.seek(0)
            last = (log.read().strip().splitlines() or [""])[-1]
        mine = [Finding(**answer) for answer in answers if "unavailable" not in answer]
        for answer in answers:
            if "unavailable" in answer:
                absent[label] = answer["unavailable"]
        if mine and all(f.outcome == ABSENT for f in mine):
            absent[label] = f"has nothing to check here ({mine[0].reason})"
        else:
            found += mine
        if ending:
            absent[label] = f"{ending}, after {len(answers)} findings: {last[:200]}"
        keep(found, absent)
    return found, absent


def _root() -> str:
    return str(Path(results.__file__).resolve().parents[1])


def grid(found: Sequence[Finding]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The providers, and for each row its label and their outcomes."""
    providers = list(dict.fromkeys(f.provider for f in found))
    cells = {(_label(f), f.provider): f.outcome for f in found}
    labels = sorted(dict.fromkeys(map(_label, found)), key=lambda label: label.split(": ", 1)[0])
    return providers, [(label, [cells.get((label, p), ABSENT) for p in providers]) for label in labels]


def counts(found: Sequence[Finding]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each op and provider (as in `grid`) how many rows are right and how many wrong, and "wrong" if any is."""
    providers, lines = grid(found)
    ops: dict[str, list[list[str]]] = {}
    for label, outcomes in lines:
        ops.setdefault(label.split(": ", 1)[0], []).append(outcomes)
    shown = []
    for op, rows in ops.items():
        cells = []
        for i in range(len(providers)):
            right, wrong = (sum(row[i] == outcome for row in rows) for outcome in (OK, WRONG))
            text = f"{right} ok, {wrong} WRONG" if wrong else f"{right} ok" if right else ABSENT
            cells.append((text, "wrong" if wrong else "ok" if right else ""))
        shown.append((f"{op}, {len(rows)} rows", cells))
    return shown


def made_on(device: str) -> str:
    """On what a table was made."""
    where = results.provenance(device, threads=1, clock="", precision="ieee", seed=0)
    how = where["gpu"] or f"{where['cpu']}, Triton kernels interpreted"
    return f"Made on: {how}; torch {where['torch']}, triton {where['triton'] or 'absent'}, {results.now()[:10]}."


def text(found: Sequence[Finding], absent: dict[str, str], table: Callable[..., str], device: str) -> str:
    """The table rows x providers, then each wrong one with its reason and how to reproduce it."""
    providers, lines = grid(found)
    parts = [f"{label} is not complete: {reason}" if label in providers else f"{label} is not in the table: {reason}"
             for label, reason in absent.items()]  # fmt: skip
    why = Counter((f.provider, f.reason) for f in found if f.outcome == ABSENT and f.reason not in ("", f"has no {f.op}"))
    parts += [f"{provider} has {ABSENT} in {n} row{'s' * (n > 1)}: {reason}" for (provider, reason), n in sorted(why.items())]
    for f in found:
        if f.outcome == WRONG:
            parts.append(f"{f.provider}, {_label(f)} ({f.sample}): {f.reason}\n    {f.reproduce()}")
    shown = table(("", *providers), [(label, *outcomes) for label, outcomes in lines])
    return "\n\n".join(filter(None, [shown, made_on(device), "\n".join(parts)]))


def save(path: Path, found: Sequence[Finding], absent: dict[str, str], device: str) -> None:
    content = {"made_on": made_on(device), "absent": absent, "findings": [asdict(f) for f in found]}
    results.write_whole(path, json.dumps(content))


def read(path: Path) -> tuple[list[Finding], dict[str, str], str]:
    """Findings, absent providers and on what they were made, as `save` wrote them; nothing where there is no file.

    Raises ValueError where it is not such a file.
    """
    if not path.exists():
        return [], {}, ""
    try:
        saved = json.loads(path.read_text())
        return [Finding(**f) for f in saved["findings"]], saved["absent"], saved["made_on"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not what `verify --out` writes ({type(error).__name__}: {error})") from None


def _label(f: Finding) -> str:
    return f"{f.op}: {f.sample}" if f.row == "values" else f"{f.op}: [{f.row}]"


if __name__ == "__main__":
    main()
