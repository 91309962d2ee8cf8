"""The kernels' machine code against tests/expected, compiled without a GPU; and that the gates catch worse code.

After an intended change: python -m dlaccel.bench inspect --update-expected
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from dlaccel.bench import __main__ as cli
from dlaccel.bench import compile, expected, inspect, model
from dlaccel.bench.case import families
from dlaccel.bench.compile import Report, blocks_per_sm, compile_launch, compile_launches, identity, launches
from dlaccel.bench.inspect import Inspected, Selection
from dlaccel.kernels import config
from dlaccel.kernels import linear_relu as kernels
from dlaccel.ops._register import REGISTRY

OPS = list(families())
COMMAND = "python -m dlaccel.bench inspect --update-expected"
IN_CI = pytest.param("sm_80", marks=pytest.mark.slow)


@functools.cache
def compiled(target: str) -> dict[str, Inspected]:
    return expected.compiled(OPS, [target])


@pytest.mark.parametrize("target", ["sm_90", "gfx942", IN_CI])
def test_no_kernel_is_worse_than_expected(target: str) -> None:
    stored, found = expected.load(target), compiled(target)
    with_kernels = {op for op in OPS if op not in REGISTRY or REGISTRY[op].has_kernel}
    assert {one.op for one in found.values()} == with_kernels
    newer = triton.__version__ > "3.9.z"  # nothing is stored for it: the gates without the stored sizes
    wrong = []
    for name, one in found.items():
        entry = stored.get(expected.key(one))
        if entry is None and not newer:
            wrong.append(f"{name}: not in tests/expected: {COMMAND}")
        entry = entry or expected.entry(one.report)
        wrong += [f"{name}: {worse}" for worse in expected.failures(one.report, entry, expected.is_ieee(one))]
    wrong += [f"{target} {key}: nothing compiles it any more: {COMMAND}" for key in expected.unexpected(target, found)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "sm_80"])
def test_what_may_be_bad_has_a_written_reason(target: str) -> None:
    fields = set(expected.entry(Report("", target, "")))
    for name, whole in expected.stored(target).items():
        versions = {version for version in whole if version.startswith("triton ")}
        assert expected.BASE not in versions and set(whole) - {"note"} - versions == fields, name
        assert all(whole[version] and set(whole[version]) <= fields for version in versions), name
        for entry in (whole, *(whole[version] for version in versions)):
            bad = entry.get("nan_dropping") or entry.get("stack_bytes")
            assert not bad or whole.get("note"), f"{name}: spills or loses a NaN, and no note says why"


# --- the gates catch worse code ---


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    """One pool of compiling processes for all tests."""
    with compile.workers():
        yield


@functools.cache
def good(dtype: torch.dtype, target: str = "sm_90") -> tuple[Any, Report]:
    forward = launches("linear_relu", "1024x1024x1024", dtype, target, backward=False)[0]
    return forward, compile_launch(forward, target)


def worse(block: dict[str, Any], dtype: torch.dtype = torch.float32, target: str = "sm_90") -> list[str]:
    """What the gates say of linear_relu's forward with these blocks, against what is expected of the chosen ones."""
    chosen = kernels.forward_config.static(config.TARGETS[target], dtype, 1024, 1024, 1024, False)
    with kernels.forward_config.using(chosen | block):
        launch = launches("linear_relu", "1024x1024x1024", dtype, target, backward=False)[0]
    return expected.failures(compile_launch(launch, target), expected.entry(good(dtype, target)[1]), dtype == torch.float32)


def test_the_chosen_configuration_passes() -> None:
    assert worse({}) == []


def test_a_spilling_configuration_fails() -> None:
    found = worse({"num_warps": 1}, torch.bfloat16, "sm_80")
    assert any("spills" in line for line in found), found


def test_a_configuration_beyond_the_shared_memory_fails() -> None:
    found = worse({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 5, "num_warps": 8}, torch.bfloat16, "gfx942")
    assert any("too_large" in line and "gfx942 has 65536" in line for line in found), found


def test_more_shared_memory_than_expected_fails() -> None:
    found = worse({"num_stages": 5})
    assert any("of shared memory, expected" in line for line in found), found


def test_tf32_where_ieee_was_asked_for_fails() -> None:
    launch, report = good(torch.float32)
    tf32 = dataclasses.replace(launch, options=launch.options | {"PRECISION": "tf32"})
    found = expected.failures(compile_launch(tf32, "sm_90"), expected.entry(report), ieee=True)
    assert any("TF32" in line for line in found), found


