"""What every rank holds of the weights before a step, for those ways that send a change to it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....engine.notice import warn
from .base import GatheredWeights

if TYPE_CHECKING:
    from ..backend import CompressedBackend
    from ..session import DeepSpeedSession


class HeldWeights(GatheredWeights):
    """Keeps the own partition during the step, as all ranks hold it: 1/n of the model, in its dtype.

    A script may have written to the model between steps. Where ranks wrote alike, changes are to what it wrote; where
    they did not, which a checksum that travels along shows, this step's weights travel whole, as they do without
    compression in every step.
    """

    #: Whether ranks do not end with the very bits of the owner.
    _loses = False

    def __init__(
        self, session: DeepSpeedSession, backend: CompressedBackend, meet: Callable[[], None], names: set[str]
    ) -> None:
        super().__init__(session, backend, meet, names)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._lossy: set[int] = set()  # flat buffers that hold something else than the exact weights
        self._warned = False

    def begin_step(self) -> None:
        self.before_forward()
        self._held = {i: (self._own(flat).clone(), checksum(flat.data)) for i, flat in enumerate(self._flats)}

    @torch.no_grad()
    def gather(self, output: Tensor, mine: Tensor) -> bool:
        index = self._index.get(output.data_ptr())
        if index is None or index not in self._held:
            return False
        held, own_sum = self._held.pop(index)
        self._received = None
        if self.session.reducer.step + 1 < self.session.common.config.warmup_steps:
            exact = True
        else:
            exact = not self._exchange(index, output.data, mine.data, held, own_sum)
            if exact and not self._warned:
                self._warned = True
                warn("DeepSpeed: ranks have written different values to the model; its weights travel whole this once")
        if exact:
            self._gather_exactly(output, mine)
        self._count_dense(output)
        self._lossy.discard(index)
        if self._loses and not exact:
            self._lossy.add(index)
        self._coarse = bool(self._lossy)
        return True

    @abstractmethod
    def _exchange(self, index: int, output: Tensor, mine: Tensor, held: Tensor, own_sum: Tensor) -> bool:
        """Make `output`, which but for this rank's partition `mine` is what all ranks held, the new weights; False,
        with nothing but `mine` as it was, where ranks held different ones.

        Args:
            held: what all ranks held of this rank's partition.
            own_sum: `checksum` of what this rank held of everything, int64 [1].
        """


def checksum(flat: Tensor) -> Tensor:
    """int64 [1], of all bits of `flat`."""
    octets = flat.view(torch.uint8)
    whole = octets.numel() // 8 * 8
    return octets[:whole].view(torch.int64).sum().view(1) + octets[whole:].sum(dtype=torch.int64)
