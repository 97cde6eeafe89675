"""The model side of a scheme under ZeRO 1, 2 and BF16_Optimizer: weights travel as codes.

Each rank steps its partition of the master weights, which stay exact, and DeepSpeed then all-gathers the partitions;
here each rank sends the codes of its partition and every rank, the owner too, computes with what they decode to. The
bits of a parameter follow the mu rule (Yu, Wu, Huang, 2019, arXiv 1805.10111).

Nobody holds all exact weights then. Whoever evaluates or saves needs them, rarely: they are gathered at that moment, on
all ranks together, and the decoded ones are put back when training goes on. A rank that is alone with its wish gets an
error instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import triton_kernels as K
from ...core.streams import Purpose, stream
from ...errors import ConfigError
from ...optimizer.hooks import StepHook
from ...optimizer.weight_law import WeightLaw, mu_rule_bits, weight_codec

if TYPE_CHECKING:
    from .backend import CompressedBackend
    from .session import DeepSpeedSession


class Run(NamedTuple):
    """Elements [start, start + numel) of a flat buffer, all of one rank and one parameter, or padding."""

    start: int
    numel: int
    quantized: bool


def gathered_weights(
    session: DeepSpeedSession, backend: CompressedBackend, meet: Callable[[], None]
) -> GatheredWeights | None:
    """The model side that the configuration asks for where ranks hold partitions, or None.

    Args:
        meet: returns when every rank has called it; raises if one does not.

    Raises:
        ConfigError: rules ask for several laws.
    """
    laws = {row.name: row.scheme.weight_law for row in session.plan.rows}
    chosen = {name: law for name, law in laws.items() if law is not None}
    if len(set(chosen.values())) > 1:
        raise ConfigError(f"rules ask for several laws of the weights: {sorted(set(chosen.values()))}; use one")
    return GatheredWeights(session, backend, meet, next(iter(chosen.values())), set(chosen)) if chosen else None


class GatheredWeights(StepHook):
    """A `StepHook` that acts inside DeepSpeed's gather of weights.

    Keeps the snapshot of the own partition only: fp32, 1/n of the model; and while exact weights are in use the decoded
    ones, in the model's dtype.
    """

    def __init__(
        self,
        session: DeepSpeedSession,
        backend: CompressedBackend,
        meet: Callable[[], None],
        law: WeightLaw,
        names: set[str],
    ) -> None:
        self.session, self.law = session, law
        self._backend, self._meet = backend, meet
        optimizer = session.engine.optimizer
        self._flats: list[Tensor] = getattr(optimizer, "bit16_groups_flat", None) or optimizer.bf16_groups_flat
        groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
        self._runs = [self._cut(flat, group, names) for flat, group in zip(self._flats, groups, strict=True)]
        self._index = {flat.data_ptr(): i for i, flat in enumerate(self._flats)}
        self._snapshots: dict[int, Tensor] = {}
        self._step: int | None = None  # the step whose codes are drawn again
        self._coarse = False  # whether the model holds decoded weights, or exact ones in their place
        self._decoded: list[Tensor] | None = None  # those, while it holds exact ones

    # -- around the optimizer's step

    def before_forward(self) -> None:
        """Compute with the decoded weights."""
        if self._decoded is not None:
            for flat, decoded in zip(self._flats, self._decoded):
                flat.data.copy_(decoded)
            self._decoded = None

    def before_read(self) -> None:
        """All ranks together."""
        self.make_exact()

    def make_exact(self) -> None:
        """Let the model hold the exact weights until the next forward pass that trains; all ranks call it together.

        Raises:
            MismatchError: another rank did not come.
        """
        if not self._coarse or self._decoded is not None:
            return
        self._meet()
        self._decoded = [flat.detach().clone() for flat in self._flats]
        with self._backend.gather_codes(None):
            self.session.engine.optimizer.update_lp_params()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the model holds the exact weights; all ranks enter together."""
        self.make_exact()
        yield

    def resume(self) -> None:
        """After the weights are loaded: compute with what the last step's gather gave, the same codes drawn again."""
        self._decoded, self._coarse = None, False
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
        """Fill `output` with every rank's decoded partition; `mine` is this rank's, a view of it.

        False: the exact all-gather is due, of a snapshot or of a buffer that holds no weights.
        """
        index = self._index.get(output.data_ptr())
        if index is None:
            return False
        step = self.session.reducer.step if self._step is None else self._step
        self._decoded, self._coarse = None, False
        if step + 1 < self.session.common.config.warmup_steps:
            return False
        if index not in self._snapshots or step % self.law.snapshot_steps == 0:
            self._snapshots[index] = mine.float().clone()
            return False
        self._coarse = True
        self._exchange(index, step, output, mine)
        return True

    def _exchange(self, index: int, step: int, output: Tensor, mine: Tensor) -> None:
        runs, transport = self._runs[index], self.session.reducer.transport
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

    def _cut(self, flat: Tensor, group: list[Tensor], names: set[str]) -> list[list[Run]]:
        """For each rank the runs in its partition of `flat`, which cover it without gaps."""
        size = flat.numel() // self.session.size
        marks = []
        for p in group:
            start = (p.data_ptr() - flat.data_ptr()) // flat.element_size()
            marks.append((start, start + p.numel(), self.session.names[id(p)] in names))
        parts: list[list[Run]] = []
        for rank in range(self.session.size):
            low, high, position = rank * size, (rank + 1) * size, rank * size
            runs: list[Run] = []
            for start, stop, quantized in sorted(marks):
                first, last = max(start, low), min(stop, high)
                if first < last:
                    if position < first:
                        runs.append(Run(position, first - position, False))
                    runs.append(Run(first, last - first, quantized))
                    position = last
            if position < high:
                runs.append(Run(position, high - position, False))
            parts.append(runs)
        return parts

    def _bits(self, mine: Tensor, snapshot: Tensor, runs: list[Run]) -> list[int]:
        """Bits of each run by the mu rule; 0 where the values themselves are as short, or required."""
        cuts = [run.numel for run in runs]
        measures = [
            torch.stack([x.abs().max().float(), (x.float() - before).norm()])
            for x, before, run in zip(mine.split(cuts), snapshot.split(cuts), runs, strict=True)
            if run.quantized
        ]
        values = iter(torch.stack(measures).tolist() if measures else [])
        found = []
        for run in runs:
            bits = None
            if run.quantized:
                largest, distance = next(values)
                bits = mu_rule_bits(largest, distance, run.numel, self.law.mu)
            found.append(bits if bits is not None and bits < 8 * mine.element_size() else 0)
        return found


def _nbytes(numel: int, bits: int, element_size: int) -> int:
    """Length of a run's payload, a multiple of four; `bits` 0 stands for the values themselves."""
    return weight_codec(bits, numel).nbytes(numel) if bits else -(-numel * element_size // 4) * 4
