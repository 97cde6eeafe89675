"""The finite sum that workers differentiate: a module, a loss and a data set, seen as flat fp32 vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from ..errors import CompressionError, UnsupportedError

#: The header counts payload bytes in 32 bits.
MAX_NUMEL = 2**30 - 1
Forward = Callable[[nn.Module, Any], Tensor]


class Problem:
    """f(x) = (1/n) sum_i f_i(x).

    Args:
        model: any module; its parameters that require gradients are optimized. A private copy is made.
        loss_fn: `loss_fn(model(inputs), targets)` is the *mean* loss over a batch `(inputs, targets)`.
        loader: a DataLoader (its data set and collate function are used; sampling is by index) or a map-style data set.
        forward: for batches of another form: `forward(model, batch)` is the mean loss; `loss_fn` is not used then.
        device: where gradients are computed.

    Raises:
        UnsupportedError: a data set that cannot be indexed, or a model that nothing can be learnt in.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        loader: Any,
        forward: Forward | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self._model = copy.deepcopy(model).to(self.device)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._loss_fn, self._forward = loss_fn, forward
        self.data = loader.dataset if isinstance(loader, DataLoader) else loader
        self._collate = (loader.collate_fn if isinstance(loader, DataLoader) else None) or default_collate
        if isinstance(self.data, IterableDataset) or not hasattr(self.data, "__len__"):
            raise UnsupportedError(
                "the data set cannot be indexed; the parameter server shards by index and visits samples again, so it "
                "needs a map-style data set with __len__ and __getitem__"
            )
        self.samples, self.numel = len(self.data), sum(p.numel() for p in self._parameters)
        if not self.samples:
            raise UnsupportedError("the data set is empty")
        if not 0 < self.numel <= MAX_NUMEL:
            raise UnsupportedError(f"{self.numel:,} parameters require gradients; 1 to {MAX_NUMEL:,} are possible")
        if loss_fn is None and forward is None:
            raise CompressionError("give loss_fn, or forward for batches that are not (inputs, targets)")
        self._start = flatten(self._parameters)

    def start(self) -> Tensor:
        """The model's parameters as they were given, fp32 CPU [numel]."""
        return self._start.clone()

    def gradient(self, x: Tensor, indices: np.ndarray, seed: int) -> tuple[float, Tensor]:
        """Mean loss and its gradient (fp32 CPU [numel]) over samples `indices`, at x.

        Equal seeds give equal dropout masks, so that two points are compared on the same random function.
        """
        self._assign(x)
        return self._differentiate(self._batch(indices), seed)

    def total(self, x: Tensor, indices: np.ndarray, chunk: int, seed: int) -> tuple[float, Tensor]:
        """Sums, not means, of losses and gradients over samples `indices`, `chunk` at a time."""
        self._assign(x)
        loss, gradient = 0.0, torch.zeros(self.numel)
        for first in range(0, len(indices), chunk):
            piece = indices[first : first + chunk]
            mean, part = self._differentiate(self._batch(piece), seed)
            loss += mean * len(piece)
            gradient.add_(part, alpha=len(piece))
        return loss, gradient

    @torch.no_grad()
    def loss(self, x: Tensor, chunk: int = 1024) -> float:
        """f(x), the mean loss over all samples, computed `chunk` samples at a time; x: fp32 [numel]."""
        self._assign(x)
        pieces = np.array_split(np.arange(self.samples), -(-self.samples // chunk))
        return sum(float(self._value(self._batch(piece))) * len(piece) for piece in pieces) / self.samples

    @torch.no_grad()
    def estimate_batch_statistics(self, model: nn.Module, chunk: int, seed: int) -> None:
        """Running statistics of `model`'s batch normalisation, anew from all samples, about `chunk` at a time.

        `model` stays on its device. Layers that are not in training mode have used their running statistics all along,
        and keep them.
        """
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = {m: m.momentum for m in layers if m.training and m.track_running_stats}
        if not momenta:
            return
        device = next(model.parameters()).device
        order = np.random.Generator(np.random.Philox(seed)).permutation(self.samples)
        pieces = np.array_split(order, -(-self.samples // chunk))  # of equal size: none of a single sample
        try:
            for layer in momenta:
                layer.reset_running_stats()
                layer.momentum = None  # the mean over batches
            with seeded(seed, device):
                for piece in pieces:
                    self._mean_loss(model, _move(self._batch(piece), device))
        finally:
            for layer, momentum in momenta.items():
                layer.momentum = momentum

    def _assign(self, x: Tensor) -> None:
        unflatten(x, self._parameters)

    def _batch(self, indices: np.ndarray) -> Any:
        if isinstance(self.data, TensorDataset) and self._collate is default_collate:
            batch: Any = self.data[torch.from_numpy(indices)]
        elif hasattr(self.data, "__getitems__"):
            batch = self._collate(self.data.__getitems__(indices.tolist()))
        else:
            batch = self._collate([self.data[index] for index in indices.tolist()])
        return batch if self.device.type == "cpu" else _move(batch, self.device)

    def _value(self, batch: Any) -> Tensor:
        return self._mean_loss(self._model, batch)

    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self._forward is not None:
            return self._forward(model, batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise CompressionError(
                f"a batch is a {type(batch).__name__}, not (inputs, targets): give forward=, which turns a model and a "
                "batch into the mean loss"
            )
        return self._loss_fn(model(batch[0]), batch[1])  # type: ignore[misc]

    def _differentiate(self, batch: Any, seed: int) -> tuple[float, Tensor]:
        with seeded(seed, self.device):
            loss = self._value(batch)
        if loss.numel() != 1:
            raise CompressionError(
                f"the loss has shape {tuple(loss.shape)}; it must be the mean over the batch, a scalar"
            )
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found)]
        return float(loss.detach()), flatten(gradients)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch from `seed`, and as they were afterwards.

    Not `torch.manual_seed`: it formats a stack trace for every kind of device that is not in use.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states):
            generator.set_state(state)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors behind each other, as fp32 on the CPU: [sum of numel], a copy."""
    return torch.cat([t.detach().to("cpu", torch.float32).reshape(-1) for t in tensors])


@torch.no_grad()
def unflatten(x: Tensor, parameters: Sequence[Tensor]) -> None:
    """Write fp32 [sum of numel] into `parameters`, in order."""
    for parameter, piece in zip(parameters, x.split([p.numel() for p in parameters])):
        parameter.copy_(piece.view_as(parameter))


def _move(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):  # tensors, and batches that know how
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _move(value, device) for key, value in batch.items()}
    if hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(_move(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_move(value, device) for value in batch)
    return batch