def test_lost_vector_and_tensor_core_instructions_fail() -> None:
    """Rows that are not a multiple of 16 bytes: what the launcher starts for them has no 16-byte access."""
    aligned = launches("linear_relu", "1024x1024x1024", torch.bfloat16, "sm_80")
    ragged = launches("linear_relu", "ragged blocks", torch.bfloat16, "sm_80")
    one, other = compile_launch(aligned[1], "sm_80"), compile_launch(ragged[1], "sm_80")
    assert one.kernel == other.kernel == "relu_backward_kernel" and one.status == other.status == "ok"
    assert expected.failures(other, expected.entry(one), False) == [
        "no 16-byte loads any more",
        "no 16-byte stores any more",
    ]
    product = compile_launch(aligned[0], "sm_80")
    without = dataclasses.replace(product, tensor_core_ops=0)
    assert expected.failures(without, expected.entry(product), False) == ["no tensor-core instructions any more"]


def test_a_kernel_that_does_not_compile_fails() -> None:
    launch, report = good(torch.float32)
    broken = dataclasses.replace(launch, options=launch.options | {"BLOCK_K": 24})
    found = expected.failures(compile_launch(broken, "sm_90"), expected.entry(report), True)
    assert len(found) == 1 and found[0].startswith("failed:"), found


def test_a_note_allows_what_is_expected_and_no_more() -> None:
    report = Report("k", "sm_90", "", "spills", "9 spills", spills=9, stack_bytes=40, nan_dropping=1, shared_bytes=100)
    entry = expected.entry(report)
    assert len(expected.failures(report, entry, False)) == 2
    noted = entry | {"note": "why"}
    assert expected.failures(report, noted, False) == []
    for worse in ({"nan_dropping": 2}, {"stack_bytes": 48}, {"shared_bytes": 200}):
        assert len(expected.failures(dataclasses.replace(report, **worse), noted, False)) == 1
    assert len(expected.failures(report, noted | {"stack_bytes": 0}, False)) == 1  # the note is of the maxima


def test_what_another_triton_does_worse_stands_beside_the_entry() -> None:
    """An update on an overlay writes what fails without it, and nothing else; BASE writes the rest."""
    report = Report("k", "sm_90", "", shared_bytes=1000, vector_loads=4)
    base = expected.updated(None, report, False, expected.BASE)
    little, much = dataclasses.replace(report, shared_bytes=1100), dataclasses.replace(report, shared_bytes=2000)
    assert expected.updated(base, little, False, "triton 3.9") == base  # within the slack
    both = expected.updated(base | {"note": "why"}, much, False, "triton 3.9")
    assert both == base | {"note": "why", "triton 3.9": {"shared_bytes": 2000}}
    assert expected.failures(much, expected.of_version(both, "triton 3.9"), False) == []
    for other in (expected.BASE, "triton 3.6", "triton 4.0"):
        assert expected.failures(much, expected.of_version(both, other), False) != []
    assert expected.updated(both, report, False, "triton 3.9") == base | {"note": "why"}  # no longer needed
    narrow = dataclasses.replace(report, vector_loads=0)
    assert expected.updated(both, narrow, False, expected.BASE) == both | {"wide_loads": False}  # what 3.9 needs is kept


# --- reading and compiling ---


def test_maxima_that_lose_a_nan_are_seen(tmp_path: Path) -> None:
    source = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, y, KEEP: tl.constexpr):
    i = tl.arange(0, 128)
    value = tl.load(x + i)
    if KEEP:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        value = tl.maximum(value, 0.0)
    tl.store(y + i, value)
"""
    file = tmp_path / "relu.py"
    file.write_text(source)
    for keep, count in (("True", 0), ("False", 1)):
        for one in inspect.own_kernel(f"{file}:kernel", f"*fp32:16, *fp32:16, {keep}", {}, ["sm_90", "gfx942"]):
            assert one.report.status == "ok" and one.report.nan_dropping == count, one


def test_a_kernel_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\ndef copy(x, y, n, BLOCK: tl.constexpr):\n"
        "    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        "    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)\n"
    )
    (vector,) = inspect.own_kernel(f"{file}:copy", "*bf16:16, *bf16:16, i32:16, 1024", {"num_warps": 4}, ["sm_90"])
    (scalar,) = inspect.own_kernel(f"{file}:copy", "*bf16, *bf16:16, i32, 1024", {"num_warps": 4}, ["sm_90"])
    assert vector.report.vector_loads == vector.report.vector_stores == 1 and not vector.report.scalar_accesses
    assert not scalar.report.vector_loads and scalar.report.scalar_accesses == 16
    assert any("no 16-byte access" in note for note in scalar.warnings())


OWN = """
import triton
import triton.language as tl
from own_helper import STEP

