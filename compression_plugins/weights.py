"""The model side of double quantization: compute with quantized weights, step with exact ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as K
from .codecs import Uniform
from .schemes.double_quantization import DoubleQuantization

#: Widths of the weights' codec, of which the largest is also the largest that the rule gives.
_WIDTHS = (4, 8, 16)


def least_bits(largest: float, distance: float, numel: int, mu: float) -> int | None:
    """The mu rule: fewest bits for which E||Q(x) - x||^2 <= mu ||x - x~||^2, from 2 to 16; None where 16 are too few.

    Args:
        largest: max |x|.
        distance: ||x - x~||, Euclidean, to the snapshot.
        numel: number of elements of x.

    The error of stochastic rounding is at most numel * delta^2 / 4 with delta = max|x| / (2^(b-1) - 1) (Yu, Wu, Huang,
    2019, arXiv 1805.10111).
    """
    if not (math.isfinite(largest) and math.isfinite(distance)) or distance <= 0:
        return None
    levels = largest * math.sqrt(numel / (4 * mu)) / distance
    if levels > 2 ** (_WIDTHS[-1] - 1) - 1:
        return None
    return max(2, math.ceil(math.log2(levels + 1) + 1))


def mu_rule_bits(largest: float, distance: float, numel: int, mu: float) -> int | None:
    """`least_bits` rounded up to 4, 8 or 16; None: send x as it is."""
    needed = least_bits(largest, distance, numel, mu)
    return None if needed is None else next(width for width in _WIDTHS if width >= needed)


def weight_codec(bits: int, numel: int) -> Uniform:
    """One scale for the whole tensor, as the rule assumes."""
    return Uniform(bits, 32 * max(1, -(-numel // 32)))  # type: ignore[arg-type]


class QuantizedWeights:
    """Replaces parameters by their quantized values between optimizer steps.

    All ranks draw the same random numbers, so replicas stay equal bit for bit. Keeps two fp32 copies of each parameter:
    x and the snapshot x~.

    Args:
        scheme: parameters of the method.
        parameters: names and parameters whose weights are quantized (those whose gradients are).
        seed: of the configuration.
    """

    def __init__(self, scheme: DoubleQuantization, parameters: Sequence[tuple[str, Tensor]], seed: int = 0) -> None:
        self.scheme, self.seed = scheme, seed
        self._parameters = dict(parameters)
        self._exact: dict[str, Tensor] = {}
        self._snapshots: dict[str, Tensor] = {}
        self._peaks: dict[str, float] = {}  # max|x~|
        self._quantized: list[str] = []  # names whose parameter holds Q(x), with x in `_exact`
        self._marks = torch.empty(0)
        self.bits: dict[str, int | None] = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Before the optimizer's step: put the exact weights back. Weights that someone has overwritten since stay."""
        if not self._quantized:
            return
        marks = self._sample(self._quantized)
        kept = self._quantized
        if not torch.equal(torch.cat(marks), self._marks):
            known = self._marks.split([len(mark) for mark in marks])
            kept = [name for name, *pair in zip(self._quantized, marks, known) if torch.equal(*pair)]
        if kept:
            torch._foreach_copy_([self._parameters[name] for name in kept], [self._exact[name] for name in kept])
        self._quantized = []

    @torch.no_grad()
    def quantize(self, step: int) -> None:
        """After optimizer step number `step` (from 0): compute the next gradients at Q(x)."""
        if step % self.scheme.snapshot_steps == 0 or not self._snapshots:
            self._take_snapshots({name: p.detach().float().clone() for name, p in self._parameters.items()})
            return
        chosen = []
        for number, (name, (largest, distance)) in enumerate(zip(self._parameters, self._measure())):
            bits = mu_rule_bits(largest, distance, self._parameters[name].numel(), self.scheme.mu)
            self.bits[name] = bits
            if bits is not None:
                chosen.append((name, bits, largest, K.Key(self.seed, number, step, 0, stream=1 << 30)))
        if not chosen:
            return
        self._quantized = [name for name, *_ in chosen]
        self._keep(self._quantized)
        for name, bits, largest, key in chosen:
            p, exact = self._parameters[name], self._exact[name].view(-1)
            if p.dtype == torch.float32 and p.is_contiguous():
                K.uniform_round(exact, bits, largest, key, out=p.detach().view(-1))
            else:
                p.copy_(K.uniform_round(exact, bits, largest, key).view_as(p))
        self._marks = torch.cat(self._sample(self._quantized))

    def _measure(self) -> list[tuple[float, float]]:
        """Of each parameter max|x~| + max|x - x~|, which bounds max|x|, and ||x - x~||, Euclidean."""
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

    def _take_snapshots(self, snapshots: dict[str, Tensor]) -> None:
        self._snapshots = {name: snapshot.contiguous() for name, snapshot in snapshots.items()}
        self._peaks = {name: float(K.stats(snapshot.view(-1))[0]) for name, snapshot in self._snapshots.items()}

    def _sample(self, names: list[str]) -> list[Tensor]:
        """Samples by which overwritten weights are told; a broadcast from C++ leaves no trace but in the values."""
        flats = [self._parameters[name].detach().reshape(-1) for name in names]
        return [flat[:: max(1, flat.numel() // 1024)].to(flats[0].device, torch.float32) for flat in flats]

    def state_dict(self) -> dict[str, Any]:
        exact = {name: self._exact[name].clone() for name in self._quantized}
        return {"exact": exact, "snapshots": {name: t.clone() for name, t in self._snapshots.items()}}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Call after the model's own weights are loaded."""
        self._exact = {name: tensor.clone() for name, tensor in saved["exact"].items()}
        self._take_snapshots({name: tensor.clone() for name, tensor in saved["snapshots"].items()})
        self._quantized = list(self._exact)
        if self._quantized:
            self._marks = torch.cat(self._sample(self._quantized))
