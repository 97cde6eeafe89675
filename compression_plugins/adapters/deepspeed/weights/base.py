"""What is common to the ways in which weights travel.

Each rank steps its partition of the master weights, which stay exact, and DeepSpeed then all-gathers the partitions;
here a rank sends less, and every rank, the owner too, computes with what all have received.

Where that loses something, nobody holds all exact weights. Whoever evaluates or saves needs them, rarely: they are
gathered at that moment, on all ranks together, and the received ones are put back when training goes on. A rank that is
alone with its wish gets an error instead of waiting for ever.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ....optimizer.hooks import StepHook

if TYPE_CHECKING:
    from ....transports.base import Transport
    from ..backend import CompressedBackend
    from ..session import DeepSpeedSession


class Run(NamedTuple):
    """Elements [start, start + numel) of a flat buffer, all of one rank and one parameter, or padding."""

    start: int
    numel: int
    coded: bool


class GatheredWeights(StepHook):
    """A `StepHook` that acts inside DeepSpeed's gather of weights.

    Args:
        meet: returns when every rank has called it; raises if one does not.
        names: of the parameters that do not travel as they are.
    """

    def __init__(
        self, session: DeepSpeedSession, backend: CompressedBackend, meet: Callable[[], None], names: set[str]
    ) -> None:
        self.session = session
        self._backend, self._meet = backend, meet
        optimizer = session.engine.optimizer
        self._flats: list[Tensor] = getattr(optimizer, "bit16_groups_flat", None) or optimizer.bf16_groups_flat
        groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
        self._runs = [self._cut(flat, group, names) for flat, group in zip(self._flats, groups, strict=True)]
        self._index = {flat.data_ptr(): i for i, flat in enumerate(self._flats)}
        self._coarse = False  # whether the model holds received weights, or exact ones in their place
        self._received: list[Tensor] | None = None  # those, while it holds exact ones

    # -- around the optimizer's step

    def before_forward(self) -> None:
        """Compute with the received weights."""
        if self._received is not None:
            for flat, received in zip(self._flats, self._received):
                flat.data.copy_(received)
            self._received = None

    def before_read(self) -> None:
        """All ranks together."""
        self.make_exact()

    def make_exact(self) -> None:
        """Let the model hold the exact weights until the next forward pass that trains; all ranks call it together.

        Raises:
            MismatchError: another rank did not come.
        """
        if not self._coarse or self._received is not None:
            return
        self._meet()
        self._received = [flat.detach().clone() for flat in self._flats]
        with self._backend.gather_codes(None):
            self.session.engine.optimizer.update_lp_params()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the model holds the exact weights; all ranks enter together."""
        self.make_exact()
        yield

    def begin_step(self) -> None:
        """The optimizer is about to step."""

    @abstractmethod
    def resume(self) -> None:
        """The master weights are loaded, and the model holds them: go on from what it held when the state was saved."""

    @abstractmethod
    def gather(self, output: Tensor, mine: Tensor) -> bool:
        """Fill `output` with every rank's partition; `mine` is this rank's, a view of it.

        False: the exact all-gather is due, of what may not be compressed or of a buffer that holds no weights.
        """

    @abstractmethod
    def wire_bytes(self) -> float | None:
        """Bytes that a rank sends per step, the mean over ranks; None where that depends on the values."""

    def dense_bytes(self) -> float:
        """The same where the values travel as they are."""
        return (
            sum(flat.numel() * flat.element_size() for flat in self._flats)
            * (self.session.size - 1)
            / self.session.size
        )

    # -- for those that derive from it

    @property
    def _transport(self) -> Transport:
        return self.session.reducer.transport

    def _own(self, flat: Tensor) -> Tensor:
        """This rank's partition."""
        numel = flat.numel() // self.session.size
        return flat.data[self.session.rank * numel : (self.session.rank + 1) * numel]

    def _count_dense(self, output: Tensor) -> None:
        """The step has gathered this buffer, by whatever it has sent for it."""
        size = self.session.size
        self.session.reducer.beside += output.numel() * output.element_size() * (size - 1) / size

    def _gather_exactly(self, output: Tensor, mine: Tensor) -> None:
        """Every rank's partition as it is."""
        rows = self._transport.all_gather(mine.contiguous().view(torch.uint8)).wait()
        output.data.copy_(rows.view(-1).view(output.dtype))

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
            for start, stop, coded in sorted(marks):
                first, last = max(start, low), min(stop, high)
                if first < last:
                    if position < first:
                        runs.append(Run(position, first - position, False))
                    runs.append(Run(first, last - first, coded))
                    position = last
            if position < high:
                runs.append(Run(position, high - position, False))
            parts.append(runs)
        return parts
