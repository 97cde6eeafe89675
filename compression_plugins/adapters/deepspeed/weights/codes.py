"""Weights travel as their own codes (double quantization), under ZeRO 1, 2 and BF16_Optimizer.

Each rank sends the codes of its partition, and every rank, the owner too, computes with what they decode to. The bits
of a parameter follow the mu rule (Yu, Wu, Huang, 2019, arXiv 1805.10111).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .... import triton_kernels as K
from ....core.streams import Purpose, stream
from ....optimizer.weight_law import WeightLaw, mu_rule_bits, weight_codec
from .base import GatheredWeights, Run

if TYPE_CHECKING:
    from ..backend import CompressedBackend
    from ..session import DeepSpeedSession


class Codes(GatheredWeights):
    """Keeps the snapshot of the own partition only: fp32, 1/n of the model."""

    def __init__(
        self,
        session: DeepSpeedSession,
        backend: CompressedBackend,
        meet: Callable[[], None],
        names: set[str],
        law: WeightLaw,
    ) -> None:
        super().__init__(session, backend, meet, names)
        self.law = law
        self._snapshots: dict[int, Tensor] = {}
        self._step: int | None = None  # the step whose codes are drawn again

    def wire_bytes(self) -> float | None:
        return None

    def resume(self) -> None:
        """After the weights are loaded: compute with what the last step's gather gave, the same codes drawn again."""
        self._received, self._coarse = None, False
        if self.session.reducer.step and self._snapshots:
            self._step = self.session.reducer.step - 1
            with self._backend.gather_codes(self):
                self.session.engine.optimizer.update_lp_params()
            self._step = None

    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": {index: snapshot.clone() for index, snapshot in self._snapshots.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        device = self.session.engine.device
        snapshots = saved.get("snapshots", {})
        self._snapshots = {int(index): snapshot.clone().to(device) for index, snapshot in snapshots.items()}

    # -- inside the gather

    @torch.no_grad()
    def gather(self, output: Tensor, mine: Tensor) -> bool:
        index = self._index.get(output.data_ptr())
        if index is None:
            return False
        step = self.session.reducer.step if self._step is None else self._step
        self._received, self._coarse = None, False
        if step + 1 < self.session.common.config.warmup_steps:
            return False
        if index not in self._snapshots or step % self.law.snapshot_steps == 0:
            self._snapshots[index] = mine.float().clone()
            return False
        self._coarse = True
        self._count_dense(output)
        self._exchange(index, step, output, mine)
        return True

    def _exchange(self, index: int, step: int, output: Tensor, mine: Tensor) -> None:
        runs, transport = self._runs[index], self._transport
        own = runs[transport.rank]
        most = max(map(len, runs))
        bits = self._bits(mine, self._snapshots[index], own)
        widths = torch.tensor(bits + [0] * (most - len(bits)), dtype=torch.int32, device=mine.device)
        rows: list[list[int]] = transport.all_gather(widths).wait().tolist()
        lengths = [
            [_nbytes(run.numel, width, mine.element_size()) for run, width in zip(part, row, strict=False)]
            for part, row in zip(runs, rows, strict=True)
        ]
        payload = torch.zeros(max(map(sum, lengths)), dtype=torch.uint8, device=mine.device)
        base = own[0].start if own else 0
        slots = payload[: sum(lengths[transport.rank])].split(lengths[transport.rank])
        for number, (run, width, slot) in enumerate(zip(own, bits, slots, strict=True)):
            x = mine[run.start - base : run.start - base + run.numel]
            if width:
                draw = stream(Purpose.WEIGHTS, micro_batch=index)
                key = K.Key(self.session.common.config.seed, number, step, transport.rank, draw)
                weight_codec(width, run.numel).encode(x.float(), key, out=slot)
            else:
                raw = x.contiguous().view(torch.uint8)
                slot[: raw.numel()] = raw
        received = transport.all_gather(payload).wait()
        for part, row, sizes, data in zip(runs, rows, lengths, received, strict=True):
            for run, width, slot in zip(part, row, data[: sum(sizes)].split(sizes), strict=False):
                home = output[run.start : run.start + run.numel]
                if width:
                    home.copy_(weight_codec(width, run.numel).decode(slot, run.numel))
                else:
                    home.copy_(slot[: run.numel * home.element_size()].view(home.dtype))

    def _bits(self, mine: Tensor, snapshot: Tensor, runs: list[Run]) -> list[int]:
        """Bits of each run by the mu rule; 0 where the values themselves are as short, or required."""
        cuts = [run.numel for run in runs]
        measures = [
            torch.stack([x.abs().max().float(), (x.float() - before).norm()])
            for x, before, run in zip(mine.split(cuts), snapshot.split(cuts), runs, strict=True)
            if run.coded
        ]
        values = iter(torch.stack(measures).tolist() if measures else [])
        found = []
        for run in runs:
            bits = None
            if run.coded:
                largest, distance = next(values)
                bits = mu_rule_bits(largest, distance, run.numel, self.law.mu)
            found.append(bits if bits is not None and bits < 8 * mine.element_size() else 0)
        return found


def _nbytes(numel: int, bits: int, element_size: int) -> int:
    """Length of a run's payload, a multiple of four; `bits` 0 stands for the values themselves."""
    return weight_codec(bits, numel).nbytes(numel) if bits else -(-numel * element_size // 4) * 4
