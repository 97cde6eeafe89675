"""The model side of double quantization: compute with quantized weights, step with exact ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import triton_kernels as K
from .._lazy import torch
from ..core.streams import Purpose, stream
from .hooks import StepHook
from .weight_law import WeightLaw, mu_rule_bits

if TYPE_CHECKING:
    from torch import Tensor

_STREAM = stream(Purpose.WEIGHTS)


class QuantizedWeights(StepHook):
    """Replaces parameters by their quantized values while gradients are computed: a `StepHook`.

    All ranks draw the same random numbers, so replicas stay equal bit for bit. Outside forward and backward the
    parameters hold x itself, so what a script writes to them between steps is kept to the last bit. Keeps two fp32
    copies of each parameter: x while Q(x) stands in its place, and the snapshot x~.

    Args:
        law: how finely.
        parameters: names and parameters whose weights are quantized (those whose gradients are).
        seed: of the configuration.
    """

    def __init__(self, law: WeightLaw, parameters: Sequence[tuple[str, Tensor]], seed: int = 0) -> None:
        self.law, self.seed = law, seed
        self._parameters = dict(parameters)
        self._exact: dict[str, Tensor] = {}
        self._snapshots: dict[str, Tensor] = {}
        self._peaks: dict[str, float] = {}  # max|x~|
        self._step: int | None = None  # the last step that is done
        self._quantized: list[str] = []  # names whose parameter holds Q(x), with x in `_exact`
        self.bits: dict[str, int | None] = {}

    @torch.no_grad()
    def after_backward(self) -> None:
        """Put the exact weights back."""
        if self._quantized:
            # `.data`: a graph that is kept for a second backward pass may go on, at exact weights then.
            torch._foreach_copy_(
                [self._parameters[name].data for name in self._quantized],
                [self._exact[name] for name in self._quantized],
            )
            self._quantized = []

    def before_read(self) -> None:
        """The exact weights are those by which the job is judged."""
        self.after_backward()

    def after_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """From now on quantize what the parameters hold when the next forward pass begins."""
        self.after_backward()
        self._step = step
        if step % self.law.snapshot_steps == 0 or not self._snapshots:
            self._snapshots = {}  # taken at the next forward pass, when the script has done with the weights

    @torch.no_grad()
    def before_forward(self) -> None:
        """Compute the next gradients at Q(x). Drawn again within a step, Q(x) is the same."""
        if self._step is None or self._quantized:
            return
        if not self._snapshots:
            self._take_snapshots({name: p.detach().float().clone() for name, p in self._parameters.items()})
            return
        if self._step % self.law.snapshot_steps == 0:
            return
        chosen = []
        for (name, p), (largest, distance) in zip(self._parameters.items(), self._measure()):
            bits = self.bits[name] = mu_rule_bits(largest, distance, p.numel(), self.law.mu)
            if bits is not None:
                key = K.Key(self.seed, zlib.crc32(name.encode()), self._step, 0, _STREAM)
                chosen.append((name, bits, largest, key))
        if not chosen:
            return
        self._quantized = [name for name, *_ in chosen]
        self._keep(self._quantized)
        for name, bits, largest, key in chosen:
            p, exact = self._parameters[name], self._exact[name].view(-1)
            if p.dtype == torch.float32 and p.is_contiguous():
                K.uniform_round(exact, bits, largest, key, out=p.data.view(-1))
            else:
                p.data.copy_(K.uniform_round(exact, bits, largest, key).view_as(p))

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, parameters are exact; afterwards they are what they were."""
        was = bool(self._quantized)
        self.after_backward()
        try:
            yield
        finally:
            if was:
                self.before_forward()

    def _measure(self) -> list[tuple[float, float]]:
        """For each parameter max|x~| + max|x - x~|, which bounds max|x|, and ||x - x~||, Euclidean."""
        moved = [
            K.stats(p.detach().reshape(-1), residual=self._snapshots[name].view(-1), alpha=-1.0)
            for name, p in self._parameters.items()
        ]
        rows = torch.stack([row.to(moved[0].device) for row in moved]).tolist()  # a GPU is waited for once
        return [
            (self._peaks[name] + largest, math.sqrt(squares))
            for name, (largest, _, squares) in zip(self._parameters, rows)
        ]

    def _keep(self, names: list[str]) -> None:
        for name in names:
            if name not in self._exact:
                p = self._parameters[name]
                self._exact[name] = torch.empty(p.shape, dtype=torch.float32, device=p.device)
        torch._foreach_copy_([self._exact[name] for name in names], [self._parameters[name] for name in names])

    def _take_snapshots(self, snapshots: Mapping[str, Tensor]) -> None:
        self._snapshots = {name: snapshot.contiguous() for name, snapshot in snapshots.items()}
        self._peaks = {name: float(K.stats(snapshot.view(-1))[0]) for name, snapshot in self._snapshots.items()}

    def state_dict(self) -> dict[str, Any]:
        step = -1 if self._step is None else self._step
        return {"step": step, "snapshots": {name: t.clone() for name, t in self._snapshots.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Call after the model's own weights are loaded, which are exact ones."""
        self._quantized = []
        step = int(saved.get("step", -1))
        self._step = None if step < 0 else step
        self._take_snapshots({name: t.clone() for name, t in saved.get("snapshots", {}).items()})
