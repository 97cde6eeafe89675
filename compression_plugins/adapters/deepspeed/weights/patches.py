"""Weights travel as patches: only what a step has changed, without loss, under ZeRO 1, 2 and BF16_Optimizer.

Training is that of DeepSpeed without compression, bit for bit. How much is sent depends on the values: with bf16
weights and the small steps of fine-tuning most weights stay what they were. A partition of which so much has changed
that the values themselves are shorter travels whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....codecs.patch import apply_patch, changed, encode_patch, patch_bytes
from .held import HeldWeights


class Patches(HeldWeights):
    """Ranks tell each other first how many of their weights have changed, and then which."""

    def wire_bytes(self) -> float | None:
        return None

    def resume(self) -> None:
        """The model holds the exact weights always."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """There is nothing to go on from."""

    def _exchange(self, index: int, output: Tensor, mine: Tensor, held: Tensor, own_sum: Tensor) -> bool:
        places = changed(mine, held)
        told = torch.cat([own_sum, own_sum.new_tensor([places.numel()])])
        sums, counts = self._transport.all_gather(told).wait().T.tolist()
        if len(set(sums)) > 1:
            return False
        numel = mine.numel()
        lengths = [patch_bytes(count, numel, mine.element_size()) for count in counts]
        received = self._transport.all_gather_uneven(encode_patch(mine, places), lengths).wait().split(lengths)
        for owner, message in enumerate(received):
            if owner != self.session.rank:
                apply_patch(message, output[owner * numel : (owner + 1) * numel])
        return True
