"""Weights travel as codes of what has changed, with error feedback on the owner, under ZeRO 1, 2 and BF16_Optimizer.

An owner sends the code of the difference between its exact weights and what every rank holds, and every rank, the owner
too, adds what it decodes to. What the code lost is in the next difference, once and whole: error feedback without a
residual. What is exempt travels in the same message, as it is and in its own dtype.

EF21 (Richtarik et al., 2021, arXiv 2106.05203) sends such differences of gradients; here they are of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .... import triton_kernels as K
from ....codecs import Codec
from ....core.streams import Purpose, stream
from .held import HeldWeights

if TYPE_CHECKING:
    from ..backend import CompressedBackend
    from ..session import DeepSpeedSession

Spans = list[tuple[int, int]]
_SUM = 8  # bytes of the checksum at the front of a message


class Differences(HeldWeights):
    """Messages are [checksum | codes | exempt values], each part padded to 8 bytes."""

    _loses = True

    def __init__(
        self,
        session: DeepSpeedSession,
        backend: CompressedBackend,
        meet: Callable[[], None],
        names: set[str],
        codec: Codec,
    ) -> None:
        super().__init__(session, backend, meet, names)
        self._codec = codec
        self._saved: dict[int, Tensor] = {}
        self._spans = [
            [(_spans(runs, True), _spans(runs, False)) for runs in parts] for parts in map(list, self._runs)
        ]  # of each flat buffer and rank, those that are coded and those that are not

    def wire_bytes(self) -> float | None:
        total = sum(sum(self._lengths(i)) for i in range(len(self._flats)))
        return total * (self.session.size - 1) / self.session.size

    def resume(self) -> None:
        self._received, self._lossy = None, set(self._saved)
        for index, mine in sorted(self._saved.items()):
            self._gather_exactly(self._flats[index], mine)
        self._coarse, self._saved = bool(self._saved), {}

    def state_dict(self) -> dict[str, Any]:
        if not self._coarse:
            return {"held": {}}
        flats = self._flats if self._received is None else self._received
        return {"held": {i: self._own(flat).clone() for i, flat in enumerate(flats)}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        held = saved.get("held", {})
        self._saved = {int(index): mine.to(self._flats[int(index)].device) for index, mine in held.items()}

    def _exchange(self, index: int, output: Tensor, mine: Tensor, held: Tensor, own_sum: Tensor) -> bool:
        rank, size = self.session.rank, self.session.size
        lengths = self._lengths(index)
        coded, exempt = self._spans[index][rank]
        base = rank * mine.numel()
        payload = torch.zeros(lengths[rank], dtype=torch.uint8, device=mine.device)
        payload[:_SUM].view(torch.int64).copy_(own_sum)
        cut = self._codes_end(coded)
        if coded:
            x = _take(output, coded).float() - _take(held, [(a - base, b - base) for a, b in coded]).float()
            key = K.Key(
                self.session.common.config.seed,
                index,
                self.session.reducer.step,
                rank,
                stream(Purpose.WEIGHTS, micro_batch=index),
            )
            self._codec.encode(x, key, out=payload[_SUM : _SUM + self._codec.nbytes(x.numel())])
        if exempt:
            values = _take(output, exempt).view(torch.uint8)
            payload[cut : cut + values.numel()] = values
        received = self._transport.all_gather_uneven(payload, lengths).wait().split(lengths)
        sums = torch.stack([part[:_SUM].view(torch.int64) for part in received]).flatten()
        if not bool((sums == sums[0]).all()):
            return False
        for a, b in coded:
            output[a:b] = held[a - base : b - base]
        for owner in range(size):
            self._apply(output, received[owner], *self._spans[index][owner])
        return True

    def _apply(self, output: Tensor, message: Tensor, coded: Spans, exempt: Spans) -> None:
        """What one owner has sent."""
        cut = self._codes_end(coded)
        if coded:
            numel = _total(coded)
            change = self._codec.decode(message[_SUM : _SUM + self._codec.nbytes(numel)], numel)
            for (a, b), piece in zip(coded, change.split([b - a for a, b in coded])):
                output[a:b].copy_(output[a:b].float().add_(piece))
        for a, b in exempt:
            end = cut + (b - a) * output.element_size()
            output[a:b] = message[cut:end].view(output.dtype)
            cut = end

    def _codes_end(self, coded: Spans) -> int:
        return _SUM + (-(-self._codec.nbytes(_total(coded)) // 8) * 8 if coded else 0)

    def _lengths(self, index: int) -> list[int]:
        """Bytes of every rank's message."""
        itemsize = self._flats[index].element_size()
        return [self._codes_end(coded) + -(-_total(exempt) * itemsize // 8) * 8 for coded, exempt in self._spans[index]]


def _spans(runs: Any, coded: bool) -> Spans:
    """(start, end) of the runs that are `coded` or not, neighbours joined."""
    spans: Spans = []
    for run in runs:
        if run.coded == coded:
            if spans and spans[-1][1] == run.start:
                spans[-1] = (spans[-1][0], run.start + run.numel)
            else:
                spans.append((run.start, run.start + run.numel))
    return spans


def _total(spans: Spans) -> int:
    return sum(b - a for a, b in spans)


def _take(flat: Tensor, spans: Spans) -> Tensor:
    return torch.cat([flat[a:b] for a, b in spans])
