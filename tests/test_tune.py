"""Measured configurations: tuning with an injected timer, and the tables it writes. No GPU is needed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dlaccel
from dlaccel.bench.tune import tune
from dlaccel.kernels import config, launch, measured
from dlaccel.kernels import linear_relu as kernels
from tests.kit import DEVICE

H100 = config.TARGETS["sm_90"]
CPU = torch.device("cpu")
SIZES = (4096, 2048, 512)


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DLACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    config.forget_measured()
    with config.assume(H100):
        yield
    config.forget_measured()


def chosen(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Any], str]:
    sizes = (*(sizes or SIZES), True)
    return kernels.forward_config(CPU, dtype, *sizes), kernels.forward_config.source(CPU, dtype, *sizes)


def arguments(m: int = 4096, n: int = 2048, k: int = 512) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, k), (n, k), (n,)))


def timer_of(cost: Callable[[dict[str, Any]], float]) -> Callable[[Callable[[], Any]], float]:
    """A timer that runs nothing: the cost of the options that the call would launch with."""

    def microseconds(call: Callable[[], Any]) -> float:
        with launch.recording() as recorded:
            call()
        return cost(recorded[0].options)

    return microseconds


def simulated(cost: Callable[[dict[str, Any]], float], *args: torch.Tensor) -> list[Any]:
    with launch.recording():
        return tune("linear_relu", [args or arguments()], timer=timer_of(cost))


# --- tuning ---


def test_resume_measures_only_what_the_table_does_not_hold() -> None:
    timed: list[dict[str, Any]] = []

    def cost(options: dict[str, Any]) -> float:
        timed.append(options)
        return 10.0

    once = len(simulated(cost)), len(timed)
    with launch.recording():
        assert tune("linear_relu", [arguments()], timer=timer_of(cost), resume=True) == [] and len(timed) == once[1]
        assert len(tune("linear_relu", [arguments(), arguments(512)], timer=timer_of(cost), resume=True)) == once[0]


def test_the_fastest_candidate_is_chosen_from_then_on() -> None:
    static, source = chosen()
    assert source == "static choice"
    best = {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4, "SUBTILE": True}
    assert best in kernels.forward_config.alternatives(H100, torch.bfloat16, *SIZES, True) and best != static

    def cost(options: dict[str, Any]) -> float:
        return 10.0 if all(options.get(name) == value for name, value in best.items()) else 20.0

    results = {tuned.choice: tuned for tuned in simulated(cost)}
    assert results.keys() == {"linear_relu.forward", "linear_relu.prepass"}
    forward = results["linear_relu.forward"]
    assert forward.config == best and (forward.us, forward.static_us) == (10.0, 20.0) and forward.failed == ()
    assert chosen() == (best, f"measured on this device ({measured.user_file(H100.name)})")
    assert chosen(3000, 1500, 300)[0] == best  # the same bucket
    assert chosen(8192, 2048, 512)[0] == static  # another
    assert chosen(dtype=torch.float16)[1] == "static choice"
    with config.assume(config.TARGETS["sm_100"]):
        assert chosen()[1] == "static choice"


def test_where_the_static_choice_wins_it_stays() -> None:
    static, _ = chosen()
    simulated(lambda options: 1.0 if all(options.get(k) == v for k, v in static.items()) else 2.0)
    config_, source = chosen()
    assert config_ == static and source.startswith("measured")


def test_candidates_that_fail_are_left_out() -> None:
    def cost(options: dict[str, Any]) -> float:
        if options["num_warps"] == 4:
            raise RuntimeError("out of resources")
        return float(options["BLOCK_M"])

    forward = simulated(cost)[0]
    assert forward.config["num_warps"] == 8 and forward.config["BLOCK_M"] == 128
    assert len(forward.failed) > 3 and all("out of resources" in reason for reason in forward.failed)


LOGITS = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(DEVICE)  # more classes than a tile holds
CALLS: list[tuple[str, Any, set[str]]] = [  # op, case or arguments, the choices consulted
    ("linear_relu", "ragged blocks", {"linear_relu.forward", "linear_relu.prepass"}),
    ("batch_norm", "2-d, relu", {"batch_norm.forward", "batch_norm.backward"}),
    ("batch_norm", "ragged blocks, channels_last", {"batch_norm.forward", "batch_norm.backward"}),
    ("cross_entropy", "none, weights", {"cross_entropy.tile"}),
    ("cross_entropy", "images, none", {"cross_entropy.tile"}),
    (
        "cross_entropy",
        (LOGITS, torch.tensor([0, 1499, 7], device=DEVICE)),
        {"cross_entropy.tile", "cross_entropy.slices", "cross_entropy.backward"},
    ),
    ("cross_entropy", (LOGITS, LOGITS.softmax(1)), {"cross_entropy.prob", "cross_entropy.backward"}),
    ("cross_entropy", "probabilities, images, none", {"cross_entropy.prob", "cross_entropy.tile"}),
    *(
        ("depthwise_conv2d", sample, {f"depthwise_conv.{of}" for of in choices})
        for sample, choices in (
            ("bias", ("planes", "planes_wgrad")),
            ("1x9", ("planes", "dgrad", "planes_wgrad")),
            ("4x5 channels_last", ("forward", "dgrad", "wgrad")),
        )
    ),
]


@pytest.mark.parametrize(("op", "call", "choices"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_candidates_give_the_values_of_the_static_choice(op: str, call: Any, choices: set[str]) -> None:
    """The configurations of an H100, interpreted; tune compares the outputs."""
    found = tune(op, [call], dtype=torch.float32, timer=lambda call: 1.0)
    assert {tuned.choice for tuned in found} == choices
    for tuned in found:
        assert not tuned.failed and 3 <= tuned.tried - 1 <= 14, tuned


def test_a_candidate_with_other_values_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs the candidates; one of them is made to compute something else."""
    blocks = [{"BLOCK_M": m, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2} for m in (32, 16, 64)]
    monkeypatch.setattr(kernels.forward_config, "candidates", lambda *args: blocks)

    class Broken(launch.Prepared):
        def __call__(self, *args: Any) -> None:
            super().__call__(*args)
            if self.options.get("BLOCK_M") == 16 and self.kernel is kernels.linear_relu_kernel:
                args[3].add_(1)

    monkeypatch.setattr(kernels, "Prepared", Broken)
    x, w = torch.randn(5, 7, device=DEVICE), torch.randn(4, 7, device=DEVICE)
    with config.assume(config.INTERPRETER):
        tuned = tune("linear_relu", [(x, w)], timer=lambda call: call() and 1.0)[0]
    assert tuned.tried == 3 and len(tuned.failed) == 1 and "other values" in tuned.failed[0]