@triton.jit
def scale(x, y, n, factor, BLOCK: tl.constexpr, KEEP: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * factor, mask=i < n)

tuned = triton.autotune([triton.Config({"BLOCK": 64}, num_warps=1), triton.Config({"BLOCK": 512}, num_warps=4)], ["n"])(scale)

def plain(x):
    return x
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own_helper.py").write_text("STEP = 1\n")
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_what_a_signature_leaves_out_comes_by_name(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--signature", "*fp32:16, *fp32:16, i32, fp32", "--target", "sm_80,sm_90", "--json", str(out)]
    assert run(f"{own}:scale", *words, "--config", "BLOCK=256") == 0
    assert [json.loads(line)["target"] for line in out.read_text().splitlines()] == ["sm_80", "sm_90"]
    assert run(f"{own}:tuned", *words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["target"], row["warps"]) for row in rows] == [("sm_80", 1), ("sm_80", 4), ("sm_90", 1), ("sm_90", 4)]
    assert run(f"{own}:scale", *words, "--config", "BLOCK=100") == 1  # does not compile
    assert "power of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "signature", "more", "message"),
    [
        ("nowhere.py:copy", "*bf16", [], "nowhere.py: no such file"),
        ("{own}", "*bf16", [], "expected path/to/file.py:function"),
        ("{own}:scales", "*bf16", [], "did you mean 'scale'"),
        ("{own}:plain", "*bf16", [], "known: scale, tuned"),
        ("{own}:scale", "", [], "needs --signature"),
        (
            "{own}:scale",
            "*bf16, *bf16, i32, fp32, 64, True, 1",
            [],
            "takes 6 arguments (x, y, n, factor, BLOCK, KEEP), got more",
        ),
        ("{own}:scale", "*bf16, *bf16", [], "says nothing of n, factor, BLOCK: add a type or value, or --config n=VALUE"),
        ("{own}:scale", "*float16, *bf16, i32, fp32, 64", [], "x takes a type (bf16, fp16, fp32"),
        ("{own}:scale", "*bf16, *bf16, i32, fp32, i32", [], "BLOCK is a tl.constexpr and takes a value, got 'i32'"),
        ("{own}:scale", "*bf16, *bf16, i32, fp32, 64", ["--op", "linear_relu"], "--op: not for a kernel of your own"),
        ("{broken}:scale", "*bf16", [], "broken.py cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
    ],
)
def test_what_is_wrong_with_a_kernel_of_the_users_own_is_said(
    own: str, where: str, signature: str, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("import not_there\n")
    path = where.format(own=own, broken=tmp_path / "broken.py")
    assert run(path, *(["--signature", signature] if signature else []), *more) == 2
    assert message in capsys.readouterr().err


def test_one_code_is_compiled_once_and_sizes_do_not_matter() -> None:
    def of(case: str, dtype: torch.dtype = torch.bfloat16) -> str:
        return identity(launches("linear_relu", case, dtype, "sm_90")[0], "sm_90")

    assert of("8192x8192x8192") == of("8192x4096x4096")
    assert len({of("8192x8192x8192"), of("8192x8192x8192", torch.float16), of("1024x1024x1024"), of("ragged blocks")}) == 4


def test_a_damaged_cache_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLACCEL_CACHE_DIR", str(tmp_path))
    launch, report = good(torch.float32)
    assert compile_launches([(launch, "sm_90")] * 2) == [report] * 2
    (cached,) = (tmp_path / "inspect").iterdir()
    assert compile_launch(launch, "sm_90") == report
    cached.write_text(json.dumps(dataclasses.asdict(report) | {"registers": 7}))
    assert compile_launch(launch, "sm_90").registers == 7  # it is read
    for content in ("", "{", '{"kernel": 1, "unknown": 2}'):
        cached.write_text(content)
        assert compile_launch(launch, "sm_90") == report


def test_blocks_per_sm() -> None:
    """Against the occupancy calculator's rules worked by hand."""
    assert blocks_per_sm("sm_90", registers=32, warps=4, shared=0) == 16  # 64 warps
    assert blocks_per_sm("sm_90", registers=255, warps=8, shared=0) == 1  # 65536 / (256 * 32 * 8)
    assert blocks_per_sm("sm_90", registers=65, warps=8, shared=0) == 3  # 72 registers a thread
    assert blocks_per_sm("sm_90", registers=32, warps=4, shared=100 * 1024) == 2  # 228 KB, 1 KB of each block reserved
    assert blocks_per_sm("sm_86", registers=32, warps=1, shared=0) == 16  # blocks
    assert blocks_per_sm("gfx942", registers=128, warps=4, shared=0) == 4  # 512 / 128 waves on each of 4 SIMDs
    assert blocks_per_sm("gfx942", registers=32, warps=4, shared=48 * 1024) == 1


# --- the command ---


def run(*words: str) -> int:
    return cli.main(["inspect", *words])


def test_the_command_prints_writes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "rows.jsonl"
    select = ["--op", "linear_relu", "--case", "1024x1024x1024", "--target", "sm_90", "--dtype", "fp32"]
    assert run(*select, "--json", str(saved)) == 0
    printed = capsys.readouterr().out
    assert "linear_relu_kernel" in printed and "relu_backward_kernel" in printed and "H100" in printed
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(rows) == 2
    for field in (
        "op", "kernel", "dtype", "config", "target", "triton", "registers", "spills", "stack_bytes", "shared_bytes",
        "blocks_per_sm", "tensor_core_ops", "vector_loads", "vector_stores", "scalar_accesses", "predicted_us", "status",
        "reason",
    ):  # fmt: skip
        assert field in rows[0]
    assert run(*select, "--diff", str(saved)) == 0
    assert "no difference" in capsys.readouterr().out
    run(*select, "--config", "GROUP_M=4", "--diff", str(saved))
    printed = capsys.readouterr().out
    assert "linear_relu_kernel: config" in printed and "relu_backward_kernel" not in printed
    assert run("--op", "linear_rely") == 2 and run("--target", "sm_12") == 2 and run("--case", "absent") == 2
    assert run("--op", "linear_relu", "--diff", "no-such-revision") == 2


def selected(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Selection:
    """What these options select; nothing is compiled."""
    seen: list[Selection] = []
    monkeypatch.setattr(inspect, "inspect", lambda selection, jobs, keep: seen.append(selection) or [])
    assert run(*words) == 0
    return seen[0]


def test_options_are_repeated_or_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(*words: str) -> set[str]:
        return {str(case) for case in selected(list(words), monkeypatch).cases}

    both = {"linear_relu/1024x1024x1024", "linear_relu/ragged blocks"}
    assert cases("--op", "linear_relu", "--case", "1024x1024x1024", "--case", "ragged blocks") == both
    assert cases("--op", "linear_relu", "--case", "1024x1024x1024,ragged blocks") == both
    assert cases("--case", "none, weights") == {"cross_entropy/none, weights"}  # a name with a comma
    assert cases("--case", "batch_norm/1-d, weight only") == {"batch_norm/1-d, weight only"}
    assert cases("--case", "x1024x1024") == {str(c) for f in families().values() for c in f.CASES if "x1024x1024" in c.name}
    of_ops = {case.op for case in selected(["--op", "linear_relu", "--op", "batch_norm"], monkeypatch).cases}
    assert of_ops == {"linear_relu", "batch_norm"}
    words = [
        "--target",
        "sm_80",
        "--target",
        "sm_90,gfx942",
        "--dtype",
        "bf16",
        "--dtype",
        "fp16",
        "--kernel",
        "a,b",
        "--kernel=c",
    ]
    found = selected(words, monkeypatch)
    assert (found.targets, found.dtypes) == (["sm_80", "sm_90", "gfx942"], ["bfloat16", "float16"])
    assert found.kernels == ["a", "b", "c"]


def test_kernels_are_selected_by_parts_of_their_names() -> None:
    few = Selection([inspect.gpu_cases("batch_norm")[0]], ["bfloat16"], ["sm_90"], ["gradient", "reduce"])
    assert {launch.name for _, _, launch, _, _ in few.launches()} == {"gradient_kernel", "reduce_kernel"}


def test_full_adds_targets_dtypes_and_candidates() -> None:
    few = Selection([inspect.gpu_cases("linear_relu")[0]], ["bfloat16"], ["sm_90"])
    many = dataclasses.replace(few, candidates=True)
    assert len(list(few.launches())) == 2
    found = list(many.launches())
    assert len(found) > 12 and sum(chosen for *_, chosen in found) == 2
    assert len({inspect.config_of(launch) for _, _, launch, _, _ in found}) == len(found)


WITH_CANDIDATES = {
    "batch_norm": ["256x64x112x112 relu", "256x64x112x112 relu channels_last", "256x512x7x7 relu"],
    "cross_entropy": ["1048576x10", "65536x1000", "8192x32000", "128x128256", "8192x32000 probabilities", "16x150x512x512"],
    "depthwise_conv2d": ["128x128x56 K3", "128x96x56 K7", "64x128x56 K31", "8x64x112 K3 s2"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in WITH_CANDIDATES.items() for name in names])
def test_no_candidate_spills(op: str, name: str) -> None:
    layouts = [case for case in families()[op].CASES if case.name in (name, f"{name} channels_last")]
    found = inspect.inspect(Selection(layouts, ["bfloat16", "float32"], ["sm_90"], candidates=True))
    wrong = [(one.report.kernel, one.dtype, one.config, one.report.reason) for one in found if one.report.status != "ok"]
    assert not wrong and sum(not one.chosen for one in found) >= 6


# --- the model ---


def test_the_model_counts_bytes_and_flops() -> None:
    forward, backward = launches("linear_relu", "8192x4096x4096", torch.bfloat16, "sm_90")
    m, k, n = 8192, 4096, 4096
    assert model.bytes_of(forward) == 2 * (m * k + n * k + m * n + n)
    assert model.flops_of(forward) == 2 * m * n * k
    partial = backward.args[3]
    assert model.bytes_of(backward) == 2 * 3 * m * n + 4 * partial.numel() and model.flops_of(backward) == 0
    expanded = dataclasses.replace(backward, args=(torch.empty(1, device="meta").expand(m, n),))
    assert model.bytes_of(expanded) == 4
    without = dataclasses.replace(backward, options=backward.options | {"BIAS_GRADIENT": False})
    report = compile_launch(without, "sm_90")
    assert report.unused.split(",") == ["partial_db"]
    assert model.bytes_of(without, report.unused) == 2 * 3 * m * n


def test_the_model_predicts_in_proportion() -> None:
    (forward, backward), h100 = launches("linear_relu", "8192x4096x4096", torch.bfloat16, "sm_90"), model.GPUS["H100"]
    reports = compile_launches([(forward, "sm_90"), (backward, "sm_90")])
    product = model.predict(forward, reports[0], "bfloat16", h100)
    assert product.bound == "math" and product.us > product.flops / h100.tensor * 1e6
    prepass = {gpu: model.predict(backward, reports[1], "bfloat16", model.GPUS[gpu]) for gpu in ("H100", "H200")}
    assert prepass["H100"].bound == "memory" and prepass["H200"].us < prepass["H100"].us
    assert prepass["H100"].us > prepass["H100"].bytes / h100.bandwidth * 1e6
    assert 0.5 < prepass["H100"].of_roofline < 1


def test_predictions_stay_once_a_gpu_has_measured_the_op(tmp_path: Path) -> None:
    h100, folder = model.GPUS["H100"], tmp_path / "predicted"

    def rows(us: float) -> list[dict[str, Any]]:
        names = {"case": "c", "dtype": "bfloat16", "kernel": "k", "predicted_us": us}
        return [{"op": op} | names for op in ("measured", "not")]

    def stored() -> dict[str, float]:
        return {r["op"]: r["predicted_us"] for r in map(json.loads, (folder / "H100.jsonl").read_text().splitlines())}

    assert model.write_predictions(h100, rows(1.0), folder) == 2
    assert model.write_predictions(h100, rows(2.0), folder) == 2 and stored() == {"measured": 2.0, "not": 2.0}
    run_ = tmp_path / "some_run"
    run_.mkdir()
    result = {"op": "measured", "provider": "dlaccel", "median_ms": 0.5, "gpu": "NVIDIA H100 80GB HBM3"}
    (run_ / "bench.jsonl").write_text(json.dumps(result) + "\n")
    assert model.write_predictions(h100, rows(3.0), folder) == 1 and stored() == {"measured": 2.0, "not": 3.0}
    (folder / "H100.jsonl").unlink()
    assert model.write_predictions(h100, rows(4.0), folder) == 1 and stored() == {"not": 4.0}  # measured first: it has none