def test_both_passes_in_one_launch_are_tried_apart() -> None:
    """Their programs wait for each other: if they ever wait for nothing, everything else has been measured."""
    x, vector = torch.empty(256, 64, 14, 14, dtype=torch.bfloat16, device="meta"), torch.empty(64, device="meta")
    asked: list[bool] = []

    def cost(options: dict[str, Any]) -> float:
        asked.append("LAG" in options)
        return 5.0 if asked[-1] else 10.0

    with launch.recording():
        apart = tune("batch_norm", [(x, None, None, vector, vector, True)], timer=timer_of(cost))
        assert {one.choice for one in apart} == {"batch_norm.forward", "batch_norm.backward"} and not any(asked)
        together = tune("batch_norm", [(x, None, None, vector, vector, True)], timer=timer_of(cost), one_launch=True)
    assert any(asked) and all("TICKET" in one.config and one.tried < apart[0].tried for one in together) and together


def test_tuning_needs_a_gpu_or_a_timer() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no GPU"):
            tune("linear_relu", [arguments()])
    assert dlaccel.tune is tune
    with pytest.raises(ValueError, match="op: expected one of"):
        tune("linear_rely", timer=lambda call: 1.0)


def test_explain_says_where_a_configuration_is_from() -> None:
    simulated(lambda options: float(options["num_warps"]))
    assert "measured on this device" in kernels.explain("linear_relu", *arguments())


# --- tables ---


def entry(**blocks: Any) -> dict[str, Any]:
    return {"config": blocks, "us": 1.0, "static_us": 2.0, "time_utc": "2026-01-01T00:00:00+00:00"}


def candidate() -> dict[str, Any]:
    return kernels.forward_config.alternatives(H100, torch.bfloat16, *SIZES, True)[1]


def key() -> str:
    return measured.key("linear_relu.forward", torch.bfloat16, (*SIZES, True))


def test_the_users_table_comes_before_the_shipped_one() -> None:
    first, second = kernels.forward_config.alternatives(H100, torch.bfloat16, *SIZES, True)[1:3]
    measured.save(measured.SHIPPED / measured.file_name("H100"), "H100", {key(): entry(**first)})
    config.forget_measured()
    assert chosen()[0] == first
    measured.save(measured.user_file("H100"), "H100", {key(): entry(**second)})
    config.forget_measured()
    assert chosen()[0] == second


def test_launchers_follow_every_change_of_a_choice() -> None:
    """They keep what they prepared, until another configuration may be due."""

    def started() -> dict[str, Any]:
        with launch.recording() as recorded:
            kernels.linear_relu(*arguments())
        options = recorded[0].options
        return {name: options[name] for name in candidate() if name in options}

    static, other = started(), candidate()
    assert static == chosen()[0] != other
    with kernels.forward_config.using(other):
        assert started() == other
    assert started() == static
    with config.assume(config.TARGETS["sm_80"]):
        assert "SUBTILE" not in started()
    with config.consulting() as consulted:
        assert started() == static
    assert [asked[0] for asked in consulted] == [kernels.forward_config]
    measured.save(measured.user_file("H100"), "H100", {key(): entry(**other)})
    config.forget_measured()
    assert started() == other


def test_another_version_of_torch_or_triton_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.save(measured.user_file("H100"), "H100", {key(): entry(**candidate())})
    for module in (torch, measured.triton):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "99.0.0")
            config.forget_measured()
            assert chosen()[1] == "static choice"
    config.forget_measured()
    assert chosen()[1].startswith("measured")


def test_blocks_that_the_kernel_does_not_offer_are_not_taken() -> None:
    static = chosen()[0]
    for change in ({"BLOCK_K": 48}, {"BLOCK_M": 4096}, {"OTHER": 1}):
        measured.save(measured.user_file("H100"), "H100", {key(): entry(**(candidate() | change))})
        config.forget_measured()
        config_, source = chosen()
        assert config_ == static and "no candidate" in source


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\x00", b"[]", b"null", b'"x"', b"{}", b'{"schema": 1}',
        b'{"schema": "1", "device": "H100", "entries": {}}',
        b'{"schema": 2, "device": "H100", "entries": {}}', b'{"schema": 1, "device": "H200", "entries": {}}',
        b'{"schema": 1, "device": "H100", "entries": []}', b'{"schema": 1, "device": "H100", "entries": {"KEY": 3}}',
        b'{"schema": 1, "device": "H100", "entries": {"KEY": {"config": {"BLOCK_M": [1]}}}}',
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_ignored_with_a_warning(content: bytes) -> None:
    static = chosen()[0]
    path = measured.user_file("H100")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.replace(b"KEY", key().encode()))
    config.forget_measured()
    with pytest.warns(UserWarning, match=r"H100.json: .*; ignored"):
        assert chosen() == (static, "static choice")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert chosen(100, 200, 300)[1] == "static choice"
    with pytest.warns(UserWarning, match="moved to H100.json.ignored"):  # and kept aside when a table is written
        measured.save(path, "H100", {key(): entry(**candidate())})
    assert path.with_name("H100.json.ignored").read_bytes() == content.replace(b"KEY", key().encode())
    config.forget_measured()
    assert chosen()[0] == candidate()


def test_a_folder_that_cannot_be_read_is_no_error() -> None:
    measured.user_file("H100").mkdir(parents=True)
    config.forget_measured()
    with pytest.warns(UserWarning, match="ignored"):
        assert chosen()[1] == "static choice"


def _write(path: Path, first: int, count: int) -> None:
    for i in range(first, first + count):
        measured.save(path, "H100", {f"entry {i}": entry(N=i)})


def test_concurrent_writers_lose_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, 25 * i, 25)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert json.loads(path.read_text())["entries"] == {f"entry {i}": entry(N=i) for i in range(100)}


def _write_for_ever(path: Path) -> None:
    for i in range(10**9):
        measured.save(path, "H100", {f"entry {i % 50}": entry(N=i)} | {f"filling {j}": entry(N=j) for j in range(500)})


def test_a_killed_writer_leaves_a_whole_table(tmp_path: Path) -> None:
    """kill -9 at any moment: the table reads, holds what was there, and the next writer is not locked out."""
    path = tmp_path / "table.json"
    measured.save(path, "H100", {"before": entry(N=-1)})
    context, rng, abandoned = multiprocessing.get_context("fork"), random.Random(0), 0
    for _ in range(25):
        writer = context.Process(target=_write_for_ever, args=(path,))
        writer.start()
        time.sleep(rng.uniform(0.01, 0.06))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        abandoned += len(list(tmp_path.glob("*.tmp")))
        table, problem = measured._read(path, "H100")
        assert problem == "" and table["before"] == entry(N=-1)
    assert abandoned  # some were killed in mid-write
    measured.save(path, "H100", {"after": entry(N=-2)})
    assert {"before", "after"} <= measured._read(path, "H100")[0].keys() and not list(tmp_path.glob("*.tmp"))
